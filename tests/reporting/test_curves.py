import json

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from claydist.metrics import MetricSums, Outcome
from claydist.reporting.curves import curves


def curves_of(task: str, outcome: Outcome, **settings) -> dict:
    sums = MetricSums(task, **settings)
    sums.add(outcome)
    found = curves(sums)
    json.dumps(found, allow_nan=False)
    return found


def binary(n=5_000, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 3, n)
    return (rng.random(n) < p).astype(np.int8), p


def test_roc_and_precision_recall_lie_on_sklearns():
    y, p = binary()
    found = curves_of("binary", Outcome(y, p))
    fpr, tpr, _ = sk.roc_curve(y, p, drop_intermediate=False)
    roc = set(zip(fpr.tolist(), tpr.tolist(), strict=True))
    points = list(zip(found["roc"]["false_positive_rate"], found["roc"]["true_positive_rate"], strict=True))
    assert set(points) <= roc
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert 150 < len(points) <= 200
    assert sk.auc(*np.array(points).T) == pytest.approx(sk.roc_auc_score(y, p), abs=2e-3)

    precision, recall, _ = sk.precision_recall_curve(y, p)
    known = set(zip(recall.tolist(), precision.tolist(), strict=True))
    points = list(zip(found["precision_recall"]["recall"], found["precision_recall"]["precision"], strict=True))
    assert set(points) <= known
    assert 150 < len(points) <= 200


def test_calibration_is_sklearns_by_quantiles():
    y, p = binary(4_000, 1)
    found = curves_of("binary", Outcome(y, p))["calibration"]
    observed, predicted = calibration_curve(y, p, n_bins=20, strategy="quantile")
    assert found["predicted"] == pytest.approx(predicted, abs=2e-3)
    assert found["observed"] == pytest.approx(observed, abs=1e-2)
    assert found["rows"] == [200.0] * 20


def test_confusion_is_sklearns():
    y, p = binary()
    w = np.random.default_rng(2).random(len(y))
    want = sk.confusion_matrix(y, p >= 0.5, sample_weight=w)
    assert np.allclose(curves_of("binary", Outcome(y, p, w))["confusion"]["matrix"], want)
    rng = np.random.default_rng(3)
    y, P = rng.integers(0, 30, 900) // rng.integers(1, 3, 900), rng.dirichlet(np.ones(30), 900)
    found = curves_of("multiclass", Outcome(y, P), n_classes=30)["confusion"]
    whole = sk.confusion_matrix(y, P.argmax(axis=1), labels=range(30))
    assert found["matrix"] == whole[np.ix_(found["classes"], found["classes"])].tolist()
    assert set(found["classes"]) == set(np.sort(np.argsort(-np.bincount(y, minlength=30), kind="stable")[:20]))
    assert found["left_out"] == 10


def test_one_class_has_no_roc_and_no_rows_have_nothing():
    assert set(curves_of("binary", Outcome(np.zeros(3), np.ones(3) / 4))) == {"calibration", "confusion"}
    for task in ("binary", "multiclass", "regression", "ranking"):
        assert curves(MetricSums(task)) == {}


def test_residuals_and_deciles():
    rng = np.random.default_rng(4)
    mu = rng.lognormal(size=20_000)
    y = mu + rng.normal(size=20_000)
    found = curves_of("regression", Outcome(y, mu))
    edges, counts = found["residuals"]["edges"], np.array(found["residuals"]["counts"])
    assert counts == pytest.approx(np.histogram(y - mu, edges)[0], abs=60)
    assert counts.sum() == pytest.approx(0.99 * len(y), rel=0.01)
    order = np.argsort(mu)
    assert found["deciles"]["predicted"] == pytest.approx(mu[order].reshape(10, -1).mean(axis=1), rel=0.05)
    assert found["deciles"]["observed"] == pytest.approx(y[order].reshape(10, -1).mean(axis=1), abs=0.1)
    assert sum(found["deciles"]["rows"]) == len(y)


def test_perfect_regression_has_a_finite_histogram():
    found = curves_of("regression", Outcome(np.ones(5), np.ones(5)))
    assert sum(found["residuals"]["counts"]) == 5.0


def test_groups_are_counted_by_their_ndcg():
    group = np.repeat(np.arange(3, dtype=np.uint64), 2)
    found = curves_of("ranking", Outcome(np.array([1, 0, 1, 0, 0, 0]), np.array([2, 1, 1, 2, 1, 2.0]), group=group))
    counts = dict(zip(found["groups"]["edges"][:-1], found["groups"]["counts"], strict=True))
    assert {round(low, 2): n for low, n in counts.items() if n} == {0.0: 1.0, 0.6: 1.0, 0.95: 1.0}
