from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from asking import client

from claydist.serving import memory
from claydist.serving.application import Application
from claydist.values import to_plain


def test_memory_goes_back_once_after_large_bodies_when_nothing_is_at_work(
    make_app: Callable[..., Application], table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(memory, "_EVERY_S", 0.02)
    monkeypatch.setattr(memory, "give_back", lambda: given.append(1))
    app = make_app()
    plan = app.shelf.find("trees").predictor.plan

    async def run() -> None:
        async with client(app) as asking:

            async def ask_for(n_rows: int) -> None:
                body = {"rows": to_plain(table[:n_rows], plan)}
                assert (await asking.post("/predict/trees", json=body)).status_code == 200
                await asyncio.sleep(0.1)

            await ask_for(1)
            assert given == []
            await ask_for(900)
            assert given == [1]
            app._n_requests += 1
            await ask_for(900)
            assert given == [1]
            app._n_requests -= 1
            await asyncio.sleep(0.1)
            assert given == [1, 1]

    asyncio.run(run())


@pytest.mark.parametrize("library", [object(), None])
def test_a_c_library_without_it_is_left_alone(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.give_back()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    memory.give_back()
