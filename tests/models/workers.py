"""Rows in memory, and workers that are threads: what the tests of linear models share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Total = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """A chunk; `dense` gives the kept array."""

    X: np.ndarray
    codes: np.ndarray
    y: np.ndarray
    w: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def n_rows(self) -> int:
        return len(self.X)

    def dense(self) -> np.ndarray:
        return self.X

    def take(self, index: Any) -> Rows:
        w = None if self.w is None else self.w[index]
        offset = None if self.offset is None else self.offset[index]
        return Rows(self.X[index], self.codes[index], self.y[index], w, offset)

    def cut(self, n_rows: int) -> list[Rows]:
        return [self.take(slice(start, start + n_rows)) for start in range(0, self.n_rows, n_rows)]

    def onehot(self, n_onehot: int) -> np.ndarray:
        """[dense, one-hot] as one matrix, for the references."""
        ones = np.zeros((self.n_rows, n_onehot + 1))
        np.put_along_axis(ones, self.codes, 1.0, axis=1)  # -1 is the last column, which is dropped
        return np.concatenate([self.X, ones[:, :-1]], axis=1)


def alone(array: np.ndarray) -> np.ndarray:
    """The `total` of a single process."""
    return array


def run_workers(shards: Sequence[Any], work: Callable[[Any, Total], Any]) -> list[Any]:
    """Results of `work(shard, total)`, one thread a shard; a worker that calls too often or too seldom is an error."""
    barrier = threading.Barrier(len(shards), timeout=20)
    slots: list[Any] = [None] * len(shards)
    results: list[Any] = [None] * len(shards)

    def run(rank: int) -> None:
        def total(array: np.ndarray) -> np.ndarray:
            slots[rank] = array.copy()
            barrier.wait()
            assert {slot.shape for slot in slots} == {array.shape}
            summed = np.sum(slots, axis=0)
            barrier.wait()
            return summed

        try:
            results[rank] = work(shards[rank], total)
        except BaseException as exc:
            results[rank] = exc
            if not isinstance(exc, threading.BrokenBarrierError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results


def make_rows(seed: int, n_rows: int, n_dense: int = 5, sizes: Sequence[int] = (), *, weighted: bool = False) -> Rows:
    """Standard normal numerics, uniform codes of categoricals with so many values (some missing), labels zero."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    columns = [rng.integers(-1, size, n_rows) for size in sizes]
    codes = [np.where(column < 0, -1, column + start) for column, start in zip(columns, starts, strict=False)]
    stacked = np.stack(codes, axis=1) if codes else np.zeros((n_rows, 0))
    w = rng.gamma(1.0, size=n_rows) if weighted else None
    return Rows(rng.normal(size=(n_rows, n_dense)), stacked.astype(np.int32), np.zeros(n_rows), w)


def labelled(rows: Rows, loss: str, n_onehot: int, seed: int = 1, n_classes: int = 3) -> Rows:
    """Rows with labels drawn from a linear model of this loss."""
    rng = np.random.default_rng(seed)
    Z = rows.onehot(n_onehot)
    raw = 0.7 * Z @ rng.normal(size=Z.shape[1]) - 0.3
    y = {
        "squared": lambda: raw + rng.normal(size=rows.n_rows),
        "logistic": lambda: rng.random(rows.n_rows) < 1 / (1 + np.exp(-raw)),
        "poisson": lambda: rng.poisson(np.exp(np.minimum(raw, 4))),
        "multinomial": lambda: np.digitize(
            raw + rng.logistic(size=rows.n_rows), np.quantile(raw, np.arange(1, n_classes) / n_classes)
        ),
    }[loss]()
    return Rows(rows.X, rows.codes, y.astype(np.float64), rows.w, rows.offset)
