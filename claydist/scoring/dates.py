"""Which rows belong to which date, found without reading more than the columns that say so."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pat

from claydist.dataset.footers import Inventory
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece
from claydist.errors import ClaydistError, DataError
from claydist.schema import type_of
from claydist.spec import ScoreSpec

UNDATED = "all"
FILES_PER_SCAN = 50
SCAN_HERE_ROWS = 10_000_000
"""Date columns of so many rows in local files are read in less time than processes take to start."""

_ISO = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
_EPOCH = date(1970, 1, 1).toordinal()

Day = date | None


@dataclass(frozen=True)
class DateRule:
    """How a row gets its date: from one column or Hive key, or from those of year, month and day.

    Attributes
    ----------
    folder_key : the Hive key that dates are published under.
    columns : one name, or three.
    """

    folder_key: str
    columns: tuple[str, ...]

    @classmethod
    def of(cls, spec: ScoreSpec) -> DateRule | None:
        """The rule of a spec; None where the input is one run."""
        if spec.date is None or isinstance(spec.date, str):
            return None if spec.date is None else cls(spec.date, (spec.date,))
        return cls("dt", tuple(spec.date[part] for part in ("year", "month", "day")))

    def folder(self, day: date) -> str:
        """Name of the folder that a date is published in, e.g. `dt=2026-11-21`."""
        return f"{self.folder_key}={day.isoformat()}"

    def check(self, schema: pa.Schema, where: str) -> None:
        """Pass when the columns are there and can hold dates.

        Raises
        ------
        DataError : with every column that is absent, or of another type.
        """
        problems = []
        for name in self.columns:
            kind = type_of(schema.field(name).type) if name in schema.names else None
            possible = ("date", "string", "integer") if len(self.columns) == 1 else ("integer", "string", "float")
            if name not in schema.names:
                problems.append(f"column {name!r} is absent; columns: {', '.join(sorted(schema.names))}")
            elif kind not in possible and not pat.is_null(schema.field(name).type):
                wanted = "a date, or text such as '2026-11-21'" if len(self.columns) == 1 else "integers"
                problems.append(f"column {name!r}: expected {wanted}, found {schema.field(name).type}")
        if problems:
            raise DataError(f"{where} cannot be split by `date` as the spec says", problems)

    def of_keys(self, keys: Mapping[str, str | None], where: str) -> date | None:
        """The date that a file's path gives to all its rows; None where the path does not say all of it."""
        if not all(name in keys for name in self.columns):
            return None
        values = [keys[name] for name in self.columns]
        found = _joined(values)
        if found is None:
            raise DataError(f"expected a date in the path of {where}, found {dict(keys)}; mend it or leave it out")
        return found

    def can_hold(self, keys: Mapping[str, str | None], wanted: Collection[date] | None) -> bool:
        """False when the part of the date that a file's path says rules all the wanted dates out."""
        if wanted is None or len(self.columns) == 1:
            return True
        parts = [(i, int(keys[name] or "")) for i, name in enumerate(self.columns) if (keys.get(name) or "").isdigit()]
        return any(all((d.year, d.month, d.day)[i] == value for i, value in parts) for d in wanted)

    def of_rows(self, table: pa.Table, where: str) -> np.ndarray:
        """Days since 1970-01-01 (n_rows,) int32 of a table that has the columns.

        Raises
        ------
        DataError : for a null, or a value that is no date; with the value.
        """
        if len(self.columns) == 1 and pat.is_date(table.column(self.columns[0]).type):
            return _checked(table.column(self.columns[0]).cast(pa.date32()).cast(pa.int32()), self.columns[0], where)
        codes = [_encoded(table.column(name), name, where) for name in self.columns]
        joined = np.zeros(table.num_rows, np.int64)
        for indices, values in codes:
            joined = joined * len(values) + indices
        distinct, inverse = np.unique(joined, return_inverse=True)
        return np.array([self._day_of(int(code), codes, where) for code in distinct], np.int32)[inverse]

    def _day_of(self, code: int, codes: Sequence[tuple[np.ndarray, list[Any]]], where: str) -> int:
        values = []
        for _, known in reversed(codes):
            code, at = divmod(code, len(known))
            values.append(known[at])
        found = _joined(values[::-1])
        if found is None:
            said = dict(zip(self.columns, values[::-1], strict=True))
            raise DataError(f"expected a date such as 2026-11-21 in {where}, found {said}; mend it, or leave it out")
        return to_days(found)


def folder_of(rule: DateRule | None, day: Day) -> str:
    """Name of the folder that a date is published in, or the whole of an undated input."""
    return UNDATED if rule is None or day is None else rule.folder(day)


def to_days(day: date) -> int:
    """Days since 1970-01-01."""
    return day.toordinal() - _EPOCH


def from_days(days: int) -> date:
    """The date so many days after 1970-01-01."""
    return date.fromordinal(days + _EPOCH)


def parse_day(value: Any) -> date | None:
    """The date that text such as 2026-11-21 or 20261121 means; None when it is no date."""
    match = _ISO.fullmatch(str(value))
    if match is None:
        return None
    try:
        return date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return None


@dataclass(frozen=True)
class DateRows:
    """The rows of one date in one file.

    Attributes
    ----------
    file : number of the file in the inventory.
    row_groups : (row group, rows of the date in it), those without any left out.
    """

    file: int
    row_groups: tuple[tuple[int, int], ...]

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(rows for _, rows in self.row_groups)


@dataclass(frozen=True)
class Scan:
    """The work of one task: the dates in some files; the inventory holds only these."""

    inventory: Inventory
    rule: DateRule
    first: date | None
    last: date | None


Counts = list[list[dict[int, int]]]
Run = Callable[[Callable[[Scan], "Counts | ClaydistError"], Sequence[Scan]], Sequence["Counts | ClaydistError"]]


def find_dates(
    inventory: Inventory, rule: DateRule | None, wanted: Collection[date] | None, run: Run
) -> dict[Day, tuple[DateRows, ...]]:
    """Where the rows of each date are, dates in order; {None: everything} without a rule.

    Parameters
    ----------
    wanted : only these dates are looked for; all, where not given.
    run : maps a function over tasks, results in order.

    Raises
    ------
    DataError : a row without a date, or a value that is none; with the file.
    """
    whole = [DateRows(i, tuple((g, n) for g, n in enumerate(f.row_groups) if n)) for i, f in enumerate(inventory.files)]
    if rule is None:
        return {None: tuple(rows for rows in whole if rows.row_groups)}
    found: dict[date, list[DateRows]] = {}
    inside = []
    for number, entry in enumerate(inventory.files):
        keys = dict(entry.keys)
        day = rule.of_keys(keys, entry.url)
        if day is not None and whole[number].row_groups:
            found.setdefault(day, []).append(whole[number])
        elif day is None and entry.n_rows and rule.can_hold(keys, wanted):
            inside.append(number)
    chunks = [inside[i : i + FILES_PER_SCAN] for i in range(0, len(inside), FILES_PER_SCAN)]
    first, last = (min(wanted), max(wanted)) if wanted else (None, None)
    scans = [Scan(only_files(inventory, chunk), rule, first, last) for chunk in chunks]
    is_small = sum(scan.inventory.n_rows for scan in scans) <= SCAN_HERE_ROWS
    if is_small and all(store.is_local for scan in scans for store in scan.inventory.stores):
        results: Sequence[Counts | ClaydistError] = [scan_dates(scan) for scan in scans]
    else:
        results = run(scan_dates, scans)
    for chunk, result in zip(chunks, results, strict=True):
        if isinstance(result, ClaydistError):
            raise result
        for number, groups in zip(chunk, result, strict=True):
            by_day: dict[int, list[tuple[int, int]]] = {}
            for group, counts in enumerate(groups):
                for days, n_rows in counts.items():
                    by_day.setdefault(days, []).append((group, n_rows))
            for days, rows in by_day.items():
                found.setdefault(from_days(days), []).append(DateRows(number, tuple(rows)))
    kept = sorted(day for day in found if wanted is None or day in wanted)
    return {day: tuple(sorted(found[day], key=lambda rows: rows.file)) for day in kept}


def only_files(inventory: Inventory, numbers: Sequence[int]) -> Inventory:
    """The same inventory with some of its files: small enough to travel with every task."""
    files = [inventory.files[n] for n in numbers]
    schemas = list(dict.fromkeys(entry.schema for entry in files))
    return replace(
        inventory,
        files=tuple(replace(entry, schema=schemas.index(entry.schema)) for entry in files),
        schemas=tuple(inventory.schemas[n] for n in schemas),
        stores=tuple(inventory.stores[n] for n in numbers),
    )


def scan_dates(scan: Scan) -> Counts | ClaydistError:
    """Rows by file, row group and day, of row groups that may hold a date between the first and the last."""
    try:
        return [_scan_file(scan, number) for number in range(len(scan.inventory.files))]
    except ClaydistError as e:
        return e


def _scan_file(scan: Scan, number: int) -> list[dict[int, int]]:
    entry, rule = scan.inventory.files[number], scan.rule
    counts: list[dict[int, int]] = [{} for _ in entry.row_groups]
    limits = _limits(scan, number) if len(rule.columns) == 1 else [None] * len(counts)
    for group, n_rows in enumerate(entry.row_groups):
        known = limits[group]
        if n_rows == 0 or (known and scan.first and scan.last and (known[1] < scan.first or known[0] > scan.last)):
            continue
        if known and known[0] == known[1] and known[2]:
            counts[group] = {to_days(known[0]): n_rows}
            continue
        for table in read_pieces(scan.inventory, (Piece(number, group, 0, n_rows),), list(dict.fromkeys(rule.columns))):
            days, rows = np.unique(rule.of_rows(table, entry.url), return_counts=True)
            for day, n in zip(days.tolist(), rows.tolist(), strict=True):
                counts[group][day] = counts[group].get(day, 0) + n
    return counts


def _limits(scan: Scan, number: int) -> list[tuple[date, date, bool] | None]:
    """First and last date of each row group by its statistics, and whether no row is null; None where not known."""
    name, entry = scan.rule.columns[0], scan.inventory.files[number]
    fs, path = scan.inventory.stores[number].arrow()
    try:
        metadata = pq.read_metadata(path, filesystem=fs)
    except (pa.ArrowException, OSError):
        return [None] * len(entry.row_groups)  # the reader says what is wrong with the file
    if metadata.num_row_groups != len(entry.row_groups):
        return [None] * len(entry.row_groups)
    at = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name]
    limits: list[tuple[date, date, bool] | None] = []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(at[0]).statistics if at else None
        if statistics is None or not (statistics.has_min_max and statistics.has_null_count):
            limits.append(None)
            continue
        low, high = _as_day(statistics.min), _as_day(statistics.max)
        limits.append((low, high, statistics.null_count == 0) if low and high else None)
    return limits


def _as_day(value: Any) -> date | None:
    # Statistics of text may be cut short, and a part of a date is none; 8 digits could be a part of something longer.
    if isinstance(value, date):
        return value
    return parse_day(value) if isinstance(value, str) and len(value) == 10 else None


def _joined(values: Sequence[Any]) -> date | None:
    """The date of one value or of (year, month, day); None when they are none."""
    if len(values) == 1:
        return parse_day(values[0])
    try:
        year, month, day = (int(value) for value in values)
        return date(year, month, day)
    except (TypeError, ValueError):
        return None


def _encoded(column: pa.ChunkedArray, name: str, where: str) -> tuple[np.ndarray, list[Any]]:
    """Indices (n_rows,) and the distinct values that they mean."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = array.dictionary_decode() if pat.is_dictionary(array.type) else array
    encoded = array.dictionary_encode()
    return _checked(encoded.indices, name, where), encoded.dictionary.to_pylist()


def _checked(values: pa.ChunkedArray | pa.Array, name: str, where: str) -> np.ndarray:
    if values.null_count:
        raise DataError(
            f"column {name!r} is null in {values.null_count} rows of {where}, which then belong to no date; "
            f"mend them, or give input without them"
        )
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pc.cast(array, pa.int32()).to_numpy(zero_copy_only=False)
