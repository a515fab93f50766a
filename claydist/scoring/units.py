"""Units of work and what identifies them: pure functions of the inventory, the model and the spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from claydist.dataset.footers import FileEntry, Inventory
from claydist.scoring.dates import DateRows, DateRule, Day, folder_of
from claydist.sketch import Sketch
from claydist.spec import ScoreSpec

ROWS_PER_UNIT = 1_000_000
_SEPARATOR = "~"  # in names of staged files; it is in no date, digest, unit or run


@dataclass(frozen=True)
class Unit:
    """A run of row groups of one file, and the rows of one date in it.

    Attributes
    ----------
    unit_id : place among the date's units, then a hash of file and row groups: the same for the same inventory, and
        sorted by it the units are in the order of the input.
    file : number of the file in the inventory.
    run : number of the run of row groups in the file.
    row_groups : those that hold rows of the date.
    n_rows : rows of the date in them, before `where`.
    """

    unit_id: str
    file: int
    run: int
    row_groups: tuple[int, ...]
    n_rows: int


@dataclass(frozen=True)
class State:
    """What a published date depends on; each a SHA-256 as hexadecimal text, but for the reference."""

    model: str
    inventory: str
    spec: str

    @property
    def digest(self) -> str:
        """SHA-256 of the three."""
        return _digest([self.model, self.inventory, self.spec])

    def changes(self, published: Mapping[str, Any]) -> list[str]:
        """Which of model, inventory and spec are another than they were when a date was published."""
        return [name for name in ("model", "inventory", "spec") if published.get(name) != getattr(self, name)]

    def to_json(self) -> dict[str, str]:
        """The three digests by name."""
        return {"model": self.model, "inventory": self.inventory, "spec": self.spec}


@dataclass(frozen=True)
class Partition:
    """One date (or the whole of an undated input): its folder, its units and its state."""

    day: Day
    folder: str
    units: tuple[Unit, ...]
    state: State

    @property
    def n_rows(self) -> int:
        """Rows of the date in the input, before `where`."""
        return sum(unit.n_rows for unit in self.units)

    def name(self, unit: str, run: str) -> str:
        """What a unit's file is called in staging; it does not end in `.parquet`, so that no glob finds it."""
        return f"{self.prefix}{unit}{_SEPARATOR}{run}.unit"

    def quarantine_name(self, unit: str, run: str) -> str:
        """What a unit's quarantined rows are called in staging."""
        return f"{self.prefix}{unit}{_SEPARATOR}{run}.quarantine"

    @property
    def prefix(self) -> str:
        """How names of this state's files in staging begin."""
        return f"{self.folder}{_SEPARATOR}{self.state.digest[:12]}{_SEPARATOR}"

    @property
    def any_prefix(self) -> str:
        """How names of files of any state of this date begin."""
        return f"{self.folder}{_SEPARATOR}"


@dataclass(frozen=True)
class UnitStats:
    """Mergeable account of scored rows: read = left out + quarantined + written.

    Attributes
    ----------
    left_out : rows where `where` is not true.
    quarantined : rows by reason.
    n_null : written rows whose score is NaN.
    unseen : categories not seen in training, by feature.
    scores : of `Target.score`.
    """

    n_read: int = 0
    left_out: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    n_written: int = 0
    n_null: int = 0
    unseen: Mapping[str, int] = field(default_factory=dict)
    scores: Sketch = field(default_factory=Sketch)

    @property
    def n_quarantined(self) -> int:
        """Number of rows in quarantine."""
        return sum(self.quarantined.values())

    def __add__(self, other: UnitStats) -> UnitStats:
        return UnitStats(
            self.n_read + other.n_read,
            self.left_out + other.left_out,
            _add(self.quarantined, other.quarantined),
            self.n_written + other.n_written,
            self.n_null + other.n_null,
            _add(self.unseen, other.unseen),
            self.scores + other.scores,
        )

    def to_json(self) -> dict[str, Any]:
        """The account as a JSON-able mapping."""
        return {
            "read": self.n_read, "left_out": self.left_out, "quarantined": dict(self.quarantined),
            "written": self.n_written, "null": self.n_null, "unseen": dict(self.unseen),
            "scores": self.scores.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> UnitStats:
        """The account that `to_json` gave."""
        return cls(
            tree["read"], tree["left_out"], tree["quarantined"], tree["written"], tree["null"], tree["unseen"],
            Sketch.from_json(tree["scores"]),
        )  # fmt: skip


def plan_partition(
    inventory: Inventory, rule: DateRule | None, day: Day, rows: Sequence[DateRows], model: str, spec: str
) -> Partition:
    """The units of one date.

    Parameters
    ----------
    rows : where the date's rows are, by `find_dates`.
    model, spec : digests.
    """
    units: list[Unit] = []
    for found in rows:
        entry = inventory.files[found.file]
        runs = runs_of(entry.row_groups)
        in_run: dict[int, list[tuple[int, int]]] = {}
        for group, n_rows in found.row_groups:
            in_run.setdefault(runs[group], []).append((group, n_rows))
        for run, groups in in_run.items():
            numbers = tuple(group for group, _ in groups)
            unit_id = f"{len(units):05}-{_digest([entry.path, numbers])[:8]}"
            units.append(Unit(unit_id, found.file, run, numbers, sum(n for _, n in groups)))
    files = _fingerprint(inventory.files[found.file] for found in rows)
    return Partition(day, folder_of(rule, day), tuple(units), State(model, files, spec))


def runs_of(row_groups: Sequence[int], most: int = ROWS_PER_UNIT) -> list[int]:
    """Number of the run that each row group belongs to: consecutive ones of `most` rows together, or a larger one."""
    runs, number, n_rows = [], 0, 0
    for rows in row_groups:
        if n_rows and n_rows + rows > most:
            number, n_rows = number + 1, 0
        n_rows += rows
        runs.append(number)
    return runs


def spec_part(spec: ScoreSpec) -> str:
    """SHA-256 of what in a spec decides on the scores, as hexadecimal text; gates and limits do not."""
    tree = spec.model_dump(mode="json")
    return _digest({name: tree[name] for name in ("date", "key", "where", "format", "types")})


def inputs_digest(partitions: Iterable[Partition]) -> str:
    """SHA-256 of the input of all these dates, as hexadecimal text."""
    return _digest([[partition.folder, partition.state.inventory] for partition in partitions])


def _fingerprint(files: Iterable[FileEntry]) -> str:
    return _digest([[f.path, f.size, f.stamp, f.row_groups, f.keys] for f in files])


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted({*a, *b})}
