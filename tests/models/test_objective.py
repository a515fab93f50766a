from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from workers import Rows, alone, labelled, make_rows, run_workers

from claydist.models.losses import LOSSES
from claydist.models.objective import Objective, Shape
from claydist.models.penalties import Ridge

SIZES, N_ONEHOT, N_DENSE = (4, 6), 10, 5
N_OUTPUTS = {"squared": 1, "logistic": 1, "poisson": 1, "multinomial": 3}


def rows_for(loss: str, n_rows: int) -> Rows:
    return labelled(make_rows(0, n_rows, N_DENSE, SIZES, weighted=True), loss, N_ONEHOT)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_derivatives_are_finite_differences(loss: str) -> None:
    rows = rows_for(loss, 60)
    rows = replace(rows, offset=np.linspace(-1, 1, 60))
    shape = Shape(N_DENSE, N_ONEHOT, N_OUTPUTS[loss])
    ridge = Ridge(np.linspace(0, 1, shape.n_params))
    objective = Objective(rows.cut(25), LOSSES[loss], ridge, shape=shape, sum_w=float(rows.w.sum()), total=alone)
    rng = np.random.default_rng(6)
    params, direction = 0.3 * rng.normal(size=(2, shape.n_params))
    point = objective.evaluate(params, hessian=True)
    steps = 1e-6 * np.eye(shape.n_params)
    around = [(objective.evaluate(params + step), objective.evaluate(params - step)) for step in steps]
    np.testing.assert_allclose(point.gradient, [(a.value - b.value) / 2e-6 for a, b in around], atol=1e-8)
    np.testing.assert_allclose(point.hessian, [(a.gradient - b.gradient) / 2e-6 for a, b in around], atol=1e-8)
    np.testing.assert_allclose(objective.diagonal(params), np.diag(point.hessian), rtol=1e-12)
    along = objective.along(params, direction)
    assert along(0.7) == pytest.approx(objective.evaluate(params + 0.7 * direction).value, rel=1e-13)


def test_blocks_within_a_chunk_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shape = rows_for("logistic", 100), Shape(N_DENSE, N_ONEHOT, 1)
    objective = Objective(
        [rows], LOSSES["logistic"], Ridge(np.zeros(shape.n_params)), shape=shape, sum_w=1.0, total=alone
    )
    expected = objective.evaluate(np.ones(shape.n_params), hessian=True).hessian
    monkeypatch.setattr("claydist.models.objective._BLOCK_ROWS", 7)
    found = objective.evaluate(np.ones(shape.n_params), hessian=True).hessian
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_points_are_sums_over_workers() -> None:
    rows, shape = rows_for("multinomial", 100), Shape(N_DENSE, N_ONEHOT, 3)
    params = np.linspace(-1, 1, shape.n_params)

    def evaluate(chunks, total):
        ridge = Ridge(np.ones(shape.n_params))
        objective = Objective(chunks, LOSSES["multinomial"], ridge, shape=shape, sum_w=2.0, total=total)
        return objective.evaluate(params, hessian=True), objective.agree(params)

    expected, _ = evaluate([rows], alone)
    for point, agreed in run_workers([[], rows.cut(30)[:1], rows.cut(30)[1:]], evaluate):
        assert point.value == pytest.approx(expected.value, rel=1e-13)
        np.testing.assert_allclose(point.gradient, expected.gradient, atol=1e-12)
        np.testing.assert_allclose(point.hessian, expected.hessian, atol=1e-12)
        np.testing.assert_allclose(agreed, params, rtol=1e-15)
