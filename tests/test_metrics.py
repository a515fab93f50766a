import json
import pickle
import warnings
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from claydist.errors import DataError
from claydist.metrics import (
    AUC_CLASSES,
    DEFAULT_METRIC,
    MetricSums,
    Outcome,
    better,
    constant_outcome,
    meets,
)

N = 600


def shards_of(outcome: Outcome, where: np.ndarray, n_shards: int) -> list[Outcome]:
    return [outcome.select(where == shard) for shard in range(n_shards)]


def sums_of(outcome: Outcome, task: str, n_batches: int = 3, **settings) -> MetricSums:
    sums = MetricSums(task, **settings)
    for batch in np.array_split(np.arange(len(outcome.y)), n_batches):
        sums.add(outcome.select(np.isin(np.arange(len(outcome.y)), batch)))
    return sums


def check_sharding(outcome: Outcome, task: str, want: dict[str, float], rng, **settings) -> None:
    """Every split of the rows over workers, and every order of merging, gives the reference values."""
    skewed = np.where(np.asarray(outcome.y) > np.median(outcome.y), 0, rng.integers(1, 5, len(outcome.y)))
    for where in (np.zeros(len(outcome.y), int), rng.integers(0, 5, len(outcome.y)), skewed):
        parts = [sums_of(shard, task, **settings) for shard in shards_of(outcome, where, 5)]
        for order in (parts, parts[::-1], [pickle.loads(pickle.dumps(part)) for part in parts]):
            total = reduce(add, order)
            values = total.values()
            assert total.n_rows == len(outcome.y)
            assert {name: values[name] for name in want} == pytest.approx(want, rel=1e-9, abs=1e-9, nan_ok=False)
            json.dumps(values)


def weights(kind: str, n: int, rng) -> np.ndarray | None:
    if kind == "none":
        return None
    w = rng.exponential(size=n)
    return np.where(rng.random(n) < 0.3, 0.0, w) if kind == "some zero" else w


def binary_reference(y, p, w) -> dict[str, float]:
    p = p.astype(np.float64)
    chosen = p >= 0.5
    return {
        "auc": sk.roc_auc_score(y, p, sample_weight=w),
        "average_precision": sk.average_precision_score(y, p, sample_weight=w),
        "logloss": sk.log_loss(y, p, sample_weight=w, labels=[0, 1]),
        "brier": sk.brier_score_loss(y, p, sample_weight=w),
        "accuracy": sk.accuracy_score(y, chosen, sample_weight=w),
        "precision": sk.precision_score(y, chosen, sample_weight=w, zero_division=0),
        "recall": sk.recall_score(y, chosen, sample_weight=w, zero_division=0),
        "f1": sk.f1_score(y, chosen, sample_weight=w, zero_division=0),
    }


@pytest.mark.parametrize("kind", ["none", "positive", "some zero"])
@pytest.mark.parametrize(("dtype", "n_distinct"), [(np.float32, N), (np.float64, 7), (np.float64, N)])
def test_binary_equals_sklearn_on_the_union(kind, dtype, n_distinct):
    rng = np.random.default_rng(0)
    y = (rng.random(N) < 0.2).astype(np.int8)
    levels = np.r_[0.0, 0.5, 1.0, rng.random(n_distinct - 3)].astype(dtype)
    p = np.where(rng.random(N) < 0.3, np.sort(levels)[-1 - (y == 0)], rng.choice(levels, N)).astype(dtype)
    outcome = Outcome(y, p, weights(kind, N, rng))
    check_sharding(outcome, "binary", binary_reference(y, p, outcome.w), rng)


def test_binary_without_weights_has_the_same_bits_however_the_rows_are_spread():
    rng = np.random.default_rng(1)
    outcome = Outcome(rng.integers(0, 2, N), rng.random(N).astype(np.float32))
    whole = sums_of(outcome, "binary").values()
    for n_shards in (2, 5):
        parts = [sums_of(part, "binary") for part in shards_of(outcome, rng.integers(0, n_shards, N), n_shards)]
        assert reduce(add, parts).values() == whole


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(rows):
    y, score, w = (np.array(column) for column in zip(*rows, strict=True))
    p, w = score / 4, w.astype(np.float64)
    pos, neg = y == 1, y == 0
    wins = (p[pos][:, None] > p[neg]) + 0.5 * (p[pos][:, None] == p[neg])
    pairs = w[pos][:, None] * w[neg]
    sums = MetricSums("binary")
    sums.add(Outcome(y, p, w))
    want = (wins * pairs).sum() / pairs.sum() if pairs.sum() else None
    assert sums.values()["auc"] == (None if want is None else pytest.approx(want, abs=1e-12))


def test_one_class_has_no_auc_and_a_worker_without_rows_adds_nothing():
    one = sums_of(Outcome(np.zeros(5, int), np.linspace(0, 0.4, 5)), "binary")
    assert (one.values()["auc"], one.values()["average_precision"]) == (None, None)
    assert one.values()["accuracy"] == 1.0
    assert (one + MetricSums("binary")).values() == one.values()
    for task in DEFAULT_METRIC:
        empty = MetricSums(task) + pickle.loads(pickle.dumps(MetricSums(task)))
        assert set(empty.values().values()) == {None}
        assert (empty.n_rows, empty.sum_w) == (0, 0.0)


def test_large_tables_are_compacted_to_their_distinct_scores():
    rng = np.random.default_rng(2)
    sums = MetricSums("binary")
    y, p = rng.integers(0, 2, 2_500_000, dtype=np.int8), rng.integers(0, 50, 2_500_000).astype(np.float32) / 50
    for start in range(0, len(y), 500_000):
        sums.add(Outcome(y[start : start + 500_000], p[start : start + 500_000]))
    assert len(pickle.dumps(sums)) < 3_000
    assert sums.values()["auc"] == pytest.approx(sk.roc_auc_score(y, p), rel=1e-9)


@pytest.mark.parametrize("kind", ["none", "positive", "some zero"])
def test_multiclass_equals_sklearn_on_the_union(kind):
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, N)
    P = rng.dirichlet(np.ones(4), N).round(2) + 1e-3
    P /= P.sum(axis=1, keepdims=True)
    w = weights(kind, N, rng)
    chosen, one_hot = P.argmax(axis=1), np.eye(4)[y]
    means = {"average": "macro", "sample_weight": w, "zero_division": 0}
    want = {
        "auc": sk.roc_auc_score(y, P, multi_class="ovr", average="macro", sample_weight=w),
        "average_precision": sk.average_precision_score(one_hot, P, average="macro", sample_weight=w),
        "logloss": sk.log_loss(y, P, sample_weight=w),
        "brier": sk.brier_score_loss(y, P, sample_weight=w),
        "accuracy": sk.accuracy_score(y, chosen, sample_weight=w),
        "precision": sk.precision_score(y, chosen, **means),
        "recall": sk.recall_score(y, chosen, **means),
        "f1": sk.f1_score(y, chosen, **means),
    }
    check_sharding(Outcome(y, P, w), "multiclass", want, rng, n_classes=4)


def test_multiclass_means_take_the_classes_that_occur_as_sklearn_does():
    y, P = np.array([0, 0, 1, 1]), np.eye(5)[[0, 3, 1, 0]] * 0.9 + 0.02
    values = sums_of(Outcome(y, P), "multiclass", 2, n_classes=5).values()
    assert values["f1"] == pytest.approx(sk.f1_score(y, P.argmax(axis=1), average="macro"))
    assert values["auc"] is None
    many = AUC_CLASSES + 1
    assert sums_of(Outcome(np.arange(many), np.eye(many)), "multiclass", n_classes=many).values()["auc"] is None


def test_multiclass_refuses_a_label_without_a_class():
    with pytest.raises(DataError, match=r"labels 0\.\.2.*found labels 0\.\.3"):
        MetricSums("multiclass", n_classes=3).add(Outcome(np.array([0, 3]), np.full((2, 3), 1 / 3)))


@pytest.mark.parametrize("kind", ["none", "positive", "some zero"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_regression_equals_sklearn_on_the_union(kind, offset):
    rng = np.random.default_rng(4)
    mu = offset + rng.gamma(2.0, size=N)
    y = offset + np.floor(rng.poisson(mu - offset)).astype(np.float64)
    Q = np.stack([mu - 1, mu, mu + 2], axis=1)
    w = weights(kind, N, rng)
    levels = (0.1, 0.5, 0.9)
    want = {
        "rmse": sk.root_mean_squared_error(y, mu, sample_weight=w),
        "mae": sk.mean_absolute_error(y, mu, sample_weight=w),
        "r2": sk.r2_score(y, mu, sample_weight=w),
        "mape": sk.mean_absolute_percentage_error(y, mu, sample_weight=w),
        "poisson_deviance": sk.mean_poisson_deviance(y, mu, sample_weight=w),
        "pinball": np.mean([sk.mean_pinball_loss(y, Q[:, i], sample_weight=w, alpha=q) for i, q in enumerate(levels)]),
    }
    check_sharding(Outcome(y, mu, w, quantiles=Q), "regression", want, rng, quantiles=levels)


def test_regression_leaves_out_what_is_not_defined():
    y, mu = np.array([1.0, -1.0, 2.0]), np.array([0.5, 0.1, 0.3])
    assert set(sums_of(Outcome(y, mu), "regression").values()) == {"rmse", "mae", "r2", "mape"}
    assert sums_of(Outcome(y[:1], mu[:1]), "regression", 1).values()["r2"] is None
    constant = np.full(4, 2.0)
    for prediction in (constant, constant + 1):
        got = sums_of(Outcome(constant, prediction), "regression", 2).values()["r2"]
        assert got == sk.r2_score(constant, prediction)


def ranking(rng, kind="none", n_groups=40):
    group = rng.integers(0, n_groups, N).astype(np.uint64) * np.uint64(2**58 + 7)
    y = rng.integers(0, 4, N).astype(np.float64)
    score = rng.integers(0, 9, N).astype(np.float32) / 3
    _, at = np.unique(group, return_inverse=True)
    w = weights(kind, n_groups, rng)
    return Outcome(y, score, None if w is None else w[at], group)


@pytest.mark.parametrize("kind", ["none", "positive", "some zero"])
def test_ndcg_is_the_mean_of_sklearns_over_groups(kind):
    rng = np.random.default_rng(5)
    outcome = ranking(rng, kind)
    outcome.y[outcome.group == outcome.group.min()] = 0.0
    groups = [outcome.select(outcome.group == g) for g in np.unique(outcome.group)]
    w = None if outcome.w is None else [g.w[0] for g in groups]
    want = {
        f"ndcg{at}": np.average([sk.ndcg_score([g.y], [g.prediction], k=k) for g in groups], weights=w)
        for at, k in {"": None, "@1": 1, "@5": 5}.items()
    }
    check_sharding(outcome, "ranking", want, rng, depths=(1, 5))


def test_map_is_the_mean_over_all_orders_of_equal_scores():
    rng = np.random.default_rng(6)
    outcome = ranking(rng, n_groups=70)

    def average_precision(hits, k):
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        return (precision * hits)[:k].sum() / max(min(hits.sum(), k), 1)

    def expected(g, k):
        orders = (np.lexsort((rng.random(len(g.y)), -g.prediction)) for _ in range(1500))
        return np.mean([average_precision((g.y > 0)[order], k) for order in orders])

    picked = np.unique(outcome.group)[:3]
    outcome = outcome.select(np.isin(outcome.group, picked))
    groups = [outcome.select(outcome.group == g) for g in picked]
    values = sums_of(outcome, "ranking", depths=(3,)).values()
    assert values["map"] == pytest.approx(np.mean([expected(g, len(g.y)) for g in groups]), abs=0.01)
    assert values["map@3"] == pytest.approx(np.mean([expected(g, 3) for g in groups]), abs=0.01)


@pytest.mark.parametrize("metric", ["map", "map@1", "map@3", "map@5"])
def test_map_is_xgboosts_where_no_scores_are_equal(metric):
    import xgboost as xgb

    rng = np.random.default_rng(7)
    y, score = rng.integers(0, 2, 60).astype(np.float64), rng.permutation(60).astype(np.float32)
    sizes = [10, 5, 25, 20]
    y[::5] = 1.0
    rows = xgb.DMatrix(np.zeros((60, 1)), label=y, group=sizes, base_margin=score)
    history: dict = {}
    params = {"objective": "rank:pairwise", "eval_metric": metric, "eta": 0, "nthread": 1}
    xgb.train(params, rows, 1, evals=[(rows, "rows")], evals_result=history, verbose_eval=False)
    outcome = Outcome(y, score, group=np.repeat(np.arange(4, dtype=np.uint64), sizes))
    values = sums_of(outcome, "ranking", depths=(1, 3, 5)).values()
    assert values[metric] == pytest.approx(history["rows"][metric][0], rel=1e-6)


def test_ranking_has_the_same_bits_however_groups_are_spread():
    rng = np.random.default_rng(8)
    outcome = ranking(rng)
    whole = sums_of(outcome, "ranking").values()
    parts = [sums_of(part, "ranking") for part in shards_of(outcome, rng.integers(0, 4, N), 4)]
    assert reduce(add, parts[::-1]).values() == whole


def test_ranking_of_single_rows_and_bad_input():
    group = np.arange(2, dtype=np.uint64)
    values = sums_of(Outcome(np.array([3.0, 0.0]), np.zeros(2), group=group), "ranking").values()
    assert values == {"ndcg": 0.5, "map": 0.5}
    with pytest.raises(DataError, match=r"data\.group"):
        MetricSums("ranking").add(Outcome(np.ones(2), np.ones(2)))
    with pytest.raises(DataError, match=r"relevance of 0 or more, found -1\.0"):
        MetricSums("ranking").add(Outcome(np.array([-1, 1]), np.ones(2), group=group))


def test_nan_predictions_and_unlike_sums_are_refused():
    with pytest.raises(DataError, match="NaN in 1 of 2"):
        MetricSums("regression").add(Outcome(np.zeros(2), np.array([0.0, np.nan])))
    with pytest.raises(ValueError, match="do not add"):
        MetricSums("ranking", depths=[5]) + MetricSums("ranking", depths=[10])


def test_baselines_are_the_constant_models():
    rng = np.random.default_rng(9)
    y, w = rng.integers(0, 3, 50), rng.random(50)
    shares = np.bincount(y, weights=w) / w.sum()
    multi = constant_outcome(Outcome(y, np.zeros((50, 3)), w), "multiclass", shares)
    entropy = -(shares * np.log(shares)).sum()
    assert sums_of(multi, "multiclass", n_classes=3).values()["logloss"] == pytest.approx(entropy)

    share = np.average(y > 0, weights=w)
    binary = sums_of(constant_outcome(Outcome(y > 0, w, w), "binary", [share]), "binary").values()
    assert binary["auc"] == 0.5
    assert binary["brier"] == pytest.approx(share * (1 - share))

    quantiles = Outcome(y * 1.0, w, w, quantiles=np.zeros((50, 2)))
    flat = constant_outcome(quantiles, "regression", [np.average(y, weights=w), 0.0, 2.0])
    values = sums_of(flat, "regression", quantiles=(0.1, 0.9)).values()
    assert values["r2"] == pytest.approx(0.0, abs=1e-12)
    assert values["pinball"] == pytest.approx(
        (sk.mean_pinball_loss(y, y * 0.0, sample_weight=w, alpha=0.1)
         + sk.mean_pinball_loss(y, y * 0.0 + 2, sample_weight=w, alpha=0.9)) / 2
    )  # fmt: skip
    ranked = ranking(rng)
    assert set(constant_outcome(ranked, "ranking", []).prediction) == {0.0}


def test_directions_and_bounds():
    assert [better(m) for m in ("auc", "ndcg@5", "r2", "rmse", "logloss", "pinball")] == [1, 1, 1, -1, -1, -1]
    assert meets(0.8, at_least=0.8)
    assert not meets(0.79, at_least=0.8)
    assert meets(0.8, at_most=0.8)
    assert not meets(0.81, at_most=0.8)
    assert not meets(None, at_least=0.0)
    assert not meets(float("nan"), at_most=1.0)


def test_no_warning_of_numpy_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums_of(Outcome(np.array([0, 1]), np.array([1.0, 0.0]), np.zeros(2)), "binary").values()
        sums_of(Outcome(np.array([0.0, 1]), np.array([0.0, 1.0]), np.zeros(2)), "regression").values()
