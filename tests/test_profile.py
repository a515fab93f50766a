from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from claydist.errors import DataError
from claydist.profile import (
    ColumnSums,
    Moments,
    category_sums,
    check_weights,
    label_sums,
    numeric_sums,
    time_sums,
)

N = 1000


def total(sums: Sequence[ColumnSums]) -> ColumnSums:
    return reduce(add, sums, ColumnSums())


def cuts(seed: int) -> list[slice]:
    """The rows in consecutive pieces, empty ones among them."""
    ends = np.sort(np.random.default_rng(seed).integers(0, N, 7))
    bounds = [0, 0, *ends.tolist(), N, N]
    return [slice(a, b) for a, b in pairwise(bounds)]


def numbers(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(3.0, 5.0, N)
    values[rng.random(N) < 0.2] = np.nan
    values[rng.random(N) < 0.01] = np.inf
    values[5] = -1e39
    return values


def weights(seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.gamma(0.5, size=N) * (rng.random(N) < 0.9)


def assert_same(found: ColumnSums, expected: ColumnSums) -> None:
    """Counts and limits exactly, moments to 1e-12."""
    for name in ("n_rows", "n_null", "n_infinite", "minimum", "maximum", "inexact_float32", "counts", "sketch"):
        assert getattr(found, name) == getattr(expected, name), name
    pairs = [(found.moments, expected.moments), *((found.parts[p], expected.parts[p]) for p in expected.parts)]
    for a, b in pairs:
        np.testing.assert_allclose((a.weight, a.mean, a.variance), (b.weight, b.mean, b.variance), rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_merged_from_any_split_are_one_pass(seed: int, weighted: bool) -> None:
    values, w = numbers(seed), weights() if weighted else None
    parts = [numeric_sums(values[s], None if w is None else w[s]) for s in cuts(seed)]
    assert len(parts) == 10
    assert_same(total(parts), numeric_sums(values, w))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_are_what_numpy_says(dtype: Any, weighted: bool) -> None:
    with np.errstate(over="ignore"):
        values = numbers().astype(dtype)
    w = weights() if weighted else None
    sums = numeric_sums(values, w)
    shown = np.abs(values) < 1e38
    kept = values[shown].astype(np.float64)
    mean = np.average(kept, weights=None if w is None else w[shown])
    variance = np.average((kept - mean) ** 2, weights=None if w is None else w[shown])
    assert (sums.n_rows, sums.n_null) == (N, np.isnan(values).sum())
    assert sums.n_infinite == N - np.isnan(values).sum() - shown.sum() > 1
    assert (sums.minimum, sums.maximum) == (kept.min(), kept.max())
    profile = sums.profile()
    np.testing.assert_allclose([profile.mean, profile.variance], [mean, variance], rtol=1e-12)


def test_moments_do_not_cancel() -> None:
    values = 1e9 + np.array([1.0, 2.0, 3.0, 4.0])
    merged = reduce(lambda a, b: a + b, [Moments.of(values[i : i + 1], None) for i in range(4)])
    assert merged.variance == pytest.approx(1.25, rel=1e-9)


def test_nothing_and_no_weight_add_nothing() -> None:
    some = numeric_sums(numbers(), weights())
    empty = numeric_sums(np.empty(0), np.empty(0))
    none = numeric_sums(np.array([3.0, np.nan]), np.zeros(2))
    assert ColumnSums() + some == some
    assert_same(some + empty, some)
    assert (some + none).moments == some.moments
    assert (none.moments, none.minimum) == (Moments(), 3.0)
    assert numeric_sums(np.array([np.nan]), None).profile().variance == 0.0


@pytest.mark.parametrize(("values", "inexact"), [
    ([2.0**24], False), ([2.0**24 + 1], True), ([-(2.0**24) - 1], True), ([2.0**40], False), ([0.1], False),
])  # fmt: skip
def test_numbers_that_float32_cannot_hold(values: list[float], inexact: bool) -> None:
    assert numeric_sums(np.array(values), None).inexact_float32 == inexact
    both = numeric_sums(np.array(values), None) + numeric_sums(np.array([1.0]), None)
    assert both.profile().inexact_float32 == inexact


def moments_of_time(seed: int) -> tuple[pa.Array, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    ns = rng.integers(-(2**60), 2**60, N)
    null = rng.random(N) < 0.2
    return pa.array(ns, mask=null), {"hour": np.where(null, np.nan, rng.integers(0, 24, N))}


@pytest.mark.parametrize("weighted", [False, True])
def test_timestamps_merge_and_keep_exact_limits(weighted: bool) -> None:
    ns, parts = moments_of_time(0)
    w = weights() if weighted else None
    pieces = [
        time_sums(ns[s.start : s.stop], None if w is None else w[s], {p: v[s] for p, v in parts.items()})
        for s in cuts(3)
    ]
    whole = time_sums(ns, w, parts)
    assert_same(total(pieces), whole)
    values = np.array(ns.drop_null().to_pylist())
    assert (whole.minimum, whole.maximum) == (values.min(), values.max())
    shown = ~np.isnan(parts["hour"])
    mean, scale = whole.profile().parts["hour"]
    hours, own = parts["hour"][shown], None if w is None else w[shown]
    np.testing.assert_allclose(mean, np.average(hours, weights=own), rtol=1e-12)
    np.testing.assert_allclose(scale**2, np.average((hours - mean) ** 2, weights=own), rtol=1e-12)


def test_timestamps_that_are_all_null() -> None:
    sums = time_sums(pa.nulls(3, pa.int64()), None, {"hour": np.full(3, np.nan)})
    assert (sums.n_rows, sums.n_null, sums.minimum) == (3, 3, None)
    assert sums.profile().parts == {"hour": (0.0, 1.0)}


@pytest.mark.parametrize("seed", range(4))
def test_categories_merge_to_the_counts_of_all_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = np.array(["é", "", "a", "東", "rare"])[rng.choice(5, N, p=[0.4, 0.3, 0.2, 0.095, 0.005])]
    null = rng.random(N) < 0.1
    text = pa.array(words, mask=null)
    parts = [category_sums(text[s.start : s.stop].dictionary_encode()) for s in cuts(seed)]
    whole = category_sums(text.dictionary_encode())
    assert_same(total(parts), whole)
    assert whole.counts == Counter(words[~null].tolist())
    assert (whole.n_rows, whole.n_null) == (N, null.sum())


def test_categories_of_a_dictionary_with_unused_and_null_entries() -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0, 2, None, 0, 3]), pa.array(["x", "unused", None, "x"]))
    sums = category_sums(text)
    assert (sums.counts, sums.n_null) == ({"x": 3}, 2)


@pytest.mark.parametrize(("values", "counts", "n_null", "n_infinite"), [
    (pa.array([1, 0, 1, None]), {1: 2, 0: 1}, 1, 0),
    (pa.array(["b", None, "é", "b"]), {"b": 2, "é": 1}, 1, 0),
    (pa.array([True, False, True]), {True: 2, False: 1}, 0, 0),
    (pa.array([0.5, float("nan"), None, float("inf")]), {0.5: 1, float("inf"): 1}, 2, 1),
    (pa.array([1e300, 1.0]), {1e300: 1, 1.0: 1}, 0, 1),
    (pa.array(["b", None, "b"]).dictionary_encode(), {"b": 2}, 1, 0),
    (pa.array([None, None], pa.int64()), {}, 2, 0),
])  # fmt: skip
def test_labels_by_their_own_values(values: pa.Array, counts: dict[Any, int], n_null: int, n_infinite: int) -> None:
    sums = label_sums(pa.chunked_array([values]))
    assert (sums.counts, sums.n_null, sums.n_infinite, sums.n_rows) == (counts, n_null, n_infinite, len(values))
    halves = [label_sums(pa.chunked_array([values[:1]])), label_sums(pa.chunked_array([values[1:]]))]
    assert (total(halves).counts, total(halves).n_null) == (counts, n_null)


def test_labels_with_very_many_values_are_cut() -> None:
    sums = label_sums(pa.chunked_array([pa.array(np.arange(5000))]))
    assert len(sums.counts or ()) == 1001


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9])
def test_weights_must_be_finite_and_not_negative(bad: float) -> None:
    check_weights(np.array([0.0, 2.5]), "w", "x")
    with pytest.raises(DataError, match="weight column 'w' has 2 values in x that are null, infinite or negative"):
        check_weights(np.array([1.0, bad, bad]), "w", "x")


def test_json_holds_the_profile_and_the_most_frequent_categories() -> None:
    tree = json.loads(json.dumps(numeric_sums(numbers(), None).profile().to_json()))
    assert tree["n_rows"] == N
    assert set(tree) == {"n_rows", "n_null", "mean", "variance", "min", "max", "sketch"}
    many = [f"c{i}" for i in range(300)] + ["c7"]
    tree = category_sums(pa.array(many).dictionary_encode()).profile().to_json()
    assert (tree["n_categories"], len(tree["top"]), tree["top"][0]) == (300, 200, ["c7", 2])
