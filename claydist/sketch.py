"""Mergeable sketch of a column's distribution: quantiles within 1 %, histograms, for profiles and drift.

After DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with relative-error
guarantees", VLDB 2019), with its linearly interpolated mapping: a bucket is the sign, the exponent and the first six
bits of the fraction of a float64. Taking bits rather than a logarithm makes the bucket of a value the same on every
CPU, and costs one shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FRACTION_BITS = 6
_SHIFT = 52 - _FRACTION_BITS
_PER_OCTAVE = 1 << _FRACTION_BITS
_MAGNITUDE = np.int64(0x7FFF_FFFF_FFFF_FFFF)
_TOP_KEY = 2047 * _PER_OCTAVE - 1  # the last bucket of finite numbers
_CHUNK = 1 << 16  # values in flight: keeps the temporaries in the cache
_LARGEST = float(np.finfo(np.float64).max)


class Sketch:
    """Counts of values by bucket, their exact minimum and maximum, and the number of nulls.

    Buckets are `[2^e (1 + k/64), 2^e (1 + (k+1)/64))`, k = 0..63, mirrored for negative values, so a quantile is
    within 1/129 (0.78 %) of a true one. Values nearer to zero than 2.2e-308 are zero; infinities count as the largest
    finite number. Counts are int64 until weights are given, then float64. The state depends only on the values and
    weights (and, with weights, on the order of the additions in the last bits).

    Attributes
    ----------
    keys : (n_buckets,) int32, sorted; negative, zero and positive values have keys of their sign.
    counts : (n_buckets,) int64 or float64, sums of weights.
    n_null : int or float, the (weighted) number of NaN.
    minimum, maximum : float, None while empty; of values whose weight is not zero.
    """

    __slots__ = ("counts", "keys", "maximum", "minimum", "n_null")

    def __init__(self) -> None:
        self.keys: Array = np.empty(0, np.int32)
        self.counts: Array = np.empty(0, np.int64)
        self.n_null: int | float = 0
        self.minimum: float | None = None
        self.maximum: float | None = None

    @property
    def n(self) -> int | float:
        """Number, or total weight, of the values that are not null."""
        return self.counts.sum().item()

    def add(self, values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Count values.

        Parameters
        ----------
        values : (n,) of any real or boolean dtype, NaN is null.
        weights : (n,) not negative, or None for 1 each; values of weight zero leave no trace.
        """
        x = np.ascontiguousarray(values).ravel()
        w = None if weights is None else np.ascontiguousarray(weights, dtype=np.float64).ravel()
        if w is not None and not w.all():
            x, w = x[w != 0], w[w != 0]
        if x.dtype.kind == "f" and (null := np.isnan(x)).any():
            self.n_null += int(null.sum()) if w is None else float(w[null].sum())
            x, w = x[~null], None if w is None else w[~null]
        if not len(x):
            return
        keys, counts = _count(x, w)
        self._merge(keys, counts, float(x.min()), float(x.max()))

    def __add__(self, other: Sketch) -> Sketch:
        merged = Sketch()
        for part in (self, other):
            merged.n_null += part.n_null
            if part.minimum is not None and part.maximum is not None:
                merged._merge(part.keys, part.counts, part.minimum, part.maximum)
        return merged

    def quantile(self, q: float) -> float | None:
        """The value at rank `q`, within 0.78 % of a true lower quantile; None where there are no values.

        Without weights the rank is `floor(q (n - 1))`; with weights it is where the running sum reaches `q n`.
        0 and 1 give the exact minimum and maximum.
        """
        if self.minimum is None or self.maximum is None:
            return None
        if q <= 0 or q >= 1:
            return self.minimum if q <= 0 else self.maximum
        running = np.cumsum(self.counts)
        if self.counts.dtype.kind == "i":
            place = np.searchsorted(running, int(q * (int(running[-1]) - 1)), side="right")
        else:
            place = np.searchsorted(running, q * running[-1], side="left")
        value = float(_middle(self.keys[min(int(place), len(self.keys) - 1)]))
        return min(max(value, self.minimum), self.maximum)

    def edges(self, n_bins: int) -> Array:
        """Inner edges of at most `n_bins` bins of about equal count; float64, strictly increasing, on bucket borders.

        A bin is `[edge, next edge)`, the first and the last are open. Few distinct values give fewer bins.
        """
        if not len(self.keys):
            return np.empty(0)
        running = np.cumsum(self.counts)
        places = np.searchsorted(running, np.arange(1, n_bins) / n_bins * running[-1], side="left")
        inner = np.unique(places[places < len(self.keys) - 1])
        # The border above the last bucket of a bin; of negative values that is the nearer end of their bucket.
        return _upper_border(self.keys[inner].astype(np.int64))

    def histogram(self, edges: npt.ArrayLike) -> Array:
        """Counts in the bins between `edges` (from `edges()` of any sketch); (n_edges + 1,), exact."""
        borders = np.asarray(edges, dtype=np.float64)
        bins = np.searchsorted(borders, _middle(self.keys), side="right")
        counts = np.zeros(len(borders) + 1, self.counts.dtype)
        np.add.at(counts, bins, self.counts)
        return counts

    def below(self, points: npt.ArrayLike) -> Array:
        """About how many values lie below each point, taking those of a bucket as evenly spread; float64."""
        keys = np.repeat(self.keys.astype(np.int64), 2)
        magnitude = np.abs(keys)
        # A bucket runs from its lower to its upper end; of a negative one the lower end is the far one.
        far = (np.arange(len(keys)) % 2 == 1) == (keys > 0)
        ends = np.where(keys == 0, 0.0, np.sign(keys) * _lower_end(np.maximum(magnitude, 1) + far))
        running = np.cumsum(self.counts, dtype=np.float64)
        heights = np.stack([running - self.counts, running], axis=1).ravel()
        if not len(keys):
            return np.zeros(np.shape(points))
        return np.interp(np.asarray(points, np.float64), np.clip(ends, self.minimum, self.maximum), heights, left=0.0)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able lists and numbers."""
        return {
            "keys": self.keys.tolist(),
            "counts": self.counts.tolist(),
            "nulls": self.n_null,
            "min": self.minimum,
            "max": self.maximum,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Sketch:
        """The sketch whose `to_json` was `state`."""
        sketch = cls()
        sketch.keys = np.asarray(state["keys"], dtype=np.int32)
        weighted = any(isinstance(count, float) for count in state["counts"])
        sketch.counts = np.asarray(state["counts"], dtype=np.float64 if weighted else np.int64)
        sketch.n_null, sketch.minimum, sketch.maximum = state["nulls"], state["min"], state["max"]
        return sketch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketch) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Sketch(n={self.n}, nulls={self.n_null}, min={self.minimum}, max={self.maximum})"

    def _merge(self, keys: Array, counts: Array, minimum: float, maximum: float) -> None:
        dtype = np.result_type(self.counts, counts) if len(self.counts) else counts.dtype
        union = np.union1d(self.keys, keys) if len(self.keys) else keys
        total = np.zeros(len(union), dtype)
        total[np.searchsorted(union, self.keys)] += self.counts.astype(dtype)
        total[np.searchsorted(union, keys)] += counts
        self.keys, self.counts = union, total
        minimum, maximum = max(minimum, -_LARGEST), min(maximum, _LARGEST)
        self.minimum = minimum if self.minimum is None else min(self.minimum, minimum)
        self.maximum = maximum if self.maximum is None else max(self.maximum, maximum)


def bucket_keys(x: Array) -> Array:
    """Key of the bucket of each value; (n,) int64, monotone in the value, 0 for zero."""
    bits = x.astype(np.float64, copy=True).view(np.int64)
    sign = bits >> np.int64(63)  # -1 where negative
    bits &= _MAGNITUDE
    bits >>= np.int64(_SHIFT)
    np.minimum(bits, _TOP_KEY, out=bits)
    bits -= _PER_OCTAVE - 1  # the smallest normal number is 1; all below it is zero
    np.maximum(bits, 0, out=bits)
    bits ^= sign
    bits -= sign
    return bits


def psi(expected: npt.ArrayLike, actual: npt.ArrayLike) -> float | None:
    """Population stability index of two histograms over the same bins; None when one of them is empty.

    `sum (a_i - e_i) log(a_i / e_i)` over shares of each bin (Siddiqi, Credit Risk Scorecards, 2006), with half a row
    added to each bin so that an empty one is finite. Below 0.1 is stable, above 0.25 a shift, by custom.
    """
    e, a = (np.asarray(counts, dtype=np.float64) for counts in (expected, actual))
    if not (e.sum() and a.sum()):
        return None
    e, a = ((counts + 0.5) / (counts + 0.5).sum() for counts in (e, a))
    return float(((a - e) * np.log(a / e)).sum())


def drift(expected: Sketch, actual: Sketch, n_bins: int = 10) -> float | None:
    """PSI of `actual` over the quantile bins of `expected`."""
    edges = expected.edges(n_bins)
    return psi(expected.histogram(edges), actual.histogram(edges))


def _count(x: Array, w: Array | None) -> tuple[Array, Array]:
    """Sorted distinct keys of `x` and the sum of weights of each."""
    lowest, highest = (int(bucket_keys(np.array([end]))[0]) for end in (x.min(), x.max()))
    total = np.zeros(highest - lowest + 1, np.int64 if w is None else np.float64)
    seen = np.zeros(len(total), bool) if w is not None else None
    for start in range(0, len(x), _CHUNK):
        at = bucket_keys(x[start : start + _CHUNK])
        at -= lowest
        total += np.bincount(at, None if w is None else w[start : start + _CHUNK], minlength=len(total))
        if seen is not None:
            seen[at] = True
    used = np.flatnonzero(total if seen is None else seen)
    return (used + lowest).astype(np.int32), total[used]


def _lower_end(magnitude: Array) -> Array:
    """The end nearer to zero of the buckets of positive keys; float64."""
    return ((magnitude + (_PER_OCTAVE - 1)) << np.int64(_SHIFT)).view(np.float64)


def _middle(keys: Array) -> Array:
    """The value that is within 1/129 of all values of a bucket: 2 l u / (l + u); float64 of the shape of `keys`."""
    signed = np.atleast_1d(np.asarray(keys)).astype(np.int64)
    magnitude = np.abs(signed)
    low = _lower_end(magnitude)
    # The width follows from the lower end without leaving the finite numbers in the last bucket.
    fraction, _ = np.frexp(low)
    relative = 1.0 / (_PER_OCTAVE * 2.0 * fraction)  # (u - l) / l
    middle = np.where(magnitude == 0, 0.0, np.sign(signed) * (low * (1.0 + relative / (2.0 + relative))))
    return middle.reshape(np.shape(keys))


def _upper_border(keys: Array) -> Array:
    """The least number above all values of a bucket and not above those of the next; float64."""
    above = np.where(keys >= 0, _lower_end(np.abs(keys) + 1), -_lower_end(np.maximum(np.abs(keys), 1)))
    # A negative bucket holds its nearer end, which therefore lies just below the border.
    return np.where(keys >= 0, above, np.nextafter(above, 0.0))
