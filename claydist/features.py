"""FeaturePlan: from a table to what a model computes with. The only encoder of claydist.

The plan is made once, from the profile of the training rows, and travels with the model. XGBoost is given nothing but
a float32 matrix of numbers and integer codes: 3.2 cuts non-ASCII pandas categories wrongly, takes codes out of range,
and ignores Arrow column names, so names, order and vocabulary are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from claydist.arrays import beyond_nanoseconds, native_values, seconds_since, text_values
from claydist.errors import DataError
from claydist.profile import LARGEST, ColumnProfile, infinite
from claydist.schema import NUMERIC, Column, Schema
from claydist.spec import DataSpec

Unseen = Literal["missing", "other", "error"]
_CALENDAR = {"hour": pc.hour, "dayofweek": pc.day_of_week, "day": pc.day, "month": pc.month}


_FILL_ROWS = 16_384


@dataclass(frozen=True)
class Feature:
    """One input of a model: a number, a category, seconds since an origin, or a part of a timestamp.

    `mean` and `scale` (standard deviation, ddof 0; 1 for a constant) are weighted, over the training rows, and used
    by linear models only. `other` says that values outside the vocabulary have a code of their own, the last.
    """

    name: str
    column: str
    kind: Literal["numeric", "categorical", "seconds", "calendar"]
    part: str | None = None
    origin_ns: int = 0
    vocabulary: tuple[str, ...] = ()
    other: bool = False
    mean: float = 0.0
    scale: float = 1.0
    indicator: bool = False

    @property
    def n_codes(self) -> int:
        """Number of codes of a categorical; 0 for a number."""
        return len(self.vocabulary) + self.other

    @cached_property
    def lookup(self) -> pa.Array:
        """The vocabulary as an Arrow array, to find codes in."""
        return pa.array(self.vocabulary, pa.string())


@dataclass(frozen=True)
class Encoded:
    """A table as arrays, one per feature, in the plan's order.

    Attributes
    ----------
    columns : per feature (n_rows,), float32 or float64 with NaN for missing, or int32 codes with -1 for missing.
    unseen : number of values outside the vocabulary, by feature; features without any are left out.
    """

    n_rows: int
    columns: tuple[np.ndarray, ...]
    unseen: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> Encoded:
        """Some rows, without a copy; what was unseen is known of the whole only."""
        return Encoded(len(range(*rows.indices(self.n_rows))), tuple(column[rows] for column in self.columns))


@dataclass(frozen=True)
class FeaturePlan:
    """All features of a model, and the schema that a table must fit to be encoded."""

    schema: Schema
    features: tuple[Feature, ...]
    unseen: Unseen = "missing"

    @property
    def names(self) -> list[str]:
        """Names of the model's inputs, in order."""
        return [f.name for f in self.features]

    @property
    def kinds(self) -> list[str]:
        """XGBoost's feature types: `c` for a categorical, `q` for a number."""
        return ["c" if f.kind == "categorical" else "q" for f in self.features]

    @cached_property
    def dense_features(self) -> tuple[Feature, ...]:
        """Features that a linear model takes as numbers."""
        return tuple(f for f in self.features if f.kind != "categorical")

    @cached_property
    def n_dense(self) -> int:
        """Width of the dense block of a linear model, missing indicators included."""
        return len(self.dense_features) + sum(f.indicator for f in self.dense_features)

    @cached_property
    def n_onehot(self) -> int:
        """Width of the one-hot block of a linear model."""
        return sum(f.n_codes for f in self.features)

    @cached_property
    def coefficient_names(self) -> list[str]:
        """Names of a linear model's coefficients: numbers, indicators, then `feature=category`."""
        names = [f.name for f in self.dense_features]
        names += [f"{f.name} is missing" for f in self.dense_features if f.indicator]
        for f in self.features:
            names += [f"{f.name}={value}" for value in f.vocabulary] + [f"{f.name} (other)"] * f.other
        return names

    def encode(self, table: pa.Table) -> Encoded:
        """Arrays of the table's features; columns are found by name, others are ignored.

        Raises
        ------
        DataError : for an infinite value, or an unseen category under `unseen: error`; with column and count.
        """
        unseen: dict[str, int] = {}
        columns = []
        for f in self.features:
            if f.kind == "categorical":
                codes, n_unseen = self._codes(f, table.column(f.column))
                columns.append(codes)
                if n_unseen:
                    unseen[f.name] = n_unseen
            else:
                columns.append(self._numbers(f, table.column(f.column)))
        return Encoded(table.num_rows, tuple(columns), unseen)

    def tree_matrix(self, encoded: Encoded) -> np.ndarray:
        """X (n_rows, n_features) float32, row-major; NaN is missing, a category is its code."""
        X = np.empty((encoded.n_rows, len(self.features)), np.float32)
        # By blocks that stay in the processor's cache while their columns are filled.
        for rows in (slice(start, start + _FILL_ROWS) for start in range(0, encoded.n_rows, _FILL_ROWS)):
            block = X[rows]
            for j, (f, column) in enumerate(zip(self.features, encoded.columns, strict=True)):
                values = column[rows]
                block[:, j] = values
                if f.kind == "categorical":
                    block[values < 0, j] = np.nan
        return X

    def dense(self, encoded: Encoded) -> np.ndarray:
        """Dense block (n_rows, n_dense) float64, column-major: imputed with the mean and standardised; indicators."""
        X = np.empty((encoded.n_rows, self.n_dense), np.float64, order="F")
        at = len(self.dense_features)
        numbers = (v for f, v in zip(self.features, encoded.columns, strict=True) if f.kind != "categorical")
        for j, (f, values) in enumerate(zip(self.dense_features, numbers, strict=True)):
            np.subtract(values, f.mean, out=X[:, j], dtype=np.float64)
            X[:, j] /= f.scale
            missing = np.isnan(values)
            X[missing, j] = 0.0
            if f.indicator:
                X[:, at] = missing
                at += 1
        return X

    def onehot(self, encoded: Encoded) -> np.ndarray:
        """One-hot positions (n_rows, n_categoricals) int32 within the one-hot block; -1 for missing."""
        out, start = [], 0
        for f, values in zip(self.features, encoded.columns, strict=True):
            if f.kind == "categorical":
                out.append(np.where(values < 0, np.int32(-1), values + np.int32(start)))
                start += f.n_codes
        return np.stack(out, axis=1) if out else np.empty((encoded.n_rows, 0), np.int32)

    def bad_rows(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Rows that `encode` would refuse: {reason: mask (n_rows,) bool}; empty when it would take them all."""
        bad: dict[str, np.ndarray] = {}
        for f in self.features:
            column = table.column(f.column)
            if f.kind == "numeric" and (mask := infinite(native_values(column))).any():
                bad[f"infinite value in {f.column!r}"] = mask
            elif f.kind == "seconds" and (mask := beyond_nanoseconds(column)).any():
                bad[f"timestamp outside the years 1677 to 2262 in {f.column!r}"] = mask
            elif f.kind == "categorical" and self.unseen == "error" and not f.other:
                _, outside = _lookup(f, column)
                if outside.any():
                    bad[f"category not seen in training in {f.column!r}"] = outside
        return bad

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON-able mapping."""
        features = [{k: v for k, v in asdict(f).items() if v != getattr(Feature, k, None)} for f in self.features]
        return {"schema": self.schema.to_json(), "features": features, "unseen": self.unseen}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> FeaturePlan:
        """The plan that `to_json` gave."""
        features = (Feature(**{**f, "vocabulary": tuple(f.get("vocabulary", ()))}) for f in tree["features"])
        return cls(Schema.from_json(tree["schema"]), tuple(features), tree["unseen"])

    def _numbers(self, f: Feature, column: pa.ChunkedArray) -> np.ndarray:
        if f.kind == "numeric":
            values = native_values(column)
            # Seconds and calendar parts come from integers and cannot be infinite.
            if n_inf := int(np.count_nonzero(infinite(values))):
                raise DataError(
                    f"column {f.column!r} holds {n_inf} infinite values (or beyond {LARGEST:.1e}); expected finite "
                    f"numbers or nulls: replace them, or leave the rows out with `where`"
                )
            return values
        if f.kind == "seconds":
            return seconds_since(column, f.origin_ns, f.column)
        local = _in_zone(column, next(c for c in self.schema.columns if c.name == f.column))
        return native_values(_CALENDAR[str(f.part)](local))

    def _codes(self, f: Feature, column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
        codes, outside = _lookup(f, column)
        n_outside = int(outside.sum())
        if n_outside and f.other:
            codes[outside] = len(f.vocabulary)
        elif n_outside and self.unseen == "error":
            first = column.filter(pa.array(outside)).slice(0, 1).to_pylist()[0]
            raise DataError(
                f"column {f.column!r} holds {n_outside} values not seen in training, the first is {first!r}; "
                f"data.unseen is 'error': retrain, or choose 'missing' or 'other'"
            )
        return codes, n_outside


def build_plan(
    data: DataSpec, schema: Schema, profiles: Mapping[str, ColumnProfile], *, missing_indicator: bool = False
) -> FeaturePlan:
    """The plan for these columns, from the profile of the training rows.

    Parameters
    ----------
    data : the spec's part on columns: calendar, types, max_categories, unseen.
    schema : the feature columns in order (an offset column may follow; it has no feature).
    profiles : by column, of the training rows only.
    missing_indicator : linear models only: one more input for each number with nulls.
    """
    features: list[Feature] = []
    for column in schema.columns:
        if column.name not in profiles:
            continue
        profile = profiles[column.name]
        if column.name in data.calendar:
            if column.type not in ("timestamp", "date"):
                raise DataError(f"data.calendar: column {column.name!r} is {column.describe()}, not a timestamp")
            features += [_calendar(column, part, profile) for part in data.calendar[column.name]]
        elif is_categorical(column, data):
            features.append(_categorical(column, profile, data))
        else:
            features.append(_numeric(column, profile, missing_indicator))
    return FeaturePlan(schema, tuple(features), data.unseen)


def is_categorical(column: Column, data: DataSpec) -> bool:
    """True where the column is encoded by its vocabulary: text, or declared `category`."""
    return column.type == "string" or data.types.get(column.name) == "category"


def _calendar(column: Column, part: str, profile: ColumnProfile) -> Feature:
    mean, scale = profile.parts[part]
    return Feature(f"{column.name}.{part}", column.name, "calendar", part=part, mean=mean, scale=scale)


def _categorical(column: Column, profile: ColumnProfile, data: DataSpec) -> Feature:
    counts = profile.counts or {}
    kept = sorted(counts, key=lambda value: (-counts[value], value))[: data.max_categories]
    other = len(counts) > len(kept) or data.unseen == "other"
    return Feature(column.name, column.name, "categorical", vocabulary=tuple(sorted(kept)), other=other)


def _numeric(column: Column, profile: ColumnProfile, missing_indicator: bool) -> Feature:
    scale = profile.variance**0.5 or 1.0
    indicator = missing_indicator and profile.n_null > 0
    if column.type in ("timestamp", "date"):
        origin_ns = int(profile.minimum or 0)
        mean = profile.mean - origin_ns / 1e9
        return Feature(
            column.name, column.name, "seconds",
            origin_ns=origin_ns, mean=mean, scale=scale, indicator=indicator,
        )  # fmt: skip
    return Feature(column.name, column.name, "numeric", mean=profile.mean, scale=scale, indicator=indicator)


def float32_warnings(plan: FeaturePlan, profiles: Mapping[str, ColumnProfile]) -> list[str]:
    """Features of a tree model whose values float32 cannot hold exactly, said as warnings."""
    return [
        f"feature {f.name!r} reaches {max(abs(p.minimum or 0), abs(p.maximum or 0)):,.0f}, beyond 2^24: trees see it "
        f"as float32, where neighbouring values become equal; drop it, or make it a category"
        for f in plan.features
        if f.kind == "numeric" and (p := profiles[f.column]).inexact_float32
    ]


def _lookup(f: Feature, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n_rows,) int32, -1 for null or outside the vocabulary, and the mask of those outside."""
    text = text_values(column, f.column)
    known = pc.index_in(text.dictionary, value_set=f.lookup).fill_null(-1).to_numpy(zero_copy_only=False)
    signed = text.indices.cast(pa.int64()) if pat.is_unsigned_integer(text.indices.type) else text.indices
    indices = signed.fill_null(-1).to_numpy(zero_copy_only=False)
    # One more entry, so that index -1 (null) finds -1.
    codes = np.append(known.astype(np.int32), np.int32(-1))[indices]
    return codes, (codes < 0) & (indices >= 0) & _not_null_entries(text)[indices]


def _not_null_entries(text: pa.DictionaryArray) -> np.ndarray:
    """Per dictionary entry whether it is a value: a dictionary may hold null itself."""
    return np.append(text.dictionary.is_valid().to_numpy(zero_copy_only=False), False)


def _in_zone(column: pa.ChunkedArray, trained: Column) -> pa.ChunkedArray:
    """The timestamps in the zone of training, so that an hour means the same hour."""
    if pat.is_null(column.type) or not pat.is_timestamp(column.type):
        return column.cast(pa.timestamp("s"))
    return column.cast(pa.timestamp(column.type.unit, trained.zone)) if trained.zone else column


def check_types(schema: Schema, data: DataSpec) -> None:
    """Pass when `data.types` can be had from the columns.

    Raises
    ------
    DataError : for a `category` of a type without text or integers, or a declared type that the column is not.
    """
    problems = []
    for column in schema.columns:
        declared = data.types.get(column.name)
        if declared == "category" and column.type not in ("integer", "string", "boolean"):
            problems.append(f"column {column.name!r} is {column.describe()}; only integers and text can be a category")
        elif declared not in (None, "category", column.type) and not (declared in NUMERIC and column.type in NUMERIC):
            problems.append(f"column {column.name!r} is declared {declared} and is {column.describe()}")
    if problems:
        raise DataError("data.types does not fit the columns", problems)


def concat_encoded(parts: Sequence[Encoded]) -> Encoded:
    """The parts one after another, as one."""
    columns = tuple(np.concatenate(arrays) for arrays in zip(*(p.columns for p in parts), strict=True))
    unseen: dict[str, int] = {}
    for part in parts:
        for name, n in part.unseen.items():
            unseen[name] = unseen.get(name, 0) + n
    return Encoded(sum(p.n_rows for p in parts), columns, unseen)
