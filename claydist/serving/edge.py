"""What runs before Serve's own code looks at a request, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.

Serve obeys some headers of any client (a time limit of its own choosing, no watch for disconnects) and decodes them as
UTF-8 outside of any error handling, so that one odd byte is a 500 without a body of ours. None of them is for clients.
"""

from __future__ import annotations

from typing import Any

from claydist.serving.exchange import REQUEST_ID, Receive, Scope, Send

CALLBACK = "claydist.serving.edge:middlewares"
_OF_SERVE = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id")
)


class Edge:
    """An ASGI application without the headers that only Serve reads, and without a request id that is no plain text."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if "headers" in scope:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
        await self._app(scope, receive, send)


def middlewares() -> list[Any]:
    """What Serve puts around every HTTP server that it starts."""
    from starlette.middleware import Middleware

    return [Middleware(Edge)]


def _passes(name: bytes, value: bytes) -> bool:
    if name == b"x-request-id":
        return REQUEST_ID.fullmatch(value) is not None
    return name.replace(b"_", b"-") not in _OF_SERVE and name.isascii()
