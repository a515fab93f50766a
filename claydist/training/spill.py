"""Encoded rows in a file without a name, for the passes over them that follow the first.

XGBoost passes four times over the rows that it bins. To read and encode them again each time costs a quarter of
binning; from a file that the kernel holds in memory they come back for next to nothing, and that memory is given back
when somebody needs it. Without a name the file goes with its process, however that ends.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

DISK_SHARE = 2
MEMORY_SHARE = 4


def has_room(n_bytes: float) -> bool:
    """True where a file of this size takes at most half of the free disk and a quarter of the memory that is left.

    Beyond that the kernel would have to fetch it from the disk, which is slower than to read the input again.
    """
    with suppress(OSError):
        free = shutil.disk_usage(tempfile.gettempdir()).free
        return n_bytes * DISK_SHARE <= free and n_bytes * MEMORY_SHARE <= available_memory()
    return False


def available_memory() -> int:
    """Bytes that this machine, or the container around us, can still give; 0 where the system does not tell."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # no container, or one without a limit
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            left = min(left, max(0, limit - used))
        return left
    return 0


class Spill:
    """The batches of one pass, to be read again in their order.

    Raises
    ------
    OSError : of every method, when the disk does not hold them.
    """

    def __init__(self) -> None:
        # Unbuffered, so that a full disk is found while batches are written.
        self._file: IO[bytes] | None = None
        self._batches: list[dict[str, Any]] = []
        self._largest: dict[tuple[str, np.dtype[Any]], int] = {}

    def write(self, batch: Mapping[str, Any]) -> None:
        """Add a batch: its arrays go to the file, what else it holds is remembered."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="claydist-", buffering=0)  # noqa: SIM115  as long as this lives
        kept: dict[str, Any] = {}
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                left = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
                while len(left):
                    left = left[self._file.write(left) :]
                kept[name] = _Array(value.dtype, value.shape)
                self._largest[name, value.dtype] = max(self._largest.get((name, value.dtype), 0), value.size)
            else:
                kept[name] = value
        self._batches.append(kept)

    def read(self) -> Iterator[dict[str, Any]]:
        """The batches; the arrays of one are overwritten by those of the next."""
        if self._file is not None:
            self._file.seek(0)
        space: dict[tuple[str, np.dtype[Any]], np.ndarray] = {}
        for kept in self._batches:
            yield {
                name: self._fill(space, name, value) if isinstance(value, _Array) else value
                for name, value in kept.items()
            }

    def _fill(self, space: dict[tuple[str, np.dtype[Any]], np.ndarray], name: str, array: _Array) -> np.ndarray:
        key = name, array.dtype
        if key not in space:
            space[key] = np.empty(self._largest[key], array.dtype)
        values = space[key][: math.prod(array.shape)]
        left = values.view(np.uint8).data
        while len(left):
            if not (n_bytes := self._file.readinto(left)):  # type: ignore[union-attr]
                raise OSError(f"a temporary file in {tempfile.gettempdir()} is shorter than what was written to it")
            left = left[n_bytes:]
        return values.reshape(array.shape)


@dataclass(frozen=True)
class _Array:
    """Stands for an array in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
