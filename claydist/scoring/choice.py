"""What is asked of a scoring run, and what becomes of each date."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from claydist.dataset.footers import Inventory
from claydist.errors import ClaydistError, Locked, SpecError
from claydist.scoring.dates import DateRows, Day, parse_day
from claydist.scoring.publish import Current
from claydist.scoring.staging import Staged
from claydist.scoring.units import Partition
from claydist.storage import Store

Status = Literal["published", "already", "stale", "empty", "failed", "locked"]


@dataclass(frozen=True)
class Choice:
    """Which dates are asked for, and what becomes of those that are published.

    Parameters
    ----------
    date : this one; or all from `start` to `stop`, both included; or all of the input.
    replace : score published dates anew; `replace_stale` only those whose model, input or spec have changed.
    wait : for a lock that another run holds, in place of giving the date up.
    """

    date: dt.date | None = None
    start: dt.date | None = None
    stop: dt.date | None = None
    replace: bool = False
    replace_stale: bool = False
    wait: bool = False

    @classmethod
    def of(
        cls, date: str | dt.date | None, start: str | dt.date | None, stop: str | dt.date | None,
        replace: bool = False, replace_stale: bool = False, wait: bool = False,
    ) -> Choice:  # fmt: skip
        """The choice of a command's arguments.

        Raises
        ------
        SpecError : for a date that is none, a range that ends before it begins, or a date and a range.
        """
        given = {"--date": date, "--from": start, "--to": stop}
        days = {name: parse_day(value) for name, value in given.items() if value is not None}
        problems = [
            f"{name}: expected a date such as 2026-11-21, found {str(given[name])!r}"
            for name, day in days.items() if day is None
        ]  # fmt: skip
        if "--date" in days and len(days) > 1:
            problems.append("--date and --from or --to exclude each other; give one date, or a range")
        first, last = days.get("--from"), days.get("--to")
        if first and last and last < first:
            problems.append(f"--to {last} is before --from {first}")
        if problems:
            raise SpecError("the dates asked for are wrong", problems)
        return cls(days.get("--date"), first, last, replace, replace_stale, wait)

    @property
    def wanted(self) -> set[dt.date] | None:
        """The dates to look for in the input; None when they are not known beforehand."""
        if self.date:
            return {self.date}
        if self.start and self.stop:
            first, last = self.start.toordinal(), self.stop.toordinal()
            return {dt.date.fromordinal(n) for n in range(first, last + 1)}
        return None

    def asks_for(self, day: dt.date) -> bool:
        """True when a date is one of those asked for."""
        if self.date:
            return day == self.date
        return (self.start or day) <= day <= (self.stop or day)

    def days(self, found: Iterable[Day]) -> list[Day]:
        """The dates to speak of, in order: those known beforehand, found or not; else those found.

        An open range has no gaps: one date such as 9999-12-31 would make millions of them.
        """
        return [*found] if self.wanted is None else [*sorted(self.wanted)]

    def describe(self) -> str:
        """The dates asked for, to follow `no row`; empty when all are."""
        if self.date:
            return f" of {self.date}"
        return (f" from {self.start} on" if self.start else "") + (f" up to {self.stop}" if self.stop else "")


@dataclass
class DateRun:
    """One date on its way: what is known of it so far.

    Attributes
    ----------
    folder : in which it is published.
    inventory, rows : of its files, where they have rows of it.
    problem : why it could not be scored, if it has to be.
    """

    day: dt.date | None
    folder: str
    partition: Partition | None = None
    inventory: Inventory | None = None
    rows: Sequence[DateRows] = ()
    problem: ClaydistError | None = None
    status: Status | None = None
    reason: str = ""
    current: Current = field(default_factory=lambda: Current(None))
    run: str = ""
    staged: dict[str, Staged] = field(default_factory=dict)
    error: ClaydistError | None = None
    n_rows: int = 0
    n_quarantined: int = 0
    report: str | None = None

    @property
    def planned(self) -> Partition:
        """The partition of a date that has input."""
        assert self.partition is not None, f"{self.day} has no input"
        return self.partition

    @property
    def files(self) -> Inventory:
        """The inventory of a date that has input."""
        assert self.inventory is not None, f"{self.day} has no input"
        return self.inventory

    @property
    def is_complete(self) -> bool:
        """True when every unit is staged."""
        return self.partition is not None and len(self.staged) == len(self.partition.units)

    def ended(self, status: Status, reason: str = "", manifest: Mapping[str, Any] | None = None) -> None:
        """Set what became of the date."""
        self.status, self.reason, self.error = status, reason, None
        if manifest is not None:
            self.n_rows, self.n_quarantined = manifest["rows"], manifest["quarantined"]

    def withdrawn(self, reason: str) -> bool:
        """True where a date that has no row to score is published, which then is what became of it."""
        if self.current.manifest is None:
            return False
        said = "the published rows stay, and are read until they are replaced or their folder is removed"
        self.ended("stale", f"{reason}; {said}", self.current.manifest)
        return True

    def failed(self, error: ClaydistError) -> None:
        """Set why the date cannot be published."""
        self.ended("locked" if isinstance(error, Locked) else "failed", str(error))
        self.error = error

    def to_json(self, output: Store) -> dict[str, Any]:
        """The date as the command's JSON has it."""
        is_there = self.status in ("published", "already", "stale")
        tree = {
            "date": self.day.isoformat() if self.day else None, "status": self.status, "rows": self.n_rows,
            "quarantined": self.n_quarantined,
            "uri": output.join(self.folder).url if is_there else None,
        }  # fmt: skip
        more = {"reason": self.reason, "report": self.report}
        return {**tree, **{name: value for name, value in more.items() if value}}


@dataclass(frozen=True)
class ScoreSummary:
    """What a scoring run came to; `summary` is the command's JSON."""

    summary: Mapping[str, Any]
    exit_code: int

    def describe(self) -> str:
        """The summary as lines for a person: dates that need one alone, the others counted."""
        s = self.summary
        lines = []
        for status in ("published", "already", "empty", "stale", "locked", "failed"):
            dates = [d for d in s["dates"] if d["status"] == status]
            if len(dates) > 5 and status in ("published", "already", "empty"):
                rows = sum(d["rows"] for d in dates)
                lines.append(f"{status:9} {len(dates)} dates, {dates[0]['date']} to {dates[-1]['date']}, {rows:,} rows")
            else:
                for d in dates:
                    said = d.get("reason") or d["uri"] or ""
                    lines.append(f"{status:9} {d['date'] or 'all'}  {d['rows']:,} rows  {said}".rstrip())
        lines.append(f"{s['model']}:{s['version']}  {s['rows_per_s']:,.0f} rows/s  {s['seconds']:.1f} s")
        return "\n".join(lines)


def decide(
    manifest: Mapping[str, Any] | None, partition: Partition, choice: Choice
) -> tuple[Literal["score", "already", "stale"], str]:
    """What to do with a date, and why; pure.

    Parameters
    ----------
    manifest : what is published of it; None when nothing is.
    """
    if manifest is None or choice.replace:
        return "score", ""
    changes = partition.state.changes(manifest["state"])
    if not changes:
        return "already", ""
    said = f"{' and '.join(changes)} changed since it was published at {manifest.get('published_at')}"
    return ("score", said) if choice.replace_stale else ("stale", f"{said}; --replace-stale scores it anew")


def count_statuses(dates: Sequence[DateRun]) -> dict[str, int]:
    """Number of dates by status."""
    found: dict[str, int] = {}
    for one in dates:
        found[str(one.status)] = found.get(str(one.status), 0) + 1
    return found
