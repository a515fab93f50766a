from __future__ import annotations

import asyncio
from typing import Any

import pytest

from claydist.serving.edge import Edge, middlewares


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
