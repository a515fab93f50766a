import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claydist.sketch import Sketch, drift, psi

FLOATS = st.floats(allow_nan=True, allow_infinity=False, allow_subnormal=False)


def sketch_of(values, weights=None) -> Sketch:
    sketch = Sketch()
    sketch.add(values, weights)
    return sketch


@given(st.lists(FLOATS, min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_within_one_percent_of_the_lower_quantile(values, q):
    x = np.array(values)
    sketch = sketch_of(x)
    known = np.sort(x[~np.isnan(x)])
    assert sketch.n == len(known)
    assert sketch.n_null == len(x) - len(known)
    if len(known):
        want = known[int(q * (len(known) - 1))]
        assert sketch.quantile(q) == pytest.approx(want, rel=1 / 129 + 1e-12, abs=0)
    else:
        assert sketch.quantile(q) is None


@given(st.lists(st.lists(FLOATS, max_size=20), min_size=2, max_size=5))
def test_partials_in_any_order_equal_the_whole(parts):
    whole = sketch_of(np.concatenate([np.array(part, dtype=float) for part in parts]))
    sketches = [sketch_of(np.array(part, dtype=float)) for part in parts]
    assert sum(sketches[1:], sketches[0]) == whole
    assert sum(sketches[::-1], Sketch()) == whole


@given(st.lists(FLOATS, min_size=1, max_size=40), st.lists(FLOATS, max_size=40), st.integers(1, 12))
def test_histogram_on_edges_counts_as_numpy_does(values, others, n_bins):
    x, z = (np.array([v for v in part if v == v], dtype=float) for part in (values, others))
    edges = sketch_of(x).edges(n_bins)
    assert (np.diff(edges) > 0).all()
    assert len(edges) < n_bins
    for part in (x, z):
        want = np.bincount(np.searchsorted(edges, part, side="right"), minlength=len(edges) + 1)
        assert sketch_of(part).histogram(edges).tolist() == want.tolist()


def test_edges_give_bins_of_about_equal_count():
    x = np.random.default_rng(0).normal(size=20_000)
    counts = sketch_of(x).histogram(sketch_of(x).edges(10))
    assert len(counts) == 10
    assert counts.min() > 1_700
    assert counts.max() < 2_300


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8, np.uint16, bool])
def test_dtype_does_not_change_the_buckets(dtype):
    x = np.random.default_rng(1).integers(0, 100, 500).astype(dtype)
    assert sketch_of(x) == sketch_of(x.astype(np.float64))


def test_weights_count_as_repetition_and_zero_leaves_no_trace():
    rng = np.random.default_rng(2)
    x = rng.normal(size=300)
    x[::7] = np.nan
    w = rng.integers(0, 4, 300)
    weighted, repeated = sketch_of(x, w), sketch_of(np.repeat(x, w))
    assert weighted.keys.tolist() == repeated.keys.tolist()
    assert weighted.counts.tolist() == repeated.counts.tolist()
    assert (weighted.n, weighted.n_null, weighted.minimum) == (repeated.n, repeated.n_null, repeated.minimum)
    assert weighted.quantile(0.5) == pytest.approx(np.nanmedian(np.repeat(x, w)), rel=0.03)


def test_extremes():
    largest = np.finfo(np.float64).max
    sketch = sketch_of([-np.inf, -largest, 0.0, -0.0, 5e-324, largest, np.inf])
    assert sketch.counts.tolist() == [2, 3, 2]
    assert (sketch.minimum, sketch.maximum) == (-largest, largest)
    assert sketch.quantile(0.9) == pytest.approx(largest, rel=0.01)
    assert np.isfinite(sketch.quantile(0.01))


def test_empty_and_all_null():
    sketch = sketch_of([np.nan, np.nan])
    sketch.add([])
    assert (sketch.n, sketch.n_null, sketch.quantile(0.5)) == (0, 2, None)
    assert sketch.edges(10).tolist() == []
    assert sketch.histogram([]).tolist() == [0]


def test_json_and_pickle_keep_the_state():
    for weights in (None, np.full(3, 0.5)):
        sketch = sketch_of([1.5, -2.0, np.nan], weights)
        again = Sketch.from_json(sketch.to_json())
        assert again == sketch
        assert again.counts.dtype == sketch.counts.dtype
        assert pickle.loads(pickle.dumps(sketch)) == sketch


def test_a_count_in_batches_equals_one_of_all():
    x = np.random.default_rng(3).lognormal(size=200_000).astype(np.float32)
    parts = Sketch()
    for batch in np.array_split(x, 7):
        parts.add(batch)
    assert parts == sketch_of(x)


def test_psi_is_zero_for_the_same_shares_and_follows_the_formula():
    assert psi([10, 20, 30], [10, 20, 30]) == 0.0
    e, a = np.array([99.5, 299.5]), np.array([199.5, 199.5])
    shares = (e + 0.5) / (e + 0.5).sum(), (a + 0.5) / (a + 0.5).sum()
    assert psi(e, a) == pytest.approx(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    assert np.isfinite(psi([100, 0], [0, 100]))
    assert psi([0, 0], [1, 2]) is None


def test_drift_is_small_for_one_distribution_and_large_for_a_shifted_one():
    rng = np.random.default_rng(4)
    base = sketch_of(rng.normal(size=5_000))
    assert drift(base, sketch_of(rng.normal(size=5_000))) < 0.02
    assert drift(base, sketch_of(rng.normal(1.0, size=5_000))) > 0.25
    assert drift(base, Sketch()) is None


@pytest.mark.parametrize("weights", [None, 0.5])
def test_below_follows_the_cumulative_distribution(weights):
    x = np.random.default_rng(5).normal(size=50_000)
    sketch = sketch_of(x, None if weights is None else np.full(len(x), weights))
    points = np.linspace(-6, 6, 101)
    want = np.searchsorted(np.sort(x), points) * (weights or 1)
    assert sketch.below(points) == pytest.approx(want, abs=0.005 * len(x))
    assert sketch.below(points[[0, -1]]).tolist() == [0, sketch.n]
    assert (np.diff(sketch.below(np.linspace(-1, 1, 5_000))) >= 0).all()
    assert Sketch().below(points).tolist() == [0] * 101
