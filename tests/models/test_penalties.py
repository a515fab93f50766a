from __future__ import annotations

import numpy as np
import pytest

from claydist.models.penalties import Lasso, Ridge, exact_sum

STRENGTH = np.array([0.0, 0.3, 1.0, 2.5])


def test_exact_sum_does_not_depend_on_the_order() -> None:
    terms = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(1000) ** 0.1
    assert exact_sum(terms) == exact_sum(terms[::-1]) == exact_sum(np.sort(terms))


@pytest.mark.parametrize("step", [0.1, 1.0, 3.0])
def test_prox_minimises_over_a_grid(step: float) -> None:
    lasso, grid = Lasso(STRENGTH), np.linspace(-6, 6, 120_001)
    for params in np.random.default_rng(1).uniform(-5, 5, size=(20, 4)):
        found = lasso.prox(params, step)
        for z, x, strength in zip(found, params, STRENGTH, strict=True):
            values = (grid - x) ** 2 / (2 * step) + strength * np.abs(grid)
            assert (z - x) ** 2 / (2 * step) + strength * abs(z) <= values.min() + 1e-12
            assert abs(z - grid[values.argmin()]) <= 1e-4


def test_prox_knows_a_step_for_each_entry() -> None:
    np.testing.assert_allclose(
        Lasso(np.ones(3)).prox(np.array([0.1, -2.0, 3.0]), np.array([1.0, 1.0, 2.0])), [0.0, -1.0, 1.0]
    )


def test_ridge_gradient_is_its_finite_difference() -> None:
    ridge, params = Ridge(STRENGTH), np.array([3.0, -1.0, 0.5, 2.0])
    for j in range(4):
        by = np.zeros(4)
        by[j] = 1e-6
        difference = (ridge.value(params + by) - ridge.value(params - by)) / 2e-6
        assert ridge.gradient(params)[j] == pytest.approx(difference, abs=1e-8)


def test_lasso_of_zero_strength_is_none() -> None:
    lasso, params = Lasso(np.zeros(3)), np.array([1.0, -2.0, 0.0])
    assert lasso.is_zero
    assert not Lasso(STRENGTH).is_zero
    assert np.array_equal(lasso.prox(params), params)
    assert np.array_equal(lasso.violation(params, np.array([1.0, -3.0, 2.0])), [1.0, 3.0, 2.0])


def test_violation_is_zero_exactly_at_the_fixed_points_of_prox() -> None:
    lasso, rng = Lasso(STRENGTH), np.random.default_rng(2)
    center = rng.uniform(-3, 3, size=4)
    optimum = lasso.prox(center)  # of (z - center)^2 / 2 + lasso, whose smooth gradient is z - center
    assert lasso.violation(optimum, optimum - center).max() < 1e-15
    elsewhere = optimum + 0.1
    assert lasso.violation(elsewhere, elsewhere - center).min() > 0.09
