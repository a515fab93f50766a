"""Memory goes back to the system after a busy period: the allocator would keep the peak of it for ever."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

import pyarrow as pa

_EVERY_S = 5.0


class Memory:
    """Gives back what large bodies have left behind, once nothing is at work.

    Parameters
    ----------
    is_idle : whether nothing is at work now.
    """

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._is_used = False
        self._task: asyncio.Task[None] | None = None

    def use(self) -> None:
        """Say that something large was held."""
        self._is_used = True

    def follow(self) -> None:
        """Begin to look, in this event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._look())

    def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            if self._is_used and self._is_idle():
                self._is_used = False
                await asyncio.to_thread(give_back)


def give_back() -> None:
    """Hand unused memory to the system, where the C library can (glibc)."""
    pa.default_memory_pool().release_unused()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
