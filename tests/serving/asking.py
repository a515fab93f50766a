"""Requests to an application, without a server in between."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import httpx
import pyarrow as pa

from claydist.serving.application import Application

ARROW = "application/vnd.apache.arrow.stream"


def client(app: Application) -> httpx.AsyncClient:
    """A client whose requests go straight to the application; what the application raises, raises here."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def ask(app: Application, method: str, path: str, **request: Any) -> httpx.Response:
    """The answer to one request."""

    async def once() -> httpx.Response:
        async with client(app) as asking:
            return await asking.request(method, path, **request)

    return asyncio.run(once())


def arrow_stream(table: pa.Table, **options: Any) -> bytes:
    """The table as an IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table)
    return sink.getvalue()
