from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression, LogisticRegression, PoissonRegressor
from sklearn.linear_model import Ridge as SklearnRidge
from workers import Rows, Total, alone, labelled, make_rows, run_workers

from claydist.errors import DataError, TrainingError
from claydist.models import linear
from claydist.models.linear import LinearFit, fit_linear
from claydist.models.losses import LOSSES
from claydist.spec import LinearSpec

SIZES, N_ONEHOT, N_DENSE = (4, 6), 10, 5
N_OUTPUTS = {"squared": 1, "logistic": 1, "poisson": 1, "multinomial": 3}


def rows_for(loss: str, n_rows: int = 600, *, weighted: bool = True) -> Rows:
    return labelled(make_rows(0, n_rows, N_DENSE, SIZES, weighted=weighted), loss, N_ONEHOT)


def fit(
    chunks: Sequence[Rows],
    loss: str,
    total: Total = alone,
    *,
    n_dense: int = N_DENSE,
    n_onehot: int = N_ONEHOT,
    **kwargs,
) -> LinearFit:
    call = {key: kwargs.pop(key) for key in ("progress", "n_threads") if key in kwargs}
    spec = LinearSpec(kind="linear", **kwargs)
    n_outputs = N_OUTPUTS[loss]
    return fit_linear(
        chunks, spec=spec, loss=loss, n_dense=n_dense, n_onehot=n_onehot, n_outputs=n_outputs, total=total, **call
    )


def violation(found: LinearFit, rows: Rows, loss: str, l1: float, l2: float) -> float:
    """Distance from optimality, by plain dense arithmetic."""
    Z, w = rows.onehot(N_ONEHOT), np.ones(rows.n_rows) if rows.w is None else rows.w
    raw = Z @ found.model.coef.T + found.model.intercept
    g = LOSSES[loss].gradient(LOSSES[loss].evaluate(raw, rows.y)[1], rows.y) * (w / w.sum())[:, None]
    coef, gradient = found.model.coef, g.T @ Z + l2 / w.sum() * found.model.coef
    inner = np.maximum(np.abs(gradient) - l1 / w.sum(), 0)
    outer = np.abs(gradient + l1 / w.sum() * np.sign(coef))
    return max(np.where(coef == 0, inner, outer).max(), np.abs(g.sum(axis=0)).max())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
def test_logistic_is_that_of_scikit_learn(l2: float, weighted: bool) -> None:
    rows = rows_for("logistic", weighted=weighted)
    w = np.ones(rows.n_rows) if rows.w is None else rows.w
    mean = np.average(rows.X, axis=0, weights=w)
    scale = np.sqrt(np.average((rows.X - mean) ** 2, axis=0, weights=w))
    rows = replace(rows, X=(rows.X - mean) / scale)
    reference = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12)
    reference.fit(rows.onehot(N_ONEHOT), rows.y, sample_weight=rows.w)
    found = fit(rows.cut(250), "logistic", l2=l2)
    assert found.converged
    np.testing.assert_allclose(found.model.coef, reference.coef_, rtol=1e-6)
    np.testing.assert_allclose(found.model.intercept, reference.intercept_, rtol=1e-6)


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "proximal"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_solver_ends_at_the_reference(loss: str, solver: str) -> None:
    rows, l2 = rows_for(loss), 2.0
    Z = rows.onehot(N_ONEHOT)
    logistic = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12)
    reference = {
        "squared": SklearnRidge(alpha=l2),
        "logistic": logistic,
        "multinomial": logistic,
        "poisson": PoissonRegressor(alpha=l2 / rows.w.sum(), solver="newton-cholesky", tol=1e-12),
    }[loss].fit(Z, rows.y, sample_weight=rows.w)
    found = fit(rows.cut(250), loss, l2=l2, solver=solver, tolerance=1e-10)
    assert found.converged
    assert found.gradient_max <= 1e-10
    np.testing.assert_allclose(found.model.coef, np.atleast_2d(reference.coef_), rtol=1e-6, atol=1e-8)
    expected = reference.intercept_ - np.mean(reference.intercept_) * (loss == "multinomial")  # softmax keeps shifts
    np.testing.assert_allclose(found.model.intercept, np.atleast_1d(expected), rtol=1e-6, atol=1e-8)
    raw = found.model.raw(rows.X, rows.codes)
    proba = {"logistic": [1], "multinomial": [0, 1, 2]}.get(loss)
    wanted = reference.predict(Z)[:, None] if proba is None else reference.predict_proba(Z)[:, proba]
    np.testing.assert_allclose(found.model.mean(raw), wanted, rtol=1e-6)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("l1", "l2"), [(5.0, 0.0), (40.0, 0.0), (20.0, 10.0)])
def test_lasso_and_elastic_net_are_those_of_scikit_learn(
    l1: float, l2: float, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:
        monkeypatch.setattr(linear, "_NEWTON_PARAMS", 0)
    rows = rows_for("squared", weighted=False)
    n, alpha = rows.n_rows, (l1 + l2) / rows.n_rows
    options = {"alpha": alpha, "tol": 1e-12, "max_iter": 100_000}
    reference = Lasso(**options) if l2 == 0 else ElasticNet(l1_ratio=l1 / (n * alpha), **options)
    reference.fit(rows.onehot(N_ONEHOT), rows.y)
    found = fit(rows.cut(250), "squared", l1=l1, l2=l2, tolerance=1e-10)
    assert found.converged
    np.testing.assert_allclose(found.model.coef[0], reference.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.model.intercept[0], reference.intercept_, rtol=1e-6, atol=1e-8)
    assert np.array_equal(found.model.coef[0] == 0, reference.coef_ == 0)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_l1_ends_where_the_optimality_conditions_hold(loss: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        monkeypatch.setattr(linear, "_NEWTON_PARAMS", 0)
    rows = rows_for(loss)
    found = fit(rows.cut(250), loss, l1=15.0, l2=1.0)
    assert found.converged
    assert violation(found, rows, loss, 15.0, 1.0) <= 1.01e-8
    assert 0 < (found.model.coef == 0).sum() < found.model.coef.size


def test_l1_logistic_is_that_of_scikit_learn() -> None:
    rows = rows_for("logistic")
    reference = LogisticRegression(C=1 / 10, l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=10_000, random_state=0)
    reference.fit(rows.onehot(N_ONEHOT), rows.y, sample_weight=rows.w)
    found = fit(rows.cut(250), "logistic", l1=10.0, l2=0.0)
    np.testing.assert_allclose(found.model.coef, reference.coef_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.model.intercept, reference.intercept_, rtol=1e-6)


def test_enough_l1_leaves_only_intercepts() -> None:
    rows = rows_for("logistic")
    found = fit([rows], "logistic", l1=1e4, l2=0.0)
    assert found.converged
    assert not found.model.coef.any()
    share = np.average(rows.y, weights=rows.w)
    assert found.model.intercept[0] == pytest.approx(np.log(share / (1 - share)))


def test_elastic_net_without_l1_is_ridge() -> None:
    rows = rows_for("squared")
    ridge, net = (fit([rows], "squared", l2=3.0, solver=solver) for solver in ("newton", "proximal"))
    np.testing.assert_allclose(net.model.coef, ridge.model.coef, rtol=1e-10)


@pytest.mark.parametrize("options", [{"solver": "newton"}, {"solver": "lbfgs"}, {"l1": 5.0}], ids=str)
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_any_number_of_workers_gives_the_same(loss: str, options: dict) -> None:
    rows = rows_for(loss, 300)
    options = {"tolerance": 1e-10, **options}
    one = fit(rows.cut(100), loss, **options)
    shards = ([rows.cut(100)[:1], rows.cut(100)[1:]], [rows.cut(40)[:3], [], rows.take(slice(120, None)).cut(77)])
    for split in shards:
        fits = run_workers(split, lambda shard, total: fit(shard, loss, total, **options))
        for other in fits:
            assert np.array_equal(other.model.coef, fits[0].model.coef)
            assert np.array_equal(other.model.intercept, fits[0].model.intercept)
            assert (other.history, other.gradient_max) == (fits[0].history, fits[0].gradient_max)
            np.testing.assert_allclose(other.model.coef, one.model.coef, rtol=1e-6, atol=1e-8)
            assert other.converged


def test_workers_whose_arithmetic_differs_stay_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    # LAPACK on another CPU: the direction of one worker differs in its last bits
    solve = linear.NewtonModel.direction
    offs = iter(1 + 1e-13 * np.arange(1000.0))
    monkeypatch.setattr(linear.NewtonModel, "direction", lambda *args: solve(*args) * next(offs))
    rows = rows_for("logistic", 300)
    fits = run_workers([[rows.take(slice(0, 100))], [rows.take(slice(100, None))]], lambda s, t: fit(s, "logistic", t))
    assert np.array_equal(fits[0].model.coef, fits[1].model.coef)
    assert fits[0].history == fits[1].history


def test_same_workers_give_the_same_bits() -> None:
    rows = rows_for("poisson")
    first, second = (fit(rows.cut(250), "poisson") for _ in range(2))
    assert np.array_equal(first.model.coef, second.model.coef)
    assert first.history == second.history


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_weight_two_is_the_row_twice_and_zero_is_no_row(loss: str) -> None:
    rows = rows_for(loss, 300)
    counts = np.random.default_rng(7).integers(0, 4, 300)
    weighted = fit([replace(rows, w=counts.astype(float))], loss, tolerance=1e-10)
    repeated = fit([replace(rows, w=None).take(np.repeat(np.arange(300), counts))], loss, tolerance=1e-10)
    np.testing.assert_allclose(weighted.model.coef, repeated.model.coef, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_wildly_scaled_weights_converge(loss: str) -> None:
    rows = rows_for(loss)
    rows = replace(rows, w=10.0 ** np.random.default_rng(8).uniform(-8, 8, rows.n_rows))
    found = fit(rows.cut(250), loss, l2=1.0)
    assert found.converged
    assert violation(found, rows, loss, 0.0, 1.0) <= 1.01e-8


@pytest.mark.parametrize("loss", ["squared", "poisson", "logistic"])
def test_offset_is_a_feature_of_coefficient_one(loss: str) -> None:
    rows = rows_for(loss)
    offset = np.random.default_rng(9).normal(size=rows.n_rows)
    found = fit(replace(rows, offset=offset).cut(250), loss, l2=2.0)
    raw = found.model.raw(rows.X, rows.codes, offset)
    np.testing.assert_allclose(raw - found.model.raw(rows.X, rows.codes), offset[:, None], atol=1e-12)
    g = LOSSES[loss].gradient(found.model.mean(raw), rows.y)[:, 0] * rows.w / rows.w.sum()
    gradient = g @ rows.onehot(N_ONEHOT) + 2.0 / rows.w.sum() * found.model.coef[0]
    assert max(np.abs(gradient).max(), abs(g.sum())) <= 1.01e-8


def test_poisson_with_exposure_is_rates_with_weights() -> None:
    rows, exposure = rows_for("poisson"), np.random.default_rng(10).gamma(2.0, 100.0, 600)
    found = fit([replace(rows, offset=np.log(exposure), w=None)], "poisson", l2=2.0, tolerance=1e-7)
    rates = fit([replace(rows, y=rows.y / exposure, w=exposure)], "poisson", l2=2.0, tolerance=1e-10)
    np.testing.assert_allclose(found.model.coef, rates.model.coef, rtol=1e-5)


def test_collinear_least_squares_has_the_shortest_coefficients() -> None:
    rows = rows_for("squared", weighted=False)
    X = np.column_stack([rows.X, rows.X[:, 0], rows.X[:, 1] + rows.X[:, 2], np.zeros(600)])
    full = replace(rows, X=X, codes=np.maximum(rows.codes, [[0, 4]]))  # the one-hot of a column sums to one
    reference = LinearRegression().fit(full.onehot(N_ONEHOT), full.y)
    found = fit(full.cut(250), "squared", l2=0.0, n_dense=8)
    assert found.converged
    assert found.n_iter <= 2
    np.testing.assert_allclose(found.model.coef[0], reference.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.model.intercept[0], reference.intercept_, rtol=1e-6)


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "proximal"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_collinear_and_constant_columns_without_penalty_converge(loss: str, solver: str) -> None:
    rows = rows_for(loss)
    regular = fit([rows], loss, l2=0.0)
    X = np.column_stack([rows.X, rows.X[:, 0], np.zeros(600), np.ones(600)])
    found = fit([replace(rows, X=X)], loss, l2=0.0, solver=solver, n_dense=8)
    assert found.converged
    means, expected = (f.model.mean(f.model.raw(matrix, rows.codes)) for f, matrix in ((found, X), (regular, rows.X)))
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


def test_separable_classes_with_l2_have_finite_coefficients() -> None:
    X = np.concatenate([np.linspace(-2, -1, 20), np.linspace(1, 2, 20)])[:, None]
    rows = Rows(X, np.zeros((40, 0), np.int32), (X[:, 0] > 0).astype(float))
    reference = LogisticRegression(C=1e4, solver="newton-cholesky", tol=1e-12).fit(X, rows.y)
    found = fit([rows], "logistic", n_dense=1, n_onehot=0, l2=1e-4, tolerance=1e-12)
    assert found.converged
    np.testing.assert_allclose(found.model.coef, reference.coef_, rtol=1e-6)


def test_separable_classes_without_l2_end() -> None:
    X = np.concatenate([np.linspace(-2, -1, 20), np.linspace(1, 2, 20)])[:, None]
    rows = Rows(X, np.zeros((40, 0), np.int32), (X[:, 0] > 0).astype(float))
    found = fit([rows], "logistic", n_dense=1, n_onehot=0, l2=0.0)
    assert found.converged
    assert np.isfinite(found.model.coef).all()


def test_coefficient_is_exact_where_the_objective_is_flat() -> None:
    # the gradient of this column is below the tolerance from the start, and its coefficient is 250
    X = np.zeros((600, 1))
    X[7] = 1e-5
    rows = Rows(X, np.zeros((600, 0), np.int32), np.arange(600.0) % 2)
    reference = LogisticRegression(C=1e8, solver="newton-cholesky", tol=1e-15).fit(X, rows.y)
    assert abs(reference.coef_[0, 0]) > 100
    found = fit([rows], "logistic", l2=1e-8, n_dense=1, n_onehot=0)
    np.testing.assert_allclose(found.model.coef, reference.coef_, rtol=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "multinomial"])
def test_threads_do_not_change_a_bit(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claydist.models.objective._PART_ROWS", 50)
    rows = rows_for(loss, 20_000)
    fits = [fit([rows], loss, n_threads=n_threads) for n_threads in (1, 2, 5)]
    for other in fits[1:]:
        assert np.array_equal(other.model.coef, fits[0].model.coef)
        assert other.history == fits[0].history


def test_large_counts_do_not_overflow() -> None:
    rows = rows_for("poisson", weighted=False)
    rows = replace(rows, y=np.round(1e6 * np.exp(3 * rows.X[:, 0])))
    for solver in ("newton", "lbfgs"):
        found = fit([rows], "poisson", solver=solver, tolerance=1e-2)
        assert found.converged
        assert found.model.coef[0, 0] == pytest.approx(3.0, abs=0.01)


def test_no_features_give_the_mean() -> None:
    rows = Rows(np.zeros((4, 0)), np.zeros((4, 0), np.int32), np.array([0.0, 1.0, 1.0, 1.0]))
    found = fit([rows], "logistic", n_dense=0, n_onehot=0)
    assert found.converged
    np.testing.assert_allclose(found.model.mean(found.model.raw(rows.X, rows.codes)), 0.75)


def test_only_categoricals_work() -> None:
    rows = replace(rows_for("logistic"), X=np.zeros((600, 0)))
    found = fit(rows.cut(250), "logistic", n_dense=0, l2=1.0)
    reference = LogisticRegression(C=1, solver="newton-cholesky", tol=1e-12)
    reference.fit(rows.onehot(N_ONEHOT), rows.y, sample_weight=rows.w)
    np.testing.assert_allclose(found.model.coef, reference.coef_, rtol=1e-6)


def test_logistic_with_several_outputs_is_multinomial() -> None:
    rows = rows_for("multinomial")
    spec = LinearSpec(kind="linear")
    found = fit_linear([rows], spec=spec, loss="logistic", n_dense=N_DENSE, n_onehot=N_ONEHOT, n_outputs=3, total=alone)
    assert found.model.loss == "multinomial"
    assert np.array_equal(found.model.coef, fit([rows], "multinomial").model.coef)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_progress_tells_each_step_and_a_fit_anew_gives_the_same_bytes(solver: str) -> None:
    rows, steps = rows_for("multinomial"), []
    options = {"solver": solver, "l2": 1.0, "tolerance": 1e-10}
    whole = fit([rows], "multinomial", progress=lambda *step: steps.append(step), **options)
    assert [n_iter for n_iter, _ in steps] == list(range(1, whole.n_iter + 1))
    assert [value for _, value in steps] == list(whole.history[1:])
    # A resumed run has nothing but this: it fits from the start again.
    again = fit([rows], "multinomial", **options)
    assert again.model.coef.tobytes() == whole.model.coef.tobytes()


def test_too_few_iterations_are_told() -> None:
    found = fit([rows_for("poisson")], "poisson", max_iter=1)
    assert not found.converged
    assert found.gradient_max > 1e-8


@pytest.mark.parametrize(
    ("loss", "field", "value", "message"),
    [
        ("poisson", "y", -1.0, "label: expected numbers that are finite and not negative, found 2 others in 300 rows"),
        ("logistic", "y", 2.0, "label: expected 0 and 1, found 2 others in 300 rows"),
        ("multinomial", "y", 3.0, "label: expected class numbers .* found 2 others"),
        ("squared", "y", np.nan, "label: expected finite numbers, found 2 others"),
        ("squared", "w", -0.5, "weight: expected finite numbers that are not negative, found 2 others"),
        ("squared", "offset", np.inf, "offset: expected finite numbers, found 2 others"),
    ],
)
def test_bad_rows_are_counted_over_all_workers(loss: str, field: str, value: float, message: str) -> None:
    rows = rows_for(loss, 300)
    rows = replace(rows, offset=np.zeros(300))
    column = getattr(rows, field).copy()
    column[[10, 290]] = value
    rows = replace(rows, **{field: column})
    for shards in ([rows.cut(100)], [rows.cut(150)[:1], [], rows.cut(150)[1:]]):
        with pytest.raises(DataError, match=message):
            run_workers(shards, lambda shard, total: fit(shard, loss, total))


@pytest.mark.parametrize("rows", [[], [Rows(np.zeros((2, 5)), np.zeros((2, 2), np.int32), np.ones(2), np.zeros(2))]])
def test_no_weight_at_all_is_refused(rows: list[Rows]) -> None:
    with pytest.raises(DataError, match=r"weight: expected a positive sum, found 0\.0"):
        fit(rows, "squared")


def test_newton_with_too_many_coefficients_is_refused() -> None:
    rows = replace(rows_for("squared"), X=np.zeros((600, 0)))
    with pytest.raises(TrainingError, match="newton takes up to 10000 coefficients, found 20001; use lbfgs or auto"):
        fit([rows], "squared", n_dense=0, n_onehot=20_000, solver="newton")


@pytest.mark.parametrize("l1", [0.0, 3.0])
def test_thousands_of_categories_converge(l1: float) -> None:
    rows = labelled(make_rows(1, 4000, 3, (2500, 10)), "logistic", 2510)
    found = fit(rows.cut(1000), "logistic", n_dense=3, n_onehot=2510, l1=l1, l2=1.0)
    assert found.converged
    assert found.gradient_max <= 1e-8
