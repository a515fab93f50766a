from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from claydist.serving.batching import Batcher
from claydist.serving.bulk import predict_matrix
from claydist.serving.refusals import Refusal
from claydist.serving.settings import Limits


class Model:
    """Gives each row's first value, and remembers what it was asked."""

    def __init__(self, seconds_per_row: float = 0.0, busy: threading.Event | None = None) -> None:
        self.seconds_per_row = seconds_per_row
        self.sizes: list[int] = []
        self._busy = busy

    def predict_values(self, values: np.ndarray) -> np.ndarray:
        if self._busy is not None:
            assert self._busy.wait(10)
        self.sizes.append(len(values))
        return values[:, 0]


def matrix(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float64)[:, None]


def test_one_request_is_predicted_alone() -> None:
    model = Model()
    assert asyncio.run(Batcher(Limits()).predict(model, matrix(1, 2))).tolist() == [1, 2]
    assert model.sizes == [2]


def test_requests_of_one_turn_go_together_and_get_their_own() -> None:
    model, other = Model(), Model()

    async def many() -> list[Any]:
        batcher = Batcher(Limits())
        asked = [batcher.predict(model if i % 3 else other, matrix(i, i + 0.5)) for i in range(30)]
        return await asyncio.gather(*asked)

    found = asyncio.run(many())
    assert [values.tolist() for values in found] == [[i, i + 0.5] for i in range(30)]
    assert model.sizes == [40]
    assert other.sizes == [20]


def test_a_batch_has_its_size_at_the_most() -> None:
    model = Model()

    async def many() -> None:
        batcher = Batcher(Limits(batch_rows=4))
        await asyncio.gather(*(batcher.predict(model, matrix(1, 2, 3)) for _ in range(5)))

    asyncio.run(many())
    assert model.sizes == [3] * 5


def test_what_waits_for_the_thread_is_joined() -> None:
    free = threading.Event()
    model = Model(seconds_per_row=1.0, busy=free)

    async def many() -> list[Any]:
        batcher = Batcher(Limits())
        first = asyncio.ensure_future(batcher.predict(model, matrix(0)))
        await asyncio.sleep(0.05)
        rest = [asyncio.ensure_future(batcher.predict(model, matrix(i))) for i in range(1, 9)]
        await asyncio.sleep(0.05)
        assert batcher.n_waiting_rows == 8
        free.set()
        return await asyncio.gather(first, *rest)

    assert [float(v[0]) for v in asyncio.run(many())] == list(range(9))
    assert model.sizes == [1, 8]


def test_the_queue_is_bounded_in_rows_and_time() -> None:
    free = threading.Event()
    model = Model(seconds_per_row=1.0, busy=free)

    async def many() -> None:
        batcher = Batcher(Limits(queue_rows=10, queue_s=0.1))
        first = asyncio.ensure_future(batcher.predict(model, matrix(0)))
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(batcher.predict(model, matrix(*range(8))))
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="rows wait"):
            await batcher.predict(model, matrix(1, 2, 3))
        await asyncio.sleep(0.15)
        free.set()
        assert (await first).tolist() == [0]
        with pytest.raises(Refusal, match=r"waited 0.1 s") as caught:
            await waiting
        assert caught.value.status == 503
        assert dict(caught.value.headers)[b"retry-after"] == b"1"
        assert batcher.n_waiting_rows == 0

    asyncio.run(many())


def test_a_request_that_left_is_not_predicted() -> None:
    free = threading.Event()
    model = Model(seconds_per_row=1.0, busy=free)

    async def many() -> None:
        batcher = Batcher(Limits())
        first = asyncio.ensure_future(batcher.predict(model, matrix(0)))
        await asyncio.sleep(0.01)
        left = asyncio.ensure_future(batcher.predict(model, matrix(1)))
        stays = asyncio.ensure_future(batcher.predict(model, matrix(2)))
        await asyncio.sleep(0.01)
        left.cancel()
        free.set()
        await first
        assert (await stays).tolist() == [2]

    asyncio.run(many())
    assert model.sizes == [1, 1]


def test_failures_reach_who_asked() -> None:
    class Broken(Model):
        def predict_values(self, values: np.ndarray) -> np.ndarray:
            raise ArithmeticError("no")

    async def many() -> None:
        batcher = Batcher(Limits())
        for model in (Broken(), Broken(seconds_per_row=1)):
            with pytest.raises(ArithmeticError):
                await batcher.predict(model, matrix(1))
        assert await batcher.run(Model(), 1, lambda: "done") == "done"

    asyncio.run(many())


def test_alone_it_does_not_wait() -> None:
    async def one_by_one() -> float:
        batcher, model = Batcher(Limits()), Model()
        await batcher.predict(model, matrix(1))
        start = time.perf_counter()
        for _ in range(200):
            await batcher.predict(model, matrix(1))
        return (time.perf_counter() - start) / 200

    assert asyncio.run(one_by_one()) < 0.001


def test_a_large_matrix_lets_small_ones_in_between() -> None:
    class Slow(Model):
        def predict_values(self, values: np.ndarray) -> np.ndarray:
            time.sleep(len(values) * self.seconds_per_row)
            return super().predict_values(values)

    model, limits, firsts = Slow(seconds_per_row=1e-4), Limits(queue_s=5.0), []

    async def many() -> tuple[np.ndarray, list[float]]:
        batcher, numbers = Batcher(limits), np.arange(10_000.0)[:, None]
        large = asyncio.ensure_future(
            predict_matrix(model, numbers, batcher, 65_536, time.monotonic() + 5, lambda: firsts.append(large.done()))
        )
        await asyncio.sleep(0.05)
        took = []
        for i in range(3):
            start = time.monotonic()
            assert (await predict_matrix(model, matrix(i), batcher, 65_536, start + 5)).tolist() == [i]
            took.append(time.monotonic() - start)
        assert not large.done()
        return await large, took

    found, _ = asyncio.run(many())
    assert found.tolist() == list(range(10_000))
    assert firsts == [False]
    assert max(model.sizes) == 300


def test_the_first_piece_has_the_deadline_of_its_request() -> None:
    async def late() -> None:
        with pytest.raises(Refusal, match="waited"):
            await predict_matrix(Model(), matrix(1), Batcher(Limits()), 10, time.monotonic() - 0.1)
        model = Model(seconds_per_row=0.003)
        with pytest.raises(Refusal, match="waited"):
            await predict_matrix(model, np.zeros((30, 1)), Batcher(Limits()), 10, time.monotonic() - 0.1)

    asyncio.run(late())
