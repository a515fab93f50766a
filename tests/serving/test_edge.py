from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import struct
import weakref
from functools import partial
from typing import Any

import pytest
import uvicorn
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from uvicorn.server import ServerState

from claydist.serving import edge
from claydist.serving.admission import Admission
from claydist.serving.edge import Edge, middlewares
from claydist.serving.exchange import Exchange
from claydist.serving.settings import Limits


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        (b"authorization", b"Bearer \xff", True),
        (b"content-length", b"5", True),
        (b"x-request-id", b"abc-1", True),
        (b"x-request-id", b"\xff", False),
        (b"x-request-timeout-seconds", b"-1", False),
        (b"x-request-disconnect-disabled", b"?1", False),
        (b"serve_multiplexed_model_id", b"\xff", False),
        (b"x_session_id", b"\xff", False),
        (b"\xff", b"1", False),
    ],
)
def test_headers_of_serve_stop_at_the_edge(name: bytes, value: bytes, passes: bool) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    (middleware,) = middlewares()
    assert middleware.cls is Edge
    asyncio.run(Edge(app)({"type": "http", "headers": [(name, value)]}, None, None))  # type: ignore[arg-type]
    assert seen == ([(name, value)] if passes else [])
    asyncio.run(Edge(app2)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]


async def app2(scope: Any, receive: Any, send: Any) -> None:
    assert "headers" not in scope


def answered(app: Edge, head: bytes, body: bytes) -> tuple[bytes, int]:
    """What a client that sends its whole body before it reads gets, and the most that uvicorn held of it."""
    most = 0

    async def once() -> bytes:
        nonlocal most
        config = uvicorn.Config(app, port=0, lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        asking = asyncio.create_task(asyncio.to_thread(send_all, port, head, body))
        while not asking.done():
            cycles = [c.cycle for c in server.server_state.connections if getattr(c, "cycle", None)]
            most = max([most, *(len(cycle.body) for cycle in cycles)])
            await asyncio.sleep(0.005)
        server.should_exit = True
        await task
        return await asking

    return asyncio.run(once()), most


def send_all(port: int, head: bytes, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(head + body)
        got = b""
        while not got.endswith(b"later"):
            if not (piece := raw.recv(65536)):
                break
            got += piece
        return got


async def pumped(scope: Any, receive: Any, send: Any, answer: Any) -> None:
    """As Serve does it: the body is taken as fast as it comes, beside the application."""
    proxy = ASGIDIReceiveProxy(scope, receive, asyncio.get_running_loop())
    pump = proxy.fetch_until_disconnect_task()
    await answer(scope, proxy, send)
    scope["pumped"].append(proxy.queue.qsize())
    pump.cancel()


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_a_refused_body_is_not_taken_in_and_its_client_hears_why(
    connection: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Edge, "has_gates", True)
    pieces: list[int] = []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)
        headers = [(b"content-length", b"5"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"later"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["pumped"] = pieces
        await pumped(scope, receive, send, refuse)

    body = b"x" * (20 << 20)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: %s\r\nContent-Length: %d\r\n\r\n" % (connection, len(body))
    got, most = answered(Edge(app), head, body)
    assert got.startswith(b"HTTP/1.1 503")
    assert got.endswith(b"later")
    assert b"retry-after: 1" in got
    assert pieces == [0]
    assert most < 1 << 20


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_a_refused_body_that_does_not_end_ends_its_connection(
    connection: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Edge, "has_gates", True)
    monkeypatch.setattr(edge, "_LINGER_S", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"6")]})
        await send({"type": "http.response.body", "body": b"never\n"})

    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: %s\r\nContent-Length: 900000\r\n\r\n" % connection
    # `send_all` reads until the server closes, or for 20 s, after which it fails.
    got, _ = answered(Edge(app), head, b"x" * 100_000)
    assert got.startswith(b"HTTP/1.1 503")
    assert got.endswith(b"never\n")


def test_a_body_that_is_wanted_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Edge, "has_gates", True)
    found: list[bytes] = []

    async def read(scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive)
        found.append(bytes(await exchange.body(64 << 20, partial(Admission(Limits()).enter, "x"))))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"later"})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["pumped"] = []
        await pumped(scope, receive, send, read)

    body = random.Random(0).randbytes(3 << 20)
    for head in (
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body),
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    ):
        sent = body if b"Length" in head else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        assert answered(Edge(app), head, sent)[0].endswith(b"later")
    assert found == [body, body]


@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_a_connection_that_was_reset_is_let_go_at_once(http: str) -> None:
    middlewares()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def reset() -> int:
        config = uvicorn.Config(app, http=http, lifespan="off", timeout_keep_alive=90, log_level="critical")
        config.load()
        made: list[weakref.ref[Any]] = []

        def protocol() -> Any:
            found = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
            made.append(weakref.ref(found))
            return found

        loop = asyncio.get_running_loop()
        server = await loop.create_server(protocol, "127.0.0.1", 0)
        for _ in range(3):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"ok")
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        await asyncio.sleep(0.2)
        server.close()
        gc.collect()
        return sum(found() is None for found in made)

    assert asyncio.run(reset()) == 3
