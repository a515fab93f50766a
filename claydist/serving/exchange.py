"""One HTTP request and its answer, over raw ASGI: no framework in the path of a prediction."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from claydist.serving.admission import Place
from claydist.serving.refusals import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Where a scope has what lets the body through to the server, see edge.py.
GATE = "claydist.gate"
# Of an answer that are handed over at once.
PIECE_BYTES = 64 << 10
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Disconnected(Exception):
    """The client went away while its body was read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: status, body, its content type, and further headers."""

    body: bytes
    content_type: bytes = b"application/json"
    status: int = 200
    headers: Sequence[tuple[bytes, bytes]] = ()


class Exchange:
    """A request as it comes in.

    Attributes
    ----------
    parts : of the path, decoded, without the prefix that the server is mounted at.
    headers : the last value of each, by name in lower case.
    request_id : the client's or the proxy's, else a new one.
    place : of its body among those that the server holds; None before the body is asked for.
    """

    __slots__ = (
        "_open_gate",
        "_receive",
        "body_is_read",
        "headers",
        "method",
        "model",
        "parts",
        "path",
        "place",
        "request_id",
        "rows",
        "version",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._open_gate: Callable[[], None] | None = scope.get(GATE)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        root = scope.get("root_path", "")
        path = self.path[len(root) :] if root and self.path.startswith(root) else self.path
        self.parts = path.split("/")[1:]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        self.place: Place | None = None
        self.body_is_read = False
        self.model = self.version = ""
        self.rows = 0

    @property
    def deadline(self) -> float:
        """(time.monotonic) when the first prediction must have begun; known once the body is read."""
        return self.place.deadline if self.place is not None else math.inf

    def finish_wait(self) -> None:
        """Its first rows are predicted: nobody waits for it any more."""
        if self.place is not None:
            self.place.finish()

    def claimed_length(self, limit: int) -> int:
        """The length that the client claims, 0 where it claims none; a Refusal where it is beyond the limit."""
        text = self.headers.get(b"content-length", b"0")
        if not text.isdigit():
            raise Refusal(400, "Content-Length: expected a number")
        if len(text) > 18 or int(text) > limit:
            raise too_large(limit)
        return int(text)

    async def body(self, limit: int, enter: Callable[[int], Place]) -> bytes | bytearray:
        """The whole body.

        Parameters
        ----------
        limit : bytes at the most, whatever the client claims.
        enter : gives a place to a body of the claimed length, before anything of it is read; may refuse.

        Raises
        ------
        Refusal : 413 beyond the limit.
        Disconnected : when the client goes away.
        """
        claimed = self.claimed_length(limit)
        coding = self.headers.get(b"content-encoding", b"identity").lower()
        if coding != b"identity":
            raise Refusal(400, "Content-Encoding: this server takes bodies as they are; send it uncompressed")
        self.place = enter(claimed)
        if self._open_gate is not None:
            self._open_gate()
        chunk, is_last = await self._chunk(0, limit)
        if is_last:
            body: bytes | bytearray = chunk
        else:
            # At its place at once: pieces that are joined in the end are there twice.
            body, size = bytearray(claimed), 0
            while True:
                body[size : size + len(chunk)] = chunk
                size += len(chunk)
                if is_last:
                    break
                chunk, is_last = await self._chunk(size, limit)
            del body[size:]
        self.body_is_read = True
        self.place.arrive(len(body))
        return body

    async def _chunk(self, size: int, limit: int) -> tuple[bytes, bool]:
        """What follows after `size` bytes, and whether it is the end."""
        assert self.place is not None
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        self.place.hold(size)
        return chunk, not message.get("more_body")


def too_large(limit: int) -> Refusal:
    """413 that says what the limit is."""
    return Refusal(413, f"the body is larger than {limit} bytes, which is what this server takes")


async def send_answer(send: Send, answer: Answer, request_id: str | None, *, head: bool = False) -> None:
    """Send it, a large body in pieces, each once the one before is on its way.

    Parameters
    ----------
    request_id : None where somebody else adds it to the headers.
    head : without its body.
    """
    headers = [(b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    headers += answer.headers
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    body = b"" if head else answer.body
    for at in range(0, len(body) - PIECE_BYTES, PIECE_BYTES):
        await send({"type": "http.response.body", "body": body[at : at + PIECE_BYTES], "more_body": True})
    sent = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES if body else 0
    await send({"type": "http.response.body", "body": body[sent:]})


def json_answer(tree: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> Answer:
    """The tree as JSON; text that is no Unicode (a lone surrogate of a decoded path) is written with `?`."""
    try:
        body = orjson.dumps(tree)
    except TypeError:
        body = orjson.dumps(_clean(tree))
    return Answer(body, b"application/json", status, headers)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
