"""Batcher: predicts what is there, at once; what arrives while it predicts waits, and goes together.

A request alone waits for nothing but one turn of the event loop. Requests that arrive in the same turn, or while a
prediction runs in the thread, are joined into one matrix by model, up to `batch_rows`: the more load, the larger the
batch, with no timer. A batch is of one model object, the one that its requests were admitted with.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from claydist.serving.refusals import Refusal, busy
from claydist.serving.settings import Limits

# Up to here a prediction in the event loop costs less than the way to a thread and back.
_INLINE_S = 0.002


class Predicts(Protocol):
    """What a batcher needs of a model."""

    @property
    def seconds_per_row(self) -> float:
        """Of a small prediction."""
        ...

    def predict_values(self, values: np.ndarray) -> np.ndarray:
        """Values of the model for rows of a RowMatrix."""
        ...


@dataclass(eq=False, slots=True)
class _Job:
    model: Predicts
    n_rows: int
    work: np.ndarray | Callable[[], Any]
    future: asyncio.Future[Any]
    deadline: float


class Batcher:
    """One queue and one thread for all predictions of a replica; used from one event loop."""

    def __init__(self, limits: Limits, on_batch: Callable[[int, float], None] = lambda rows, seconds: None) -> None:
        self._limits = limits
        self._on_batch = on_batch
        self._waiting: deque[_Job] = deque()
        self._is_running = False
        self._is_scheduled = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self.n_waiting_rows = 0

    async def predict(self, model: Predicts, values: np.ndarray, deadline: float | None = None) -> np.ndarray:
        """The model's values for rows of a RowMatrix, predicted alone or with others.

        Parameters
        ----------
        deadline : (time.monotonic) the prediction begins before, or never; `queue_s` from now where None.

        Raises
        ------
        Refusal : 503 when too many rows wait, or these have waited too long.
        """
        return await self._submit(model, len(values), values, deadline)

    async def run(self, model: Predicts, n_rows: int, work: Callable[[], Any], deadline: float | None = None) -> Any:
        """Result of `work`, done in the thread in its turn: pieces of bulk requests, which join with nothing."""
        return await self._submit(model, n_rows, work, deadline)

    def close(self) -> None:
        """Stop the thread once it is done."""
        self._thread.shutdown(wait=False)

    def _submit(
        self, model: Predicts, n_rows: int, work: np.ndarray | Callable[[], Any], deadline: float | None
    ) -> asyncio.Future[Any]:
        if self.n_waiting_rows and self.n_waiting_rows + n_rows > self._limits.queue_rows:
            raise busy(f"{self.n_waiting_rows} rows wait for a prediction already; ask again a little later")
        loop = asyncio.get_running_loop()
        latest = time.monotonic() + self._limits.queue_s if deadline is None else deadline
        job = _Job(model, n_rows, work, loop.create_future(), latest)
        self._waiting.append(job)
        self.n_waiting_rows += n_rows
        self._schedule(loop)
        return job.future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._waiting and not self._is_running and not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._flush, loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        jobs = self._take()
        if not jobs:
            return
        n_rows = sum(job.n_rows for job in jobs)
        if isinstance(jobs[0].work, np.ndarray) and n_rows * jobs[0].model.seconds_per_row <= _INLINE_S:
            self._finish(jobs, _attempt(jobs))
            self._schedule(loop)
            return
        self._is_running = True
        self._thread.submit(_attempt, jobs).add_done_callback(
            lambda done: loop.call_soon_threadsafe(self._after_thread, loop, jobs, done.result())
        )

    def _after_thread(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job], outcome: _Outcome) -> None:
        self._is_running = False
        self._finish(jobs, outcome)
        self._schedule(loop)

    def _take(self) -> list[_Job]:
        """The first job that still wants an answer, and those that can go with it; the others keep their places."""
        now = time.monotonic()
        first, taken, left, n_rows = None, [], deque[_Job](), 0
        while self._waiting:
            job = self._waiting.popleft()
            if job.future.done():
                self.n_waiting_rows -= job.n_rows
            elif job.deadline < now:
                self.n_waiting_rows -= job.n_rows
                job.future.set_exception(
                    busy(f"waited {self._limits.queue_s:g} s for a turn; ask again a little later")
                )
            elif first is None or (_joins(first, job) and n_rows + job.n_rows <= self._limits.batch_rows):
                first = first or job
                taken.append(job)
                n_rows += job.n_rows
                self.n_waiting_rows -= job.n_rows
            else:
                left.append(job)
        self._waiting = left
        return taken

    def _finish(self, jobs: list[_Job], outcome: _Outcome) -> None:
        self._on_batch(sum(job.n_rows for job in jobs), outcome.seconds)
        at = 0
        for job in jobs:
            if job.future.done():
                at += job.n_rows
                continue
            if outcome.error is not None:
                job.future.set_exception(outcome.error)
            elif isinstance(job.work, np.ndarray):
                job.future.set_result(outcome.result[at : at + job.n_rows])
            else:
                job.future.set_result(outcome.result)
            at += job.n_rows


@dataclass(frozen=True, slots=True)
class _Outcome:
    result: Any
    error: Exception | None
    seconds: float


def _joins(a: _Job, b: _Job) -> bool:
    return a.model is b.model and isinstance(a.work, np.ndarray) and isinstance(b.work, np.ndarray)


def _attempt(jobs: list[_Job]) -> _Outcome:
    """What the jobs come to; never raises, since nobody would hear it in the thread."""
    start = time.perf_counter()
    try:
        work = jobs[0].work
        if isinstance(work, np.ndarray):
            values = work if len(jobs) == 1 else np.concatenate([job.work for job in jobs])
            result = jobs[0].model.predict_values(values)
        else:
            result = work()
    except Refusal as e:
        return _Outcome(None, e, time.perf_counter() - start)
    except Exception as e:  # whatever a model raises must reach the request that waits for it
        return _Outcome(None, e, time.perf_counter() - start)
    return _Outcome(result, None, time.perf_counter() - start)
