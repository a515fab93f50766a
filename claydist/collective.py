"""Sums over the training workers, checked before they are trusted.

`xgboost.collective.allreduce` gives garbage silently when shapes differ between workers, the local value when it is
called from another thread, and a flat array whatever the shape (XGBoost 3.2). Here every sum is preceded by a header
on which all workers must agree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xgboost import collective

from claydist.errors import ContractError, TrainingError

_HEADER = 4
_SHOWN_FROM = 100_000
_SHOWN = 200


@dataclass
class Collective:
    """The workers of one training, seen from one of them. Use it on the training thread only.

    Parameters
    ----------
    world_size : number of workers there must be.
    rank : number of this worker.
    """

    world_size: int = 1
    rank: int = 0
    _n_calls: int = field(default=0, init=False)

    def check_world(self) -> None:
        """Pass when the communicator really has all the workers; else each would train on its own shard.

        Raises
        ------
        TrainingError : when it has another number.
        """
        found = collective.get_world_size()
        if found != self.world_size:
            raise TrainingError(
                f"the communicator of rank {self.rank} has {found} workers, expected {self.world_size}: "
                f"each would train on its own rows only; this is a failure to start, run again"
            )

    def total(self, array: np.ndarray) -> np.ndarray:
        """Sums over all workers, of the same shape and dtype (float64 or int64); every worker must call it.

        Raises
        ------
        ContractError : when the workers' arrays differ in shape or dtype, or they are not at the same call.
        TrainingError : when a worker is gone, or silent for longer than the timeout. With three workers or more
            XGBoost 3.2 may block in one of the others instead, beyond its own timeout; the driver ends that one,
            for Ray Train starts all workers again when one is gone.
        """
        if array.dtype not in (np.float64, np.int64):
            raise TypeError(f"expected float64 or int64, found {array.dtype}")
        self._agree("total", array)
        if self.world_size == 1 or array.size == 0:
            return array.copy()
        return self._reduce(array, collective.Op.SUM).reshape(array.shape)

    def total_objects(self, value: Any) -> list[Any]:
        """The JSON-able value of every worker, by rank; every worker must call it. For small values."""
        if self.world_size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.zeros(self.world_size, np.int64)
        sizes[self.rank] = data.size
        sizes = self.total(sizes)
        # Padded to words: int64 addition with zeros elsewhere is an exact gather.
        words = np.zeros((self.world_size, int(sizes.max() + 7) // 8), np.int64)
        words[self.rank].view(np.uint8)[: data.size] = data
        words = self.total(words)
        return [json.loads(words[r].view(np.uint8)[: sizes[r]].tobytes()) for r in range(self.world_size)]

    def check_contract(self, contract: Mapping[str, Any]) -> None:
        """Pass when all workers hold the same contract.

        Raises
        ------
        ContractError : with every key in which workers differ, and the ranks that hold each value.
        """
        texts = {key: json.dumps(value, default=str, sort_keys=True) for key, value in contract.items()}
        digests = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}
        everyone = self.total_objects(digests)
        keys = sorted({key for found in everyone for key in found})
        differing = [key for key in keys if len({found.get(key) for found in everyone}) > 1]
        if not differing:
            return
        shown = self.total_objects({key: str(contract.get(key))[:_SHOWN_FROM] for key in differing})
        problems = [f"{key}: {_differences([found[key] for found in shown])}" for key in differing]
        raise ContractError("workers disagree before round 0; nothing was trained", problems)

    def _agree(self, operation: str, array: np.ndarray) -> None:
        """Compare what all are about to sum: their least and greatest must be the same."""
        self._n_calls += 1
        self.check_world()
        if self.world_size == 1:
            return
        shape = int.from_bytes(hashlib.sha256(repr(array.shape).encode()).digest()[:7], "big")
        text = f"{operation} {array.dtype}".encode()
        kind = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        header = np.array([self._n_calls, array.size, shape, kind], np.int64)
        # One reduction for both: the greatest of -x is minus the least of x.
        both = self._reduce(np.concatenate([header, -header]), collective.Op.MAX)
        if not np.array_equal(both[:_HEADER], -both[_HEADER:]):
            raise ContractError(
                f"rank {self.rank} is at call {self._n_calls} with {array.dtype} of shape {array.shape}, "
                f"another worker is not: workers have gone different ways"
            )

    def _reduce(self, array: np.ndarray, op: collective.Op) -> np.ndarray:
        from xgboost.core import XGBoostError

        try:
            return collective.allreduce(np.ascontiguousarray(array), op)
        except XGBoostError as e:
            raise TrainingError(f"rank {self.rank} lost the other workers: {reason(e)}") from e


def reason(error: BaseException) -> str:
    """What an error says, in one line without time and place: of XGBoost's all reasons, of others the last line."""
    # XGBoost's: "[time] file:line: text", or lines "- [file:line|time]: text" from the outer to the inner reason.
    text, frames, _ = str(error).partition("Stack trace:")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if reasons := [line.partition("]: ")[2].rstrip(".") for line in lines if line.startswith("- [")]:
        return "; ".join(reasons)
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", lines[0 if frames else -1])


def _differences(texts: Sequence[str]) -> str:
    """What each rank has, from shortly before the place where the texts part."""
    letters = enumerate(zip(*texts, strict=False))
    parting = next((i for i, found in letters if len(set(found)) > 1), min(map(len, texts)))
    start = max(0, parting - _SHOWN // 4)
    dots = "..." if start else ""
    return "; ".join(f"rank {rank} has {dots}{text[start : start + _SHOWN]}" for rank, text in enumerate(texts))
