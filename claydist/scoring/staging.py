"""Where the files of units wait for their date to be published: one flat folder, from which only files are removed.

A folder that disappears while somebody lists the output fails pyarrow's listing; a file that does is left out of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from claydist.errors import AlreadyExists, StorageError
from claydist.files import TEMPORARY
from claydist.scoring.units import Partition, UnitStats
from claydist.storage import Store, sha256

FOLDER = "_staging"
STATS_KEY = b"claydist.stats"
ABANDONED_S = 3600.0
"""A half-written file so old belongs to a task that was killed."""

_THREADS = 16


@dataclass(frozen=True)
class Staged:
    """One unit's file in staging.

    Attributes
    ----------
    quarantine : SHA-256 of the file of its quarantined rows; None where there are none.
    """

    unit_id: str
    stats: UnitStats
    sha256: str
    n_bytes: int
    quarantine: str | None = None


@dataclass(frozen=True)
class Staging:
    """The staging of one output."""

    output: Store

    @property
    def store(self) -> Store:
        """The folder."""
        return self.output.join(FOLDER)

    def names(self) -> list[str]:
        """Names of all that is staged."""
        return self.store.list()

    def open_run(self, partition: Partition, run: str, names: Iterable[str]) -> str:
        """The run that began this state of a date: `run` itself, or the one that a crash ended.

        Its id is in names and metadata of the units' files, so that a unit scored twice is the same file, and a file
        that a forgotten task writes after the date was published is never taken for one of a later run.
        """
        name = f"{partition.prefix}run"
        if name not in names:
            with suppress(AlreadyExists):
                self.store.join(name).create(json.dumps({"run": run, **partition.state.to_json()}).encode())
                return run
        return str(self.store.join(name).read_json()["run"])

    def find(self, partition: Partition, run: str, names: Iterable[str]) -> dict[str, Staged]:
        """The units of a date that are done, by id."""
        known = set(names)
        wanted = [u.unit_id for u in partition.units if partition.name(u.unit_id, run) in known]
        found = each(lambda unit: self._look(partition, unit, run), wanted)
        return {staged.unit_id: staged for staged in found if staged is not None}

    def _look(self, partition: Partition, unit: str, run: str) -> Staged | None:
        """A staged unit by its file; None when the file cannot be read, so that it is scored again."""
        quarantine = partition.quarantine_name(unit, run)
        try:
            data = self.store.join(partition.name(unit, run)).read()
            metadata = pq.read_metadata(pa.BufferReader(data)).metadata
            stats = UnitStats.from_json(json.loads(metadata[STATS_KEY]))
            bad = sha256(self.store.join(quarantine).read()) if stats.n_quarantined else None
        except (StorageError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None
        return Staged(unit, stats, sha256(data), len(data), bad)

    def clean(self, partition: Partition, staged: Iterable[Staged], run: str, names: Iterable[str]) -> None:
        """Remove all that is staged of a date, of whatever state.

        Parameters
        ----------
        staged, run : what this run has staged or found.
        names : what was there when it began.
        """
        mine = [name(unit.unit_id, run) for unit in staged for name in (partition.name, partition.quarantine_name)]
        before = [name for name in names if name.startswith(partition.any_prefix)]

        def remove(name: str) -> None:
            with suppress(StorageError):
                self.store.join(name).remove()

        each(remove, sorted({*mine, *before, f"{partition.prefix}run"}))

    def clean_abandoned(self) -> None:
        """Remove what killed tasks left half-written."""
        if not self.store.is_local:
            return
        for path in Path(self.store.path).glob(f".*{TEMPORARY}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


def each(function: Any, items: Sequence[Any]) -> list[Any]:
    """Results of a function that waits for storage, in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def file_facts(model: Mapping[str, Any], run: str, unit: str) -> dict[str, str]:
    """What the metadata of a unit's file says of where it comes from."""
    return {
        "claydist.model": str(model["name"]), "claydist.version": str(model["version"]),
        "claydist.digest": str(model["digest"]), "claydist.run": run, "claydist.unit": unit,
    }  # fmt: skip
