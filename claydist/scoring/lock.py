"""One lock for each output and date, held by a run whose lease is renewed while it lives.

```
_locks/<run>.lease           until when the run holds its locks; replaced while it runs, removed at its end
_locks/<folder>~000003.json  who took the lock; created exclusively and never changed; the highest number holds it
```
A lock is free when its owner's lease is absent or over, or when host, pid and start time show that its process is gone.
The next owner takes the next number, which two cannot; the highest number is never removed, so that a number that
somebody has seen free cannot be taken a second time. A lease that ends too early (a stopped process, clocks apart)
costs work and nothing else: the commit compares and sets.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from claydist import alive
from claydist.errors import Absent, AlreadyExists, StorageError
from claydist.storage import Store

FOLDER = "_locks"


@dataclass(frozen=True)
class Owner:
    """A process: its run, its host (with boot and pid namespace, in which a pid is one process), and when it began."""

    run: str
    host: str
    pid: int
    started: str
    since: str = ""

    @classmethod
    def me(cls, run: str) -> Owner:
        """The process that asks."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(run, alive.here(), os.getpid(), alive.my_start(), since)

    def describe(self) -> str:
        """The owner as a person reads it."""
        return f"run {self.run}, process {self.pid} on {self.host.split('/')[0]}, since {self.since}"


def judge(owner: Owner, until: float | None, here: str, started: str | None, now: float) -> Literal["held", "free"]:
    """Whether the owner still holds its locks; pure.

    Parameters
    ----------
    until : end of its lease in seconds since the epoch; None when there is no lease.
    here : the host of this process.
    started : when a process of the owner's pid began on this host; None when there is none, or it is another host.
    now : seconds since the epoch.
    """
    if until is None or until <= now:
        return "free"
    return "free" if owner.host == here and owner.started != started else "held"


@dataclass
class Lease:
    """The lease of one run for the length of a block, renewed by a thread; all its locks end with it."""

    output: Store
    owner: Owner

    def __enter__(self) -> Lease:
        self._renewed = alive.Renewed(self._file(self.owner.run))
        self._renewed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._renewed.__exit__(*error)

    def _file(self, run: str) -> Store:
        return self.output.join(FOLDER, f"{run}.lease")

    def try_lock(self, folder: str) -> Owner | None:
        """None when the lock is now held by this run; else who holds it.

        Raises
        ------
        StorageError : when a file of the lock cannot be read.
        """
        while True:
            numbers = self._numbers(folder)
            if numbers:
                holder = self._read(folder, numbers[-1])
                if holder is None:
                    continue  # removed since: there is a higher number
                if self._judge(holder) == "held":
                    return None if holder.run == self.owner.run else holder
            mine = numbers[-1] + 1 if numbers else 1
            try:
                self._place(folder, mine).create(json.dumps(asdict(self.owner)).encode())
            except AlreadyExists:
                continue  # somebody took this number; look who
            # Since the look others may have taken this number and the next, and removed this one again.
            if self._numbers(folder)[-1] != mine:
                self._remove(folder, mine)
                continue
            for old in numbers:
                self._remove(folder, old)
            return None

    def _remove(self, folder: str, number: int) -> None:
        with suppress(StorageError):
            self._place(folder, number).remove()

    def _judge(self, holder: Owner) -> Literal["held", "free"]:
        here = alive.here()
        started = alive.started(holder.pid) if holder.host == here else None
        lease = self._file(holder.run)
        try:
            return judge(holder, alive.lease_end(lease), here, started, time.time())
        except (KeyError, TypeError, ValueError):
            raise _damaged(lease) from None

    def _numbers(self, folder: str) -> list[int]:
        begin, end = f"{folder}~", ".json"
        names = (name for name in self.output.join(FOLDER).list() if name.startswith(begin) and name.endswith(end))
        return sorted(int(text) for name in names if (text := name[len(begin) : -len(end)]).isdigit())

    def _read(self, folder: str, number: int) -> Owner | None:
        place = self._place(folder, number)
        tree = self._tree(place)
        try:
            return None if tree is None else Owner(**tree)
        except TypeError:
            raise _damaged(place) from None

    def _place(self, folder: str, number: int) -> Store:
        return self.output.join(FOLDER, f"{folder}~{number:06}.json")

    @staticmethod
    def _tree(place: Store) -> Mapping[str, Any] | None:
        """What the file says; None when it is gone, as it may be at any moment."""
        try:
            tree: Mapping[str, Any] = place.read_json()
        except Absent:
            return None
        return tree


def _damaged(place: Store) -> StorageError:
    return StorageError(f"{place} is damaged: expected a lock's owner or lease; remove it when no run is at work there")
