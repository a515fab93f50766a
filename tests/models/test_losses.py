from __future__ import annotations

import numpy as np
import pytest

from claydist.models.losses import LOSSES

N_OUTPUTS = {"squared": 1, "logistic": 1, "poisson": 1, "multinomial": 4}
pytestmark = pytest.mark.parametrize("name", sorted(LOSSES))


def draw(name: str, n_rows: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    raw = 2 * rng.normal(size=(n_rows, N_OUTPUTS[name]))
    y = {
        "squared": rng.normal(size=n_rows),
        "logistic": rng.integers(0, 2, n_rows),
        "poisson": rng.poisson(2.0, n_rows),
        "multinomial": rng.integers(0, 4, n_rows),
    }[name]
    return raw, y.astype(np.float64)


def shifted(raw: np.ndarray, k: int, by: float) -> np.ndarray:
    raw = raw.copy()
    raw[:, k] += by
    return raw


def test_gradient_is_the_finite_difference_of_the_loss(name: str) -> None:
    loss, (raw, y) = LOSSES[name], draw(name)
    gradient = loss.gradient(loss.evaluate(raw, y)[1], y)
    for k in range(N_OUTPUTS[name]):
        above, below = (loss.evaluate(shifted(raw, k, by), y)[0] for by in (1e-6, -1e-6))
        np.testing.assert_allclose(gradient[:, k], (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


def test_curvature_is_the_finite_difference_of_the_gradient(name: str) -> None:
    loss, (raw, y) = LOSSES[name], draw(name)
    mean = loss.evaluate(raw, y)[1]
    for j in range(N_OUTPUTS[name]):
        above, below = (loss.gradient(loss.evaluate(shifted(raw, j, by), y)[1], y) for by in (1e-6, -1e-6))
        for i in range(N_OUTPUTS[name]):
            expected = (above - below)[:, i] / 2e-6
            np.testing.assert_allclose(loss.curvature(mean, i, j), expected, rtol=1e-6, atol=1e-8)


def test_loss_is_that_of_scikit_learn_but_for_a_constant(name: str) -> None:
    from sklearn._loss import HalfBinomialLoss, HalfMultinomialLoss, HalfPoissonLoss, HalfSquaredError

    reference = {
        "squared": HalfSquaredError(),
        "logistic": HalfBinomialLoss(),
        "poisson": HalfPoissonLoss(),
        "multinomial": HalfMultinomialLoss(n_classes=4),
    }[name]
    raw, y = draw(name)
    expected = reference.loss(y, raw if name == "multinomial" else raw[:, 0].copy())
    np.testing.assert_allclose(LOSSES[name].evaluate(raw, y)[0], expected, rtol=1e-12, atol=1e-12)


def test_means_of_prediction_and_of_training_agree(name: str) -> None:
    raw, y = draw(name)
    np.testing.assert_allclose(LOSSES[name].mean(raw), LOSSES[name].evaluate(raw, y)[1], rtol=1e-14)


def test_far_from_zero_nothing_overflows(name: str) -> None:
    raw, y = draw(name)
    if name == "poisson":
        raw = np.minimum(raw, 0)  # its loss is infinite on the other side
    value, mean = LOSSES[name].evaluate(400 * raw, y)
    assert np.isfinite(value).all()
    assert np.isfinite(mean).all()
    assert np.isfinite(LOSSES[name].mean(400 * raw)).all()


def test_mean_of_a_row_has_the_same_bits_in_every_batch(name: str) -> None:
    raw = np.asfortranarray(np.random.default_rng(5).normal(size=(200, N_OUTPUTS[name])) * 10)
    whole = LOSSES[name].mean(raw)
    for n_rows in range(1, 68):
        for start in (0, 1, 2, 3, 5, 8, 61):
            for rows in (raw[start : start + n_rows], np.ascontiguousarray(raw[start : start + n_rows])):
                assert np.array_equal(LOSSES[name].mean(rows), whole[start : start + n_rows])
    strided = np.repeat(raw, 3, axis=0)[::3]
    assert np.array_equal(LOSSES[name].mean(strided), whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.5, 4.0])
def test_labels_that_the_loss_does_not_know_are_found(name: str, value: float) -> None:
    known = {
        "squared": np.isfinite(value),
        "logistic": False,
        "poisson": np.isfinite(value) and value >= 0,
        "multinomial": False,
    }[name]
    bad = LOSSES[name].bad_labels(np.array([0.0, 1.0, value]), 4)
    assert bad.tolist() == [False, False, not known]


def test_start_is_the_best_intercept_without_features(name: str) -> None:
    loss, y = LOSSES[name], draw(name)[1]
    if name == "multinomial":  # one number cannot say the shares of its classes: all start equal
        assert loss.start(1.5, 0.5) == 0.0
        return
    raw = np.full((len(y), 1), loss.start(float(y.mean()), 0.5) + 0.5)
    assert abs(loss.gradient(loss.evaluate(raw, y)[1], y).mean()) < 1e-14
