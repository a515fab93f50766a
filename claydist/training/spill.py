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
from typing import Any, BinaryIO

import numpy as np

DISK_SHARE = 2
MEMORY_SHARE = 4


def has_room(n_bytes: int) -> bool:
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
        self._file: BinaryIO = tempfile.TemporaryFile(prefix="claydist-")  # noqa: SIM115  as long as this lives
        self._batches: list[dict[str, Any]] = []
        self._largest: dict[str, int] = {}

    def write(self, batch: Mapping[str, Any]) -> None:
        """Add a batch: its arrays go to the file, what else it holds is remembered."""
        kept: dict[str, Any] = {}
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                self._file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                kept[name] = _Array(value.dtype, value.shape)
                self._largest[name] = max(self._largest.get(name, 0), value.size)
            else:
                kept[name] = value
        self._batches.append(kept)

    def read(self) -> Iterator[dict[str, Any]]:
        """The batches; the arrays of one are overwritten by those of the next."""
        self._file.seek(0)
        space: dict[str, np.ndarray] = {}
        for kept in self._batches:
            yield {
                name: self._fill(space, name, value) if isinstance(value, _Array) else value
                for name, value in kept.items()
            }

    def _fill(self, space: dict[str, np.ndarray], name: str, array: _Array) -> np.ndarray:
        if name not in space:
            space[name] = np.empty(self._largest[name], array.dtype)
        values = space[name][: math.prod(array.shape)]
        if self._file.readinto(values.view(np.uint8)) != values.nbytes:  # type: ignore[attr-defined]
            raise OSError(f"a temporary file in {tempfile.gettempdir()} is shorter than what was written to it")
        return values.reshape(array.shape)


@dataclass(frozen=True)
class _Array:
    """Stands for an array in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
