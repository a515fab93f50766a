"""What runs before Serve's own code looks at a request, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.

Serve obeys some headers of any client (a time limit of its own choosing, no watch for disconnects) and decodes them as
UTF-8 outside of any error handling, so that one odd byte is a 500 without a body of ours. None of them is for clients.

Serve also takes a request's body into memory as fast as it comes, whether or not the application wants it. Where the
application runs in the same process (behind HAProxy it does), a large body waits at a gate until the application
begins to read it: until then it takes what uvicorn holds, 64 KB, and the rest stays with the client.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any, ClassVar

from claydist.serving.exchange import GATE, REQUEST_ID, Receive, Scope, Send

CALLBACK = "claydist.serving.edge:middlewares"
_OF_SERVE = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id")
)
# What uvicorn holds of a body that nobody reads.
_UNREAD_BYTES = 64 << 10
# A client that is refused is listened to for so long.
_LINGER_S = 5.0


class Edge:
    """An ASGI application without the headers that only Serve reads, and without a request id that is no plain text.

    Attributes
    ----------
    has_gates : whether an application of ours runs in this process and opens the gates; the application sets it.
    """

    has_gates: ClassVar[bool] = False

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if "headers" in scope:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
            if self.has_gates and scope["type"] == "http" and _is_large(dict(scope["headers"])):
                await self._behind_gate(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _behind_gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate = _Gate(receive)
        scope[GATE] = gate.open
        ending = _Ending(send)
        await self._app(scope, gate.receive, ending.send)
        await ending.end(gate)


class _Gate:
    """A body that comes through once somebody wants it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._is_open = asyncio.Event()
        self.is_at_end = False

    def open(self) -> None:
        """Let the body through; from any thread."""
        self._loop.call_soon_threadsafe(self._is_open.set)

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message, once the gate is open."""
        await self._is_open.wait()
        return await self.read()

    async def read(self) -> MutableMapping[str, Any]:
        """The next message, gate or not."""
        message = await self._receive()
        self.is_at_end = not message.get("more_body")
        return message


class _Ending:
    """Sends an answer whole, but ends it only once the client has sent its body, or has had time to.

    A connection that is closed at once takes the answer along; and one that is left open, to a client that never ends
    its body, keeps one of the turns that HAProxy gives to this replica.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_held = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message on, all but the end."""
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._is_held = True
            message = {**message, "more_body": True}
        await self._send(message)

    async def end(self, gate: _Gate) -> None:
        """Throw away what is left of the body, and end the answer; a body that has not ended ends the connection."""
        if not self._is_held:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not gate.is_at_end:
                    await gate.read()
        if gate.is_at_end:
            await self._send({"type": "http.response.body", "body": b""})
        # Otherwise uvicorn closes it: its answer is there by its length, and was never ended.


def middlewares() -> list[Any]:
    """What Serve puts around every HTTP server that it starts; asked in its process, before it starts."""
    from starlette.middleware import Middleware
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    for protocol in (HttpToolsProtocol, H11Protocol):
        _forget_what_was_reset(protocol)
    return [Middleware(Edge)]


def _forget_what_was_reset(protocol: Any) -> None:
    """Let a connection that was reset go at once.

    uvicorn (0.54) leaves the timer of its keep-alive running then, which holds 8 KB for each connection for 90 s more;
    and a reset is how HAProxy ends those that it does not need.
    """
    lost = protocol.connection_lost
    if getattr(lost, "is_ours", False):
        return

    def connection_lost(self: Any, exc: Exception | None) -> None:
        lost(self, exc)
        self._unset_keepalive_if_required()

    connection_lost.is_ours = True  # type: ignore[attr-defined]
    protocol.connection_lost = connection_lost


def _is_large(headers: dict[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return b"transfer-encoding" in headers
    return not length.isdigit() or len(length) > 18 or int(length) > _UNREAD_BYTES


def _passes(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        return REQUEST_ID.fullmatch(value) is not None
    return name.replace(b"_", b"-") not in _OF_SERVE and name.isascii()
