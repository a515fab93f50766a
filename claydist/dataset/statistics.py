"""One distributed pass over the input: rows by part, the label's values, and the profile of the training columns.

A task sums a run of row groups that is a fixed function of the inventory, and the driver adds the tasks' sums in the
order of the input, so that mean and variance have the same bits on one node and on a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from claydist import cluster
from claydist.arrays import beyond_nanoseconds, nanoseconds, native_values, text_values, whole_seconds
from claydist.dataset.footers import Inventory
from claydist.dataset.reader import Selection, read_parts
from claydist.dataset.split import SplitPlan, hash_values
from claydist.display import Display, RowCount
from claydist.errors import DataError
from claydist.features import is_categorical
from claydist.profile import (
    ColumnProfile,
    ColumnSums,
    capped,
    category_sums,
    check_offsets,
    check_weights,
    infinite,
    label_sums,
    numeric_sums,
    time_sums,
)  # fmt: skip
from claydist.schema import NUMERIC, Column, Roles, type_of
from claydist.spec import DataSpec

PARTS = ("train", "valid", "test")
ROWS_PER_TASK = 1_000_000
MAX_DISTINCT = 1_000_000
FILES_PER_TASK = 64
Task = tuple[tuple[int, tuple[int, ...]], ...]
"""The work of one task: row groups by file."""
Groups = dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]]
_CALENDAR = {"hour": pc.hour, "dayofweek": pc.day_of_week, "day": pc.day, "month": pc.month}


@dataclass(frozen=True)
class Part:
    """The rows of one part: where they are, and how many of each row group belong to it.

    Attributes
    ----------
    counts : selected rows, by file and row group.
    groups : of a ranking, by file and row group: hashes (n,) uint64 of the groups there, and rows (n,) of each.
    """

    inventory: Inventory
    selection: Selection
    counts: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...] | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows in the part."""
        return sum(map(sum, self.counts))


@dataclass(frozen=True)
class PassSums:
    """Mergeable sums of one pass; `a + b` is the sums over both, a's rows first.

    Attributes
    ----------
    counts : {(file, row group): (train, valid, test) rows}.
    labels : sums of the label over all parts, by its own values; of numbers with the least and the greatest.
    label_numbers : weighted sums of a numeric label over the training rows; of being above, with `label.above`.
    label_weights : weight of the training rows by label value.
    columns : sums of the feature columns over the training rows.
    groups : of a ranking, {(file, row group, part): (distinct group hashes, rows of each)}.
    weights : of the rows of train, valid and test; their number where there is no weight column.
    held_out : under `unseen: error`, {(part, column): categories of its rows}, but for train.
    """

    counts: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    labels: ColumnSums = field(default_factory=ColumnSums)
    label_numbers: ColumnSums = field(default_factory=ColumnSums)
    label_weights: dict[Any, float] = field(default_factory=dict)
    columns: dict[str, ColumnSums] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)
    weights: tuple[float, ...] = (0.0, 0.0, 0.0)
    held_out: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)

    def __add__(self, other: PassSums) -> PassSums:
        counts = dict(self.counts)
        for key, rows in other.counts.items():
            counts[key] = tuple(map(sum, zip(counts.get(key, (0, 0, 0)), rows, strict=True)))  # type: ignore[assignment]
        weights = dict(self.label_weights)
        for value, weight in other.label_weights.items():
            weights[value] = weights.get(value, 0.0) + weight
        columns = {
            name: self.columns.get(name, ColumnSums()) + other.columns.get(name, ColumnSums())
            for name in {**self.columns, **other.columns}
        }
        groups = dict(self.groups)
        for place, found in other.groups.items():
            groups[place] = _merge_groups(groups[place], found) if place in groups else found
        held = {
            key: self.held_out.get(key, frozenset()) | other.held_out.get(key, frozenset())
            for key in {**self.held_out, **other.held_out}
        }
        labels, numbers = capped(self.labels + other.labels), self.label_numbers + other.label_numbers
        by_part = tuple(map(sum, zip(self.weights, other.weights, strict=True)))
        return PassSums(counts, labels, numbers, weights, columns, groups, by_part, held)

    def profiles(self) -> dict[str, ColumnProfile]:
        """Profiles of the feature columns over the training rows."""
        return {name: sums.profile() for name, sums in self.columns.items()}


@dataclass(frozen=True)
class PassPlan:
    """What every task of a pass needs; sent to the cluster once.

    Attributes
    ----------
    features : columns to profile; none for an input that is only counted.
    only : the part that every row belongs to, of an input that is not split (`valid.path`, `test.path`).
    cache_dir : where remote bytes are kept for later passes.
    origins : of `first_times`, by column.
    """

    inventory: Inventory
    data: DataSpec
    roles: Roles
    features: tuple[Column, ...] = ()
    split: SplitPlan | None = None
    only: str | None = None
    cache_dir: str | None = None
    origins: Mapping[str, float] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Columns to read."""
        roles = self.roles
        single = filter(None, (roles.label, roles.weight, roles.offset, roles.group))
        return list(dict.fromkeys([*(c.name for c in self.features), *single]))

    @property
    def rows(self) -> list[Sequence[int]]:
        """Rows, by file and row group."""
        return [entry.row_groups for entry in self.inventory.files]


class Run(Protocol):
    """Maps a function over tasks, results in order: `cluster.run_tasks`, `run_and_show`, or `run_here`."""

    def __call__(self, function: Callable[..., Any], items: Sequence[Any], shared: Any) -> Sequence[Any]:
        """Results of `function(item, shared)`."""
        ...


def run_and_show(display: Display, rows: Sequence[Sequence[int]], noun: str = "tasks") -> Run:
    """`cluster.run_tasks` for tasks of `plan_tasks`, which also shows how far they have come.

    Parameters
    ----------
    rows : what the tasks were planned from.
    noun : what the tasks are called, in the plural.
    """

    def run(function: Callable[..., Any], items: Sequence[Task], shared: Any) -> list[Any]:
        count = RowCount(display, sum(map(sum, rows)), len(items), noun)

        def done(index: int, _: Any) -> None:
            count.add(sum(rows[file][group] for file, groups in items[index] for group in groups))

        return cluster.run_tasks(function, items, shared, on_done=done)

    return run


def run_here(function: Callable[..., Any], items: Sequence[Any], shared: Any) -> list[Any]:
    """Results of the function over items, in this process."""
    return [function(item, shared) for item in items]


def first_times(plan: PassPlan) -> dict[str, float]:
    """Seconds since the epoch of the first row that counts, by date or timestamp; the origin of the sketches of times.

    Every task must have the same one before the first row is summed, and the evaluation has it too.
    """
    names = [c.name for c in plan.features if c.type in ("date", "timestamp")]
    for file, entry in enumerate(plan.inventory.files) if names else ():
        groups = range(len(entry.row_groups))
        rows = read_parts(plan.inventory, file, groups, names, plan.data.where, cache_dir=plan.cache_dir)
        for _, _, table in rows:
            found = {name: whole_seconds(table.column(name)).drop_null() for name in names}
            return {name: float(seconds[0].as_py()) for name, seconds in found.items() if len(seconds)}
    return {}


def summarise(plan: PassPlan, run: Run) -> PassSums:
    """Sums over the whole input.

    Raises
    ------
    DataError : null labels, wrong weights or offsets, infinite values; with column and number.
    """
    result = PassSums()
    for sums in run(sum_task, plan_tasks(plan.rows), plan):
        result = result + sums
        _check_distinct(result)
    _check(result, plan)
    return result


def part_of(sums: PassSums, plan: PassPlan, name: str) -> Part:
    """One part of an input that was summed."""
    at = PARTS.index(name)
    files = plan.inventory.files
    keys = [[(file, group) for group in range(len(entry.row_groups))] for file, entry in enumerate(files)]
    counts = tuple(tuple(sums.counts.get(key, (0, 0, 0))[at] for key in row) for row in keys)
    groups = None
    if plan.roles.group:
        nothing = (np.empty(0, np.uint64), np.empty(0, np.int64))
        groups = tuple(tuple(sums.groups.get((*key, at), nothing) for key in row) for row in keys)
    return Part(plan.inventory, Selection(plan.data.where, plan.split, name if plan.split else None), counts, groups)


def plan_tasks(row_groups: Sequence[Sequence[int]]) -> list[Task]:
    """The input cut into tasks of about ROWS_PER_TASK rows and at most FILES_PER_TASK files; never through a row group.

    Parameters
    ----------
    row_groups : rows, by file and row group; row groups without rows are left out.
    """
    tasks: list[dict[int, list[int]]] = [{}]
    n_rows = 0
    for file, counts in enumerate(row_groups):
        for group, rows in enumerate(counts):
            if not rows:
                continue
            full = n_rows + rows > ROWS_PER_TASK or (file not in tasks[-1] and len(tasks[-1]) >= FILES_PER_TASK)
            if tasks[-1] and full:
                tasks.append({})
                n_rows = 0
            tasks[-1].setdefault(file, []).append(group)
            n_rows += rows
    return [tuple((file, tuple(groups)) for file, groups in task.items()) for task in tasks if task]


def sum_task(task: Task, plan: PassPlan) -> PassSums:
    """Sums over the row groups of one task."""
    result = PassSums()
    for file, row_groups in task:
        where = plan.inventory.files[file].url
        for group, parts, table in read_parts(
            plan.inventory, file, row_groups, plan.columns, plan.data.where, plan.split, cache_dir=plan.cache_dir
        ):
            given = np.full(table.num_rows, PARTS.index(plan.only), np.int8) if plan.only else parts
            result = result + _batch_sums(plan, (file, group), given, table, where)
            _check_distinct(result)
    return result


def _batch_sums(plan: PassPlan, key: tuple[int, int], parts: np.ndarray, table: pa.Table, where: str) -> PassSums:
    rows = tuple(np.bincount(parts, minlength=3).tolist())
    roles = plan.roles
    _check_times(plan, table, where)
    groups: Groups = {}
    w = None
    if roles.weight:
        w = native_values(table.column(roles.weight)).astype(np.float64)
        check_weights(w, roles.weight, where)
    weights = tuple(map(float, np.bincount(parts, w, minlength=3)))
    if roles.offset:
        check_offsets(table.column(roles.offset), roles.offset, where)
    if roles.group:
        if n_null := table.column(roles.group).null_count:
            raise DataError(f"group column {roles.group!r} is null in {n_null} rows of {where}; a row needs its query")
        hashes = hash_values(table.column(roles.group))
        for part in np.unique(parts).tolist():
            groups[(*key, part)] = np.unique(hashes[parts == part], return_counts=True)
    held: dict[tuple[str, str], frozenset[str]] = {}
    for at in (1, 2):
        if rows[at]:
            apart = table if rows[at] == len(parts) else table.filter(pa.array(parts == at))
            _check_held_out(plan, apart, where)
            held |= {(PARTS[at], name): found for name, found in _held_categories(plan, apart).items()}
    counted = PassSums(
        {key: rows}, _label_sums(table.column(roles.label)), groups=groups, weights=weights, held_out=held
    )
    if not plan.features or not rows[0]:
        return counted
    train = table if rows[0] == len(parts) else table.filter(pa.array(parts == 0))
    return counted + _train_sums(plan, train)


def _check_times(plan: PassPlan, table: pa.Table, where: str) -> None:
    """Pass when nanoseconds hold every time that becomes seconds; held-out rows are encoded only at the end."""
    for column in plan.features:
        if column.type not in ("timestamp", "date") or column.name in plan.data.calendar:
            continue
        if n_bad := int(beyond_nanoseconds(table.column(column.name)).sum()):
            raise DataError(
                f"column {column.name!r} has {n_bad} times in {where} outside the years 1677 to 2262 that nanoseconds "
                f"can hold: make them null, leave the rows out with data.where, or take parts (data.calendar)"
            )


def _check_distinct(sums: PassSums) -> None:
    """Pass while every category fits into memory; ids do not, and teach nothing."""
    for name, column in sums.columns.items():
        if column.counts is not None and len(column.counts) > MAX_DISTINCT:
            raise DataError(
                f"column {name!r} is a category and has more than {MAX_DISTINCT:,} distinct values, as ids have; "
                f"drop it (data.drop), or group its values"
            )


def _check_held_out(plan: PassPlan, table: pa.Table, where: str) -> None:
    """Pass when held-out rows can be encoded: what training would only find out on the workers, or at the end."""
    for column in plan.features:
        if column.type in NUMERIC and not is_categorical(column, plan.data):
            n_bad = int(infinite(native_values(table.column(column.name))).sum())
            if n_bad:
                raise DataError(
                    f"column {column.name!r} has {n_bad} infinite values in held-out rows of {where}; "
                    f"expected finite numbers or nulls"
                )


def _held_categories(plan: PassPlan, table: pa.Table) -> dict[str, frozenset[str]]:
    """Categories by column, where one that training has not seen is an error; else nobody asks."""
    if plan.data.unseen != "error":
        return {}
    columns = [column.name for column in plan.features if is_categorical(column, plan.data)]
    return {name: frozenset(category_sums(text_values(table.column(name), name)).counts or ()) for name in columns}


def _train_sums(plan: PassPlan, table: pa.Table) -> PassSums:
    w = None
    if plan.roles.weight:
        w = native_values(table.column(plan.roles.weight)).astype(np.float64)
    label = table.column(plan.roles.label)
    columns = {
        c.name: column_sums(c, table.column(c.name), w, plan.data, plan.origins.get(c.name, 0.0)) for c in plan.features
    }
    numbers = _label_numbers(label, w, plan.data.label.above)
    return PassSums(label_numbers=numbers, label_weights=_label_weights(label, w), columns=columns)


def column_sums(
    column: Column, values: pa.ChunkedArray, w: np.ndarray | None, data: DataSpec, origin: float = 0.0
) -> ColumnSums:
    """Sums of one feature column, by what the spec says it is; weighted with w (n_rows,) where given.

    Parameters
    ----------
    origin : of a date or timestamp, as `time_sums` takes it.
    """
    if is_categorical(column, data):
        return category_sums(text_values(values, column.name))
    if column.type in ("timestamp", "date"):
        cast = values if column.type == "timestamp" else values.cast(pa.timestamp("s"))
        parts: dict[str, np.ndarray] = {
            p: native_values(_CALENDAR[p](cast)) for p in data.calendar.get(column.name, ())
        }
        # Parts alone are computed of a column with a calendar, and they have no years that are too far away.
        if parts:
            return time_sums(whole_seconds(values), w, parts, origin, per_s=1)
        return time_sums(nanoseconds(values, column.name), w, parts, origin)
    return numeric_sums(native_values(values), w)


def _label_sums(label: pa.ChunkedArray) -> ColumnSums:
    sums = label_sums(label)
    if type_of(label.type) not in NUMERIC or not len(label):
        return sums
    values = native_values(label)
    return replace(sums, minimum=float(values.min()), maximum=float(values.max()))


def _label_numbers(label: pa.ChunkedArray, w: np.ndarray | None, above: float | None) -> ColumnSums:
    if type_of(label.type) not in ("integer", "float", "decimal"):
        return ColumnSums()
    values = native_values(label).astype(np.float64)
    return numeric_sums(values if above is None else (values > above).astype(np.float64), w)


def _label_weights(label: pa.ChunkedArray, w: np.ndarray | None) -> dict[Any, float]:
    encoded = label.combine_chunks().dictionary_encode() if not pa.types.is_dictionary(label.type) else label
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    indices = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    weights = np.bincount(indices, weights=w, minlength=len(encoded.dictionary))
    if len(encoded.dictionary) > 1000:
        return {}
    return dict(zip(encoded.dictionary.to_pylist(), weights.tolist(), strict=False))


def _merge_groups(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    hashes, inverse = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    return hashes, np.bincount(inverse, weights=np.concatenate([a[1], b[1]])).astype(np.int64)


def _check(sums: PassSums, plan: PassPlan) -> None:
    roles, data = plan.roles, plan.data
    n_rows = sums.labels.n_rows
    if n_rows == 0:
        because = f": data.where {data.where!r} is true for none" if data.where else ""
        raise DataError(f"no rows are left in the input{because}")
    problems = []
    if n_null := sums.labels.n_null:
        problems.append(
            f"label column {roles.label!r} is null in {n_null} of {n_rows} rows; "
            f'leave them out with data.where: "{roles.label} is not null"'
        )
    infinite = [(roles.label, sums.labels.n_infinite), *((name, s.n_infinite) for name, s in sums.columns.items())]
    problems += [
        f"column {name!r} has {n} infinite values; expected finite numbers or nulls" for name, n in infinite if n
    ]
    if problems:
        raise DataError("the input cannot be trained on", problems)
