from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from claydist.errors import TrainingError
from claydist.models.penalties import Lasso
from claydist.models.solvers import (
    Model,
    NewtonModel,
    Point,
    QuasiNewtonModel,
    Solution,
    minimise,
    solve_lasso,
    solve_symmetric,
)


class Smooth:
    """An objective of a few numbers; counts what it is asked for."""

    def __init__(self, value: Callable, gradient: Callable, hessian: Callable) -> None:
        self.functions = value, gradient, hessian
        self.n_evaluated = self.n_hessians = self.n_lines = 0

    def evaluate(self, params: np.ndarray, *, hessian: bool = False) -> Point:
        value, gradient, second = self.functions
        self.n_evaluated += 1
        self.n_hessians += hessian
        return Point(params, float(value(params)), gradient(params), second(params) if hessian else None)

    def along(self, params: np.ndarray, direction: np.ndarray) -> Callable[[float], float]:
        self.n_lines += 1
        return lambda step: float(self.functions[0](params + step * direction))

    def agree(self, local: np.ndarray) -> np.ndarray:
        return local


def quadratic(A: np.ndarray, b: np.ndarray) -> Smooth:
    return Smooth(lambda x: 0.5 * x @ A @ x - b @ x, lambda x: A @ x - b, lambda x: A)


def solve(smooth: Smooth, lasso: Lasso, model: Model, start: np.ndarray, max_iter: int = 200) -> Solution:
    return minimise(
        smooth, lasso, model, start, tolerance=1e-10, max_iter=max_iter, report=lambda n_iter, value, params: None
    )


def semidefinite(seed: int, n: int, rank: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(n, rank))
    return root @ root.T / rank


NONE = np.zeros(0, dtype=np.intp)


def test_regular_system_is_solved() -> None:
    A, b = semidefinite(0, 8, 12), np.arange(8.0)
    np.testing.assert_allclose(A @ solve_symmetric(A, b, NONE), b, atol=1e-10)


def test_singular_system_has_the_shortest_solution() -> None:
    A = semidefinite(1, 8, 4)
    b = A @ np.arange(8.0)
    np.testing.assert_allclose(solve_symmetric(A, b, NONE), np.linalg.pinv(A) @ b, atol=1e-9)


def test_size_of_free_entries_does_not_count() -> None:
    rng = np.random.default_rng(2)
    X = rng.normal(size=(50, 3)) + 5
    Z = np.column_stack([X, X[:, 0] + X[:, 1], np.ones(50)])  # collinear, the intercept last
    y = rng.normal(size=50)
    found = solve_symmetric(Z.T @ Z, Z.T @ y, np.array([4]))
    centred = Z[:, :4] - Z[:, :4].mean(axis=0)
    expected = np.linalg.lstsq(centred, y - y.mean(), rcond=1e-10)[0]
    np.testing.assert_allclose(found[:4], expected, atol=1e-9)
    assert found[4] == pytest.approx(y.mean() - Z[:, :4].mean(axis=0) @ expected)


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (12, 20), (12, 5), (40, 40)])
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.5, 100.0])
def test_lasso_problem_is_solved_to_optimality(n: int, rank: int, strength: float) -> None:
    A = semidefinite(n, n, rank)
    b = A @ np.random.default_rng(3).normal(size=n)
    strengths = np.full(n, strength)
    strengths[0] *= n == 1  # one entry is not penalised
    x = solve_lasso(A, b, strengths, np.zeros(n), 1e-12)
    assert Lasso(strengths).violation(x, A @ x - b).max() < 1e-11


@pytest.mark.parametrize("strength", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["newton", "lbfgs"])
def test_quadratic_ends_at_the_optimum(kind: str, strength: float) -> None:
    A, b = semidefinite(4, 15, 30), np.linspace(-1, 1, 15)
    lasso = Lasso(np.full(15, strength))
    model = NewtonModel(NONE, 1e-10) if kind == "newton" else QuasiNewtonModel(np.diag(A))
    found = solve(quadratic(A, b), lasso, model, np.ones(15))
    assert found.converged
    assert found.violation <= 1e-10
    np.testing.assert_allclose(found.params, solve_lasso(A, b, lasso.strength, np.zeros(15), 1e-13), atol=1e-8)
    assert (np.diff(found.history) <= 1e-13).all()
    if kind == "newton":
        assert found.n_iter == 1


@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["newton", "lbfgs"])
def test_step_too_far_is_taken_back(kind: str, strength: float) -> None:
    # Newton's full step from 3 for log cosh goes to -98; the minimum is at 0
    smooth = Smooth(lambda x: (np.logaddexp(x, -x)).sum(), lambda x: np.tanh(x), lambda x: np.diag(np.cosh(x) ** -2))
    start = np.array([3.0, 1.0])
    model = NewtonModel(NONE, 1e-10) if kind == "newton" else QuasiNewtonModel(np.cosh(start) ** -2)
    found = solve(smooth, Lasso(np.full(2, strength)), model, start)
    assert found.converged
    assert smooth.n_lines > 0
    np.testing.assert_allclose(found.params, 0.0, atol=1e-9)


def test_last_point_costs_no_hessian() -> None:
    smooth = Smooth(lambda x: (np.exp(x) - x).sum(), lambda x: np.exp(x) - 1, lambda x: np.diag(np.exp(x)))
    found = solve(smooth, Lasso(np.zeros(1)), NewtonModel(NONE, 1e-10), np.array([1.0]))
    assert found.converged
    assert smooth.n_evaluated == found.n_iter + 1
    assert smooth.n_hessians < smooth.n_evaluated


def test_too_few_iterations_are_told() -> None:
    A, b = semidefinite(5, 15, 16), np.linspace(-1, 1, 15)
    found = solve(quadratic(A, b), Lasso(np.zeros(15)), QuasiNewtonModel(np.diag(A)), np.zeros(15), max_iter=3)
    assert not found.converged
    assert found.n_iter == 3
    assert found.violation == np.abs(A @ found.params - b).max()


def test_tolerance_below_rounding_ends_and_is_told() -> None:
    A, b = semidefinite(6, 15, 30), 1e12 * np.linspace(-1, 1, 15)
    found = solve(quadratic(A, b), Lasso(np.zeros(15)), NewtonModel(NONE, 1e-10), np.zeros(15))
    assert not found.converged
    assert found.n_iter < 30
    assert found.violation < 1e-2


def test_start_that_is_not_finite_is_an_error() -> None:
    smooth = Smooth(lambda x: np.inf, lambda x: x, lambda x: np.eye(2))
    with pytest.raises(TrainingError, match="expected a finite objective at the starting coefficients, found inf"):
        solve(smooth, Lasso(np.zeros(2)), NewtonModel(NONE, 1e-10), np.zeros(2))
