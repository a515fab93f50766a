"""One HTTP request and its answer, over raw ASGI: no framework in the path of a prediction."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from claydist.serving.refusals import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

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
    held : bytes of the body in memory.
    """

    __slots__ = (
        "_receive",
        "body_is_read",
        "headers",
        "held",
        "method",
        "model",
        "parts",
        "path",
        "request_id",
        "rows",
        "version",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        root = scope.get("root_path", "")
        path = self.path[len(root) :] if root and self.path.startswith(root) else self.path
        self.parts = path.split("/")[1:]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        self.held = 0
        self.body_is_read = False
        self.model = self.version = ""
        self.rows = 0

    def check_length(self, limit: int) -> None:
        """Pass when the length that the client claims is within the limit, or it claims none; else a Refusal."""
        text = self.headers.get(b"content-length", b"0")
        if not text.isdigit():
            raise Refusal(400, "Content-Length: expected a number")
        if len(text) > 18 or int(text) > limit:
            raise too_large(limit)

    async def body(self, limit: int, hold: Callable[[int], None]) -> bytes:
        """The whole body.

        Parameters
        ----------
        limit : bytes at the most, whatever the client claims.
        hold : told of the bytes that are kept, before they are; may refuse.

        Raises
        ------
        Refusal : 413 beyond the limit.
        Disconnected : when the client goes away.
        """
        self.check_length(limit)
        coding = self.headers.get(b"content-encoding", b"identity").lower()
        if coding != b"identity":
            raise Refusal(400, "Content-Encoding: this server takes bodies as they are; send it uncompressed")
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            if size > self.held:
                hold(size - self.held)
                self.held = size
            if not message.get("more_body"):
                self.body_is_read = True
                return chunk if not chunks else b"".join([*chunks, chunk])
            chunks.append(chunk)


def too_large(limit: int) -> Refusal:
    """413 that says what the limit is."""
    return Refusal(413, f"the body is larger than {limit} bytes, which is what this server takes")


async def send_answer(send: Send, answer: Answer, request_id: str | None, *, head: bool = False) -> None:
    """Send it; `request_id` is None where somebody else adds it to the headers."""
    headers = [(b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    headers += answer.headers
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else answer.body})


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
