"""What is known of a column: mergeable sums over rows, and the profile that they come to.

Every number that two machines must agree on (counts, vocabulary, minimum, maximum) is exact; mean and variance are
merged pairwise in float64 (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances"), in the order of the input, so that they do not depend on how many tasks read it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from claydist.arrays import NS, native_values
from claydist.errors import DataError
from claydist.sketch import Sketch

# Integers beyond it are not all representable in float32.
FLOAT32_EXACT = 2**24
# Beyond it a number is infinite to a tree, and its square to a linear model.
LARGEST = float(np.finfo(np.float32).max)
TOP_CATEGORIES = 200
MAX_LABEL_VALUES = 1000


@dataclass(frozen=True)
class Moments:
    """Weight, weighted mean and weighted sum of squared deviations of some numbers, and the limits of those that count.

    Numbers of weight 0 are outside all of them.
    """

    weight: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray, w: np.ndarray | None) -> Moments:
        """Moments of finite values (n,), weighted with w (n,) where given."""
        total = float(values.size if w is None else w.sum())
        if total == 0:
            return cls()
        mean = float(values.mean(dtype=np.float64) if w is None else np.dot(w, values) / total)
        deviations = np.subtract(values, mean, dtype=np.float64)
        m2 = float(np.dot(deviations, deviations) if w is None else np.dot(w * deviations, deviations))
        counted = values if w is None else values[w > 0]
        return cls(total, mean, m2, float(counted.min()), float(counted.max()))

    def __add__(self, other: Moments) -> Moments:
        weight = self.weight + other.weight
        if weight == 0:
            return self
        delta = other.mean - self.mean
        share = other.weight / weight
        m2 = self.m2 + other.m2 + delta * delta * self.weight * share
        limits = min(self.low, other.low), max(self.high, other.high)
        return Moments(weight, self.mean + delta * share, m2, *limits)

    @property
    def variance(self) -> float:
        """Weighted variance with ddof 0; exactly 0 of a constant, whose sum of squares may be the mean's rounding."""
        return self.m2 / self.weight if self.low < self.high else 0.0


@dataclass(frozen=True)
class ColumnSums:
    """Mergeable sums of one column over some rows; `a + b` is the sums over both, a's rows first.

    Attributes
    ----------
    n_rows, n_null, n_infinite : counts; a number beyond float32 is infinite.
    minimum, maximum : of the finite values; nanoseconds since the epoch for dates and timestamps.
    counts : rows by category; None where the column is a number.
    parts : moments by calendar part.
    sketch : of the finite values; None where the column is a category.
    origin : what was taken off the values before they went into the sketch: seconds, of dates and timestamps.
    """

    n_rows: int = 0
    n_null: int = 0
    n_infinite: int = 0
    moments: Moments = field(default_factory=Moments)
    minimum: float | int | None = None
    maximum: float | int | None = None
    inexact_float32: bool = False
    counts: Counter[Any] | None = None
    parts: Mapping[str, Moments] = field(default_factory=dict)
    sketch: Sketch | None = None
    origin: float = 0.0

    def __add__(self, other: ColumnSums) -> ColumnSums:
        return ColumnSums(
            self.n_rows + other.n_rows,
            self.n_null + other.n_null,
            self.n_infinite + other.n_infinite,
            self.moments + other.moments,
            _either(self.minimum, other.minimum, min),
            _either(self.maximum, other.maximum, max),
            self.inexact_float32 or other.inexact_float32,
            _merged(self.counts, other.counts),
            {part: self.parts.get(part, Moments()) + other.parts.get(part, Moments())
             for part in {**self.parts, **other.parts}},
            _either(self.sketch, other.sketch, lambda a, b: a + b),
            self.origin if self.sketch is not None else other.origin,
        )  # fmt: skip

    def profile(self) -> ColumnProfile:
        """The profile of the rows summed."""
        return ColumnProfile(
            self.n_rows, self.n_null, self.n_infinite, self.moments.mean, self.moments.variance,
            self.minimum, self.maximum, self.inexact_float32, None if self.counts is None else dict(self.counts),
            {part: (m.mean, m.variance**0.5 or 1.0) for part, m in self.parts.items()}, self.sketch, self.origin,
        )  # fmt: skip


@dataclass(frozen=True)
class ColumnProfile:
    """What is known of a column over all rows of a part (weighted where there are weights; ddof 0)."""

    n_rows: int
    n_null: int
    n_infinite: int = 0
    mean: float = 0.0
    variance: float = 0.0
    minimum: float | int | None = None
    maximum: float | int | None = None
    inexact_float32: bool = False
    counts: Mapping[Any, int] | None = None
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sketch: Sketch | None = None
    origin: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The profile as it stands in profile.json; of the categories the most frequent."""
        tree: dict[str, Any] = {"n_rows": self.n_rows, "n_null": self.n_null}
        if self.counts is not None:
            top = sorted(self.counts.items(), key=lambda item: (-item[1], str(item[0])))[:TOP_CATEGORIES]
            return {**tree, "n_categories": len(self.counts), "top": [[value, n] for value, n in top]}
        tree |= {"mean": self.mean, "variance": self.variance, "min": self.minimum, "max": self.maximum}
        tree |= {"origin": self.origin} if self.origin else {}
        return tree | {"sketch": self.sketch.to_json() if self.sketch else None}


def infinite(values: np.ndarray) -> np.ndarray:
    """Where numbers (n_rows,) are infinite, or would be in float32; bool."""
    return np.abs(values) > LARGEST


def numeric_sums(values: np.ndarray, w: np.ndarray | None, *, sketch: bool = True) -> ColumnSums:
    """Sums of numbers (n_rows,) float32 or float64, NaN for null, weighted with w (n_rows,) where given."""
    finite = np.abs(values) <= LARGEST
    n_finite = int(np.count_nonzero(finite))
    n_null = int(np.count_nonzero(np.isnan(values))) if n_finite < values.size else 0
    n_rows, n_infinite = values.size, values.size - n_finite - n_null
    if n_finite < n_rows:
        values, w = values[finite], None if w is None else w[finite]
    if not n_finite:
        return ColumnSums(n_rows, n_null, n_infinite)
    low, high = float(values.min()), float(values.max())
    inexact = values.dtype == np.float64 and max(-low, high) > FLOAT32_EXACT
    inexact = inexact and not np.array_equal(values.astype(np.float32), values)
    summary = None
    if sketch:
        summary = Sketch()
        summary.add(values)
    return ColumnSums(n_rows, n_null, n_infinite, Moments.of(values, w), low, high, bool(inexact), sketch=summary)


def time_sums(
    times: pa.Array, w: np.ndarray | None, parts: Mapping[str, np.ndarray], origin: float = 0.0, per_s: int = NS
) -> ColumnSums:
    """Sums of timestamps: int64 with nulls, so many a second; minimum and maximum are exact, in nanoseconds.

    Parameters
    ----------
    origin : seconds near the times. A bucket of the sketch is as wide as 1/64 of a value: of seconds since 1970 that is
        half a year, in which no drift would be seen.
    """
    valid = times.is_valid().to_numpy(zero_copy_only=False)
    seconds = times.drop_null().to_numpy(zero_copy_only=False) / per_s
    weights = None if w is None else w[valid]
    base = numeric_sums(seconds, weights, sketch=False)
    sketch = Sketch()
    sketch.add(seconds - origin)
    limits = pc.min_max(times).as_py()
    low, high = (None if limits[end] is None else limits[end] * (NS // per_s) for end in ("min", "max"))
    moments = {part: Moments.of(values[valid], weights) for part, values in parts.items()}
    return ColumnSums(
        len(times), times.null_count, 0, base.moments, low, high, parts=moments,
        sketch=sketch if len(seconds) else None, origin=origin,
    )  # fmt: skip


def category_sums(text: pa.DictionaryArray) -> ColumnSums:
    """Sums of a category: rows by value, nulls apart."""
    indices = text.indices.drop_null().to_numpy(zero_copy_only=False)
    counts = np.bincount(indices, minlength=len(text.dictionary))
    values = text.dictionary.to_pylist()
    found: Counter[Any] = Counter()
    for value, n in zip(values, counts.tolist(), strict=True):
        if n and value is not None:
            found[value] += n
    n_values = sum(found.values())
    return ColumnSums(len(text), len(text) - n_values, counts=found)


def label_sums(column: pa.ChunkedArray) -> ColumnSums:
    """Sums of a label by its own values; one more than MAX_LABEL_VALUES of them stand for any larger number."""
    array = column.combine_chunks()
    n_infinite = 0
    if pat.is_floating(array.type):
        n_infinite = int(np.count_nonzero(infinite(array.to_numpy(zero_copy_only=False))))
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    found = pc.value_counts(array.drop_null()).slice(0, MAX_LABEL_VALUES + 1)
    values, counts = found.field("values").to_pylist(), found.field("counts").to_pylist()
    return ColumnSums(len(array), array.null_count, n_infinite, counts=Counter(dict(zip(values, counts, strict=True))))


def capped(sums: ColumnSums) -> ColumnSums:
    """The sums of a label with one more than MAX_LABEL_VALUES values kept at the most."""
    if sums.counts is None or len(sums.counts) <= MAX_LABEL_VALUES + 1:
        return sums
    return replace(sums, counts=Counter(dict(islice(sums.counts.items(), MAX_LABEL_VALUES + 1))))


def check_weights(w: np.ndarray, column: str, where: str) -> None:
    """Pass when the weights are finite and not negative.

    Raises
    ------
    DataError : with the number of weights that are null, infinite or negative.
    """
    bad = int(np.count_nonzero(~(np.isfinite(w) & (w >= 0))))
    if bad:
        raise DataError(
            f"weight column {column!r} has {bad} values in {where} that are null, infinite or negative; "
            f"expected finite weights of 0 or more: mend them, or leave the rows out with data.where"
        )


def check_offsets(column: pa.ChunkedArray, name: str, where: str) -> None:
    """Pass when every offset is a finite number.

    Raises
    ------
    DataError : with the number of offsets that are null or infinite.
    """
    n_bad = int(np.count_nonzero(~np.isfinite(native_values(column))))  # null is NaN there
    if n_bad:
        raise DataError(f"offset column {name!r} has {n_bad} values in {where} that are null or infinite; mend them")


def _either(a: Any, b: Any, both: Callable[[Any, Any], Any]) -> Any:
    """The one that is not None, or what `both` makes of the two."""
    return b if a is None else a if b is None else both(a, b)


def _merged(a: Counter[Any] | None, b: Counter[Any] | None) -> Counter[Any] | None:
    if a is None or b is None:
        return b if a is None else a
    # `a + b` walks both in Python, and there may be a million of them.
    both = a.copy()
    both.update(b)
    return both
