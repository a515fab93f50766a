"""What the input has of each date: it is listed first, and only files of dates that are asked for are opened."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claydist.dataset.footers import Inventory, declared_types, take_inventories
from claydist.dataset.listing import Found, find_files
from claydist.errors import ClaydistError, DataError
from claydist.scoring import checks
from claydist.scoring.choice import Choice
from claydist.scoring.dates import UNDATED, DateRows, DateRule, Day, find_dates, folder_of
from claydist.spec import ScoreSpec
from claydist.storage import Store, redact

Run = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
Lacking = Callable[[Iterable[Store]], str | None]


@dataclass(frozen=True)
class DateInput:
    """What the input has of one date, or of all where the spec has no dates.

    Attributes
    ----------
    inventory : of the date's files; of the whole input where paths do not say which these are; None where nothing was
        opened, or could be.
    rows : where the date's rows are.
    lacking : folder without the name that says that it is complete; None where there is none such.
    error : why the files cannot be used.
    """

    inventory: Inventory | None = None
    rows: tuple[DateRows, ...] = ()
    lacking: str | None = None
    error: ClaydistError | None = None


def find_input(
    spec: ScoreSpec, rule: DateRule | None, choice: Choice, output: Store, types: Mapping[str, str], run: Run
) -> dict[Day, DateInput]:
    """What the input has of the dates asked for, in order; dates that it has no row of are left out.

    Parameters
    ----------
    output : which must be apart from the input.
    types : declared types of Hive keys.
    run : maps a function over tasks, results in order.

    Raises
    ------
    ClaydistError : for what is wrong with all of it: no file, an overlap with the output, rows without a date; where
        paths do not give the date also what is wrong with any file.
    """
    complete: set[tuple[str, str]] = set()
    if spec.require:
        # Seen before the listing that counts: the name is written last, so it vouches for what is there from then on.
        early = _list(spec, rule, choice)
        complete = checks.find_markers((f.store for f in early.asked), rule, spec.require)
    listing = _list(spec, rule, choice)
    checks.check_apart(spec, (f.store for f in listing.files), output, _folders(listing, rule, choice))

    def lacking(stores: Iterable[Store]) -> str | None:
        return checks.missing_marker(stores, rule, complete) if spec.require else None

    declared = declared_types(listing.files, types)
    if listing.by_day is None:
        assert rule is not None, "without a rule every path says enough"
        return _find_inside(listing.files, spec, rule, choice, declared, lacking, run)
    return _find_by_path(listing.by_day, rule, declared, lacking, run)


@dataclass(frozen=True)
class _Listing:
    """All files of the input, and those of the dates asked for by date; None where paths do not give the date."""

    files: Sequence[Found]
    by_day: Mapping[Day, Sequence[Found]] | None

    @property
    def asked(self) -> list[Found]:
        """The files that may have rows of the dates asked for."""
        return list(self.files) if self.by_day is None else [f for found in self.by_day.values() for f in found]


def _list(spec: ScoreSpec, rule: DateRule | None, choice: Choice) -> _Listing:
    found = find_files(spec.input, spec.storage_options)
    if rule is None:
        return _Listing(found, {None: found})
    days = [rule.of_keys(dict(f.keys), f.store.url) for f in found]
    by_day: dict[Day, list[Found]] = {}
    for day, f in sorted(zip(days, found, strict=True), key=lambda pair: pair[0] or dt.date.min):
        if day is None:
            return _Listing(found, None)
        if choice.asks_for(day):
            by_day.setdefault(day, []).append(f)
    return _Listing(found, by_day)


def _folders(listing: _Listing, rule: DateRule | None, choice: Choice) -> set[str]:
    """Folders such as those that will be published."""
    some = choice.date or choice.start or choice.stop or dt.date.today()
    return {UNDATED, *(folder_of(rule, day) for day in listing.by_day or [some])}


def _find_by_path(
    by_day: Mapping[Day, Sequence[Found]], rule: DateRule | None, types: Mapping[str, str], lacking: Lacking, run: Run
) -> dict[Day, DateInput]:
    """Each date with an inventory of its own, so that a file that cannot be used is its date's trouble only."""
    waiting = {day: DateInput(lacking=folder) for day, f in by_day.items() if (folder := lacking(x.store for x in f))}
    opened = {day: found for day, found in by_day.items() if day not in waiting}
    checks.check_input_visible(f for found in opened.values() for f in found)
    inventories = take_inventories(list(opened.values()), types=types, run=run)
    inputs = dict(waiting)
    for day, inventory in zip(opened, inventories, strict=True):
        if isinstance(inventory, DataError):
            inputs[day] = DateInput(error=inventory)
        elif rows := find_dates(inventory, rule, {day} if day else None, run).get(day):
            inputs[day] = DateInput(inventory, rows)
    return {day: inputs[day] for day in by_day if day in inputs}


def _find_inside(
    found: Sequence[Found], spec: ScoreSpec, rule: DateRule, choice: Choice, types: Mapping[str, str],
    lacking: Lacking, run: Run,
) -> dict[Day, DateInput]:  # fmt: skip
    """Dates that are looked for in the files, all of which have to be opened."""
    checks.check_input_visible(found)
    (inventory,) = take_inventories([found], types=types, run=run)
    if isinstance(inventory, DataError):
        raise inventory
    rule.check(inventory.schema, ", ".join(map(redact, spec.input)))
    return {
        day: DateInput(inventory, rows, lacking(inventory.stores[where.file] for where in rows))
        for day, rows in find_dates(inventory, rule, choice.wanted, run).items()
        if day and choice.asks_for(day)
    }
