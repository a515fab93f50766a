"""Admission: whether a body is worth reading, before it is read.

Large bodies are parsed one after the other, so that what is admitted says how long the next one would wait. One that
would wait too long is refused by its claimed length alone: it takes no memory, and its client hears of it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from claydist.serving.refusals import busy
from claydist.serving.settings import Limits

# Bodies up to here are parsed where they are, and wait for nobody.
SMALL_BYTES = 16 << 10
# Of `queue_s`: what is admitted should be done in time, though the estimate is of the past.
_MARGIN = 0.8
# Before anything was measured: JSON takes about three times as long, Arrow less.
_FIRST_S_PER_BYTE = 1e-8
_WEIGHT = 0.1
_MOST_GROWTH = 4.0


class Admission:
    """The bodies that a replica holds, and the seconds that their parsing and predicting will take.

    Attributes
    ----------
    n_bytes : claimed and held.
    wait_s : expected, of one that came now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._s_per_byte: dict[tuple[str, int], float] = {}
        self._last_done = 0.0
        self.n_bytes = 0
        self.wait_s = 0.0

    def enter(self, kind: str, n_bytes: int) -> Place:
        """A place for a body of so many bytes, by its claim.

        Parameters
        ----------
        kind : what takes about the same time for the same size, such as JSON for one model.

        Raises
        ------
        Refusal : 503 when it would not be done in time, or too many bytes are held. Where nothing is at work
            everything is admitted.
        """
        if n_bytes > SMALL_BYTES and self.wait_s:
            expected = self.wait_s + self.seconds(kind, n_bytes)
            if expected > _MARGIN * self._limits.queue_s:
                raise busy(f"this would wait for about {expected:.1f} s; ask again a little later")
        place = Place(self, kind, self._limits.queue_s)
        place.hold(n_bytes)
        place.count(n_bytes)
        return place

    def reserve(self, n_bytes: int, own: int) -> None:
        """Count bytes that will be held; a Refusal 503 where those of others and these are too many.

        Parameters
        ----------
        own : bytes that the same body holds already. Small bodies always pass: their number is bounded elsewhere.
        """
        others = self.n_bytes - own
        if own + n_bytes > SMALL_BYTES and others and self.n_bytes + n_bytes > self._limits.queue_bytes:
            raise busy(f"bodies of {others} bytes are at work already; ask again a little later")
        self.n_bytes += n_bytes

    def seconds(self, kind: str, n_bytes: int) -> float:
        """Expected of parsing a body and predicting its first rows."""
        return n_bytes * self._s_per_byte.get(_alike(kind, n_bytes), _FIRST_S_PER_BYTE)

    def measure(self, kind: str, n_bytes: int, since: float) -> None:
        """Learn from a body that is done: the slower of parsing and predicting shows between two that follow."""
        now = time.monotonic()
        found = (now - max(since, self._last_done)) / n_bytes
        self._last_done = now
        alike = _alike(kind, n_bytes)
        before = self._s_per_byte.get(alike, found)
        # A machine that stood still for a moment says nothing about the next body.
        self._s_per_byte[alike] = (1 - _WEIGHT) * before + _WEIGHT * min(found, _MOST_GROWTH * before)


def _alike(kind: str, n_bytes: int) -> tuple[str, int]:
    """What takes about the same time a byte: every request has work beside its bytes, so also the size, by powers."""
    return kind, n_bytes.bit_length()


class Place:
    """One body's place among those that are read, parsed and predicted.

    Attributes
    ----------
    deadline : (time.monotonic) its first prediction begins before, or never; known once the body is there.
    work : the parsing in a thread, which goes on when the request is cancelled.
    """

    __slots__ = (
        "_admission", "_arrived", "_kind", "_n_bytes", "_n_held", "_queue_s", "_seconds", "_timer", "deadline", "work"
    )  # fmt: skip

    def __init__(self, admission: Admission, kind: str, queue_s: float) -> None:
        self._admission = admission
        self._kind = kind
        self._queue_s = queue_s
        self._n_bytes = self._n_held = 0
        self._seconds = self._arrived = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.deadline = 0.0
        self.work: Future[Any] | None = None

    def hold(self, n_bytes: int) -> None:
        """Hold this many bytes in all; a Refusal 503 where they are too many."""
        if n_bytes > self._n_held:
            self._admission.reserve(n_bytes - self._n_held, self._n_held)
            self._n_held = n_bytes

    def count(self, n_bytes: int) -> None:
        """Let those that come later wait for it, unless it is small, until it has not arrived for too long."""
        if n_bytes > SMALL_BYTES:
            self._wait_for(n_bytes)
            # Whoever sends slowly would keep all others out.
            self._timer = asyncio.get_running_loop().call_later(self._queue_s, self._forget)

    def arrive(self, n_bytes: int) -> None:
        """The body is there: from now on it waits for the server."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arrived = time.monotonic()
        self.deadline = self._arrived + self._queue_s
        self._n_bytes = n_bytes
        if n_bytes > SMALL_BYTES and not self._seconds:
            self._wait_for(n_bytes)

    def spend(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; the deadline is of waiting, so that it moves by what the work takes.

        Raises
        ------
        Refusal : 503 after the deadline.
        """
        began = time.monotonic()
        if began > self.deadline:
            raise busy(f"waited {self._queue_s:g} s for a turn; ask again a little later")
        try:
            return work()
        finally:
            self.deadline += time.monotonic() - began

    def finish(self) -> None:
        """Parsed, and its first rows are predicted: nobody waits for it any more."""
        if self._seconds:
            self._forget()
            self._admission.measure(self._kind, self._n_bytes, self._arrived)

    def leave(self) -> None:
        """Give everything back, once the thread is done with it."""
        if self._timer is not None:
            self._timer.cancel()
        if self.work is None or self.work.done():
            self._release()
            return
        loop = asyncio.get_running_loop()
        self.work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))

    def _wait_for(self, n_bytes: int) -> None:
        self._seconds = self._admission.seconds(self._kind, n_bytes)
        self._admission.wait_s += self._seconds

    def _forget(self) -> None:
        admission = self._admission
        # Sums of floats do not come back to zero by themselves, and zero is what idle means.
        admission.wait_s = left if (left := admission.wait_s - self._seconds) > 1e-9 else 0.0
        self._seconds = 0.0

    def _release(self) -> None:
        self._forget()
        self._admission.n_bytes -= self._n_held
        self._n_held = 0
        # It has what was parsed, of Arrow the body itself, and the answer may be read slowly.
        self.work = None
