"""Whether a process that wrote its name down still runs: here by its start, elsewhere by a lease that it renews."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from claydist.errors import Absent, StorageError
from claydist.storage import Store

LEASE_S = 60.0
RENEW_S = 15.0


def here() -> str:
    """Name of the host with its boot and pid namespace, in which a pid is one process."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()}/{boot}/{namespace}"


def started(pid: int) -> str | None:
    """When the process began, in the kernel's clock ticks; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else fields[19]


def my_start() -> str:
    """When this process began; "" where the system does not tell."""
    return started(os.getpid()) or ""


@dataclass
class Renewed:
    """A file that says until when its writer lives, renewed by a thread for the length of a block, then removed."""

    place: Store
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    def __enter__(self) -> Renewed:
        self.renew()
        self._thread = threading.Thread(target=self._keep, name="claydist-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StorageError):  # it ends by itself
            self.place.remove()

    def renew(self) -> None:
        """Live for LEASE_S more."""
        self.place.write(json.dumps({"until": time.time() + LEASE_S}).encode())

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            with suppress(StorageError):  # of a moment, perhaps
                self.renew()


def lease_end(place: Store) -> float | None:
    """Until when the writer of a `Renewed` file lives, in seconds since the epoch; None when there is no such file."""
    try:
        return float(place.read_json()["until"])
    except Absent:
        return None
