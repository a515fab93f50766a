"""Which rows are held out: a pure function of a row's own identity, the same on every worker and in every pass.

A row's identity is a number u in [0, 1), a seeded hash (splitmix64; Steele, Lea and Flood 2014) of either the file's
path relative to the input's root and the row's number in it, or of the values of columns (`data.key`, or `by`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.types as pat

from claydist.errors import SpecError
from claydist.expressions import Expression, parse
from claydist.schema import type_of
from claydist.spec import SplitPart, SplitSpec

TRAIN, VALID, TEST = 0, 1, 2
BY_FRACTION = 0.2
"""Share of groups held out by `by` without a fraction."""

_NULL = np.uint64(0x9E3779B97F4A7C15)
_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


@dataclass(frozen=True)
class Rule:
    """How one part is chosen: by `where`, or by start <= u < stop, with u from `columns` (none: from the row)."""

    where: Expression | None = None
    columns: tuple[str, ...] = ()
    start: float = 0.0
    stop: float = 0.0


@dataclass(frozen=True)
class SplitPlan:
    """Which rows of a table are `valid` and `test`; the rest is `train`.

    Test is decided first, valid among the rest. Where both go by the same identity (two fractions, or `by` of the
    same columns), their intervals of u lie side by side, so that `valid: 0.1, test: 0.2` are tenths of all rows.
    """

    valid: Rule | None
    test: Rule | None
    seed: int

    @classmethod
    def of(cls, split: SplitSpec, seed: int, key: tuple[str, ...] = ()) -> SplitPlan:
        """The plan of a spec; parts with a `path` of their own take no rows here.

        Parameters
        ----------
        split : the spec's part.
        seed : the spec's seed.
        key : `data.key`: the columns that identify a row; none for its place.

        Raises
        ------
        SpecError : when two parts of one identity leave no row to train on.
        """
        test = _rule(split.test, key, 0.0)
        same = test and split.valid and not test.where and test.columns == _identity(split.valid, key)
        valid = _rule(split.valid, key, test.stop if test and same else 0.0)
        if valid and valid.stop >= 1:
            raise SpecError(f"split: valid and test hold out {valid.stop:g} of all groups; their sum must be below 1")
        return cls(valid, test, seed)

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the split looks at."""
        rules = [rule for rule in (self.valid, self.test) if rule]
        return frozenset[str]().union(*(rule.where.columns if rule.where else rule.columns for rule in rules))

    def assign(self, table: pa.Table, path: str, first_row: int | np.ndarray) -> np.ndarray:
        """The part of each row: (n_rows,) int8, 0 train, 1 valid, 2 test.

        Parameters
        ----------
        table : rows of one file, with at least `columns`.
        path : of the file, relative to the input's root.
        first_row : number of the first row in the file, or (n_rows,) numbers of all rows.
        """
        parts = np.full(table.num_rows, TRAIN, np.int8)
        rows = first_row if isinstance(first_row, np.ndarray) else first_row + np.arange(table.num_rows)
        for part, rule in ((VALID, self.valid), (TEST, self.test)):
            if rule is not None:
                parts[self._chosen(rule, table, path, rows)] = part
        return parts

    def _chosen(self, rule: Rule, table: pa.Table, path: str, rows: np.ndarray) -> np.ndarray:
        if rule.where is not None:
            return rule.where.mask(table)
        seed = _mix(np.array([self.seed], np.uint64))
        if rule.columns:
            identity = np.broadcast_to(seed, table.num_rows)
            for name in rule.columns:
                identity = _mix(identity ^ hash_values(table.column(name)))
        else:
            file = np.frombuffer(hashlib.sha256(path.encode()).digest()[:8], "<u8")
            identity = _mix(_mix(seed ^ file) + rows.astype(np.uint64))
        u = (identity >> np.uint64(11)) * 2.0**-53
        return (rule.start <= u) & (u < rule.stop)


def hash_values(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A number for each value: (n_rows,) uint64, equal for equal values whatever type holds them.

    Integers, booleans and floats without a fraction count by value; dates are the timestamps of their midnights, in
    any unit; text counts by its UTF-8 bytes; a dictionary is its values; null and NaN are one value of their own.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # what stays in chunks after combining is too large for one
        return np.concatenate([hash_values(chunk) for chunk in array.chunks])
    kind = type_of(array.type)
    if pat.is_null(array.type):
        return np.full(len(array), _NULL)
    if kind in ("string", "decimal") and not pat.is_dictionary(array.type):
        array = array.dictionary_encode()
    if pat.is_dictionary(array.type):
        known = _text_hashes(array.dictionary) if kind in ("string", "decimal") else hash_values(array.dictionary)
        indices = array.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
        return np.append(known, _NULL)[indices]
    hashes = _mix(_bits(array))
    if array.null_count:
        hashes[array.is_null().to_numpy(zero_copy_only=False)] = _NULL
    if kind == "float":
        hashes[np.isnan(_floats(array))] = _NULL
    return hashes


def _text_hashes(values: pa.Array) -> np.ndarray:
    text = values.cast(pa.large_string()).to_numpy(zero_copy_only=False)
    hashes = pd.util.hash_array(text, categorize=False)
    return np.where(values.is_null().to_numpy(zero_copy_only=False), _NULL, hashes) if values.null_count else hashes


def _bits(array: pa.Array) -> np.ndarray:
    """The canonical value as (n,) uint64; anything for nulls."""
    kind = array.type
    if pat.is_boolean(kind):
        array, kind = array.cast(pa.uint8()), pa.uint8()
    if pat.is_floating(kind):
        values = _floats(array)
        whole = (values == np.trunc(values)) & (np.abs(values) < 2.0**63)
        integers = np.where(whole, values, 0).astype(np.int64).view(np.uint64)
        return np.where(whole, integers, values.view(np.uint64))
    if pat.is_unsigned_integer(kind):
        return array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64)
    if pat.is_date(kind):
        array, kind = array.cast(pa.timestamp("s")), pa.timestamp("s")
    integers = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64)
    # Wraps for years beyond 2262, the same way for every unit.
    return integers * np.uint64(_NS[kind.unit]) if pat.is_timestamp(kind) else integers


def _floats(array: pa.Array) -> np.ndarray:
    return array.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 of each number (n,) uint64: a bijection whose results look independent."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _identity(part: SplitPart, key: tuple[str, ...]) -> tuple[str, ...] | None:
    """Columns that u comes from; none for the row's place, None for a part that has no u."""
    if part.by is not None:
        return part.by
    return key if part.fraction is not None else None


def _rule(part: SplitPart | None, key: tuple[str, ...], start: float) -> Rule | None:
    if part is None or part.path is not None:
        return None
    if part.where is not None:
        return Rule(where=parse(part.where))
    share = part.fraction if part.fraction is not None else BY_FRACTION
    return Rule(columns=_identity(part, key) or (), start=start, stop=start + share)
