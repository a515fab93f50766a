"""Progress of the workers, on its way to the terminal; nobody waits for it.

Workers send what they do to an actor and go on; the driver asks the actor twice a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SEND_EVERY_S = 0.2


class Board:
    """The latest word of each worker. Runs as a Ray actor of no CPU."""

    def __init__(self) -> None:
        self._latest: dict[int, dict[str, Any]] = {}
        self._starts: dict[int, int] = {}

    def started(self, rank: int) -> None:
        """Count one start of a worker."""
        self._starts[rank] = self._starts.get(rank, 0) + 1

    def tell(self, rank: int, word: dict[str, Any]) -> None:
        """Replace the latest word of a worker."""
        self._latest[rank] = word

    def read(self) -> dict[str, Any]:
        """The latest words by rank, and how often the group of workers was started."""
        return {"workers": dict(self._latest), "starts": max(self._starts.values(), default=0)}


@dataclass
class Reporter:
    """One worker's side of the board; sends at most every SEND_EVERY_S seconds, and never waits."""

    rank: int
    send: Callable[[int, dict[str, Any]], Any] | None = None
    _last: float = field(default=0.0, init=False)

    def tell(self, *, force: bool = False, **word: Any) -> None:
        """Send what this worker does now, unless it has just said something."""
        now = time.monotonic()
        if self.send and (force or now - self._last >= SEND_EVERY_S):
            self._last = now
            self.send(self.rank, {**word, "pid": os.getpid()})
