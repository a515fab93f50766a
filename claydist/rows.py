"""RowEncoder: values as JSON has them, to what a model computes with; the bits are those of `FeaturePlan.encode`.

An Arrow table costs more to make from one row than the row costs to predict, so serving encodes rows directly. A plan
has one encoder, made once; times go through the plan itself, since calendars are Arrow's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from claydist.errors import DataError
from claydist.features import Encoded, Feature, FeaturePlan
from claydist.profile import infinite
from claydist.values import (
    MISSING_CODE,
    UNSEEN_CODE,
    Parse,
    Wrong,
    parse_integer,
    parse_number,
    parser_of,
    shown,
    time_array,
)

# Absent names, and unknown ones, that one answer tells.
_MOST_TOLD = 4


class RowError(DataError):
    """A value, a name or a shape in a request's rows is wrong; `field` says where, e.g. `rows[3].carrier`."""

    def __init__(self, message: str, problems: Sequence[str] = (), field: str = "") -> None:
        super().__init__(message, problems)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.problems, self.field)


@dataclass(frozen=True)
class RowMatrix:
    """Rows ready to be joined with others and predicted.

    Attributes
    ----------
    values : (n_rows, n_features) float64, then the offset where there is one; NaN is missing, a category is its code,
        or -1.
    unseen, missing : number of categories not seen in training, and of missing values, by feature.
    """

    values: np.ndarray
    unseen: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows (mappings) and columns (lists) of plain values for a plan.

    A number is an integer or float, true and false are for boolean columns only, text is for strings, times are text
    in ISO 8601 (with `Z` or an offset where training had a zone, and without one where it had none), None is missing.

    Parameters
    ----------
    plan : the features.
    offset : the column added to the margin; None where there is none.
    """

    plan: FeaturePlan
    offset: str | None = None

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns that a row must have, in the schema's order."""
        return self.plan.schema.names

    @cached_property
    def _get(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        if len(self.names) == 1:
            only = self.names[0]
            return lambda row: (row[only],)
        return itemgetter(*self.names)

    @cached_property
    def _parsers(self) -> tuple[Parse, ...]:
        """One parser a column; a time becomes whole nanoseconds in the end, and passes as it is until then."""
        categories = {f.column: f for f in self.plan.features if f.kind == "categorical"}
        return tuple(parser_of(c, categories.get(c.name), self.plan.unseen) for c in self.plan.schema.columns)

    @cached_property
    def _layout(self) -> list[tuple[Feature, int]]:
        """Each feature with the position of its column."""
        return [(f, self.names.index(f.column)) for f in self.plan.features]

    @cached_property
    def _is_plain(self) -> bool:
        """True when column j is feature j, so that parsed rows are the matrix."""
        return not self._times and [j for _, j in self._layout] + self._extra == list(range(len(self.names)))

    @cached_property
    def _extra(self) -> list[int]:
        return [] if self.offset is None else [self.names.index(self.offset)]

    @cached_property
    def _times(self) -> FeaturePlan | None:
        """The part of the plan that is made of times."""
        features = tuple(f for f in self.plan.features if f.kind in ("seconds", "calendar"))
        return FeaturePlan(self.plan.schema, features) if features else None

    def from_rows(self, rows: Sequence[Any], where: str = "rows") -> RowMatrix:
        """The matrix of rows that are mappings from every column's name to its value, in any order.

        Raises
        ------
        RowError : for a row that is no mapping, a name that is absent or unknown, or a value of another type.
        """
        n_names, get, parsers = len(self.names), self._get, self._parsers
        parsed = []
        for i, row in enumerate(rows):
            try:
                values = get(row)
                if len(row) != n_names:
                    raise KeyError
                parsed.append([parse(value) for parse, value in zip(parsers, values, strict=True)])
            except (KeyError, TypeError, Wrong):
                raise self._explain(row, f"{where}[{i}]") from None
        if not parsed:
            raise RowError(f"expected one row at least in {where!r}, found none", field=where)
        return self._matrix(parsed)

    def from_columns(self, columns: Mapping[str, Sequence[Any] | np.ndarray], where: str = "inputs") -> RowMatrix:
        """The matrix of columns by name, all of one length; an array of numbers is taken as it is.

        Raises
        ------
        RowError : as `from_rows`, and for columns of different lengths.
        """
        self.check_names(columns, where)
        lengths = {len(values) for values in columns.values()}
        if len(lengths) != 1 or not max(lengths):
            raise RowError(
                f"expected columns of one length of 1 or more in {where!r}, found {sorted(lengths)}", (), where
            )
        parsed = [
            self._column(parse, columns[c.name], f"{where}.{c.name}")
            for parse, c in zip(self._parsers, self.plan.schema.columns, strict=True)
        ]
        if self._times is None:
            in_order = [parsed[j] for _, j in self._layout] + [parsed[j] for j in self._extra]
            return self._finish(np.ascontiguousarray(np.array(in_order, np.float64).T))
        return self._finish(self._with_times(parsed, lengths.pop()))

    @cached_property
    def takes_matrix(self) -> bool:
        """True when every column is a number, so that rows can be one matrix in the schema's order."""
        return not self._times and not self._category_positions

    def from_matrix(self, X: np.ndarray, where: str = "input") -> RowMatrix:
        """The matrix of numbers (n_rows, n_columns) in the schema's order; NaN is missing.

        Raises
        ------
        RowError : when the model takes text or times too, or for another width or an infinite number.
        """
        if not self.takes_matrix:
            raise RowError(f"{where}: this model takes text, categories or times; send one input per column", (), where)
        if X.ndim != 2 or X.shape[1] != len(self.names) or not len(X):
            raise RowError(f"{where}: expected the shape (rows, {len(self.names)}), found {X.shape}", (), where)
        values = X.astype(np.float64)
        if infinite(np.asarray(values, np.float64)).any():
            raise RowError(f"{where} holds an infinite value; expected finite numbers, or NaN for missing", (), where)
        return self._finish(np.ascontiguousarray(values[:, [j for _, j in self._layout] + self._extra]))

    def encoded(self, values: np.ndarray) -> tuple[Encoded, np.ndarray | None]:
        """The rows of a `RowMatrix` (or of several, joined) for `Model.predict_encoded`, and the offset."""
        features = self.plan.features
        columns = tuple(
            values[:, j].astype(np.int32) if f.kind == "categorical" else values[:, j] for j, f in enumerate(features)
        )
        return Encoded(len(values), columns), values[:, -1] if self.offset is not None else None

    def check_names(self, found: Iterable[Any], where: str) -> None:
        """Pass when the names are the model's, in any order; else a RowError that says which are not."""
        found = list(found)
        known, given = set(self.names), {name for name in found if isinstance(name, str)}
        absent = [name for name in self.names if name not in given]
        unknown = [name for name in found if not isinstance(name, str) or name not in known]
        if not absent and not unknown:
            return
        # Of each unknown name the nearest known one is looked for, which takes long: a few are told, the rest counted.
        problems = [f"{name!r} is absent" for name in absent[:_MOST_TOLD]]
        problems += [_unknown(name, self.names) for name in unknown[:_MOST_TOLD]]
        if more := len(absent) + len(unknown) - len(problems):
            problems.append(f"and {more} more")
        said = f"{where} does not have the model's columns: {'; '.join(problems)}"
        raise RowError(said, (), f"{where}.{str([*absent, *unknown][0])[:80]}")

    def _column(self, parse: Parse, values: Sequence[Any] | np.ndarray, where: str) -> Any:
        if isinstance(values, np.ndarray) and parse in (parse_number, parse_integer):
            if infinite(np.asarray(values, np.float64)).any():
                raise RowError(
                    f"{where} holds an infinite value; expected finite numbers, null or NaN for missing", (), where
                )
            return values
        items = values.tolist() if isinstance(values, np.ndarray) else values
        parsed = []
        for i, value in enumerate(items):
            try:
                parsed.append(parse(value))
            except Wrong as e:
                raise _wrong(e, value, f"{where}[{i}]") from None
        return parsed

    def _explain(self, row: Any, where: str) -> RowError:
        """The first thing that is wrong with a row that could not be parsed."""
        if not isinstance(row, Mapping):
            return RowError(f"{where}: expected an object of {len(self.names)} values, found {shown(row)}", (), where)
        try:
            self.check_names(row, where)
        except RowError as e:
            return e
        for name, parse in zip(self.names, self._parsers, strict=True):
            try:
                parse(row[name])
            except Wrong as e:
                return _wrong(e, row[name], f"{where}.{name}")
        raise AssertionError("a row that cannot be parsed has something wrong")

    def _matrix(self, parsed: list[list[Any]]) -> RowMatrix:
        if self._is_plain:
            return self._finish(np.array(parsed, np.float64))
        if self._times is None:
            values = np.array(parsed, np.float64)
            return self._finish(values[:, [j for _, j in self._layout] + self._extra])
        return self._finish(self._with_times(list(zip(*parsed, strict=True)), len(parsed)))

    def _with_times(self, columns: Sequence[Sequence[Any]], n_rows: int) -> np.ndarray:
        assert self._times is not None
        schema = self.plan.schema.columns
        times = {c.name: time_array(c, columns[j]) for j, c in enumerate(schema) if c.type in ("timestamp", "date")}
        done = iter(self._times.encode(pa.table(times)).columns)
        values = np.empty((n_rows, len(self._layout) + len(self._extra)))
        for at, (f, j) in enumerate(self._layout):
            values[:, at] = next(done) if f.kind in ("seconds", "calendar") else columns[j]
        for j in self._extra:
            values[:, -1] = columns[j]
        return values

    def _finish(self, values: np.ndarray) -> RowMatrix:
        """The matrix with what is unseen (-2, as the parsers mark it) counted and coded as training said."""
        if self.offset is not None and (absent := np.isnan(values[:, -1])).any():
            row = int(absent.argmax())
            raise RowError(f"{self.offset}: expected a number in every row, found null in row {row}", (), self.offset)
        unseen, missing = {}, {}
        for j, is_nan in enumerate(np.isnan(values).any(axis=0).tolist()):
            if is_nan:
                missing[self._column_name(j)] = int(np.isnan(values[:, j]).sum())
        for j in self._category_positions:
            f, codes = self.plan.features[j], values[:, j]
            if codes.min() >= 0:
                continue
            if n_unseen := int((codes == UNSEEN_CODE).sum()):
                unseen[f.name] = n_unseen
                codes[codes == UNSEEN_CODE] = len(f.vocabulary) if f.other else MISSING_CODE
            if n_missing := int((codes == MISSING_CODE).sum()) - (0 if f.other else n_unseen):
                missing[f.name] = n_missing
        return RowMatrix(values, unseen, missing)

    @cached_property
    def _category_positions(self) -> list[int]:
        return [j for j, f in enumerate(self.plan.features) if f.kind == "categorical"]

    def _column_name(self, j: int) -> str:
        return self.plan.features[j].name if j < len(self.plan.features) else str(self.offset)


def _wrong(error: Wrong, value: Any, where: str) -> RowError:
    return RowError(f"{where}: expected {error}, found {shown(value)}", (), where)


def _unknown(name: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name)[:100], names, n=1)
    return f"{shown(name)} is unknown" + (f", did you mean {near[0]!r}?" if near else "")
