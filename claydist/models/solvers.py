"""Minimise a smooth convex objective plus a lasso penalty; the workers go in step.

`minimise` is the one loop: direction from a local quadratic model, full step first (its value, gradient and Hessian
come from one pass, so a step that is taken costs a single pass), backtracking on kept margins where the full step is
refused. The models differ in what they know of the second derivatives: `NewtonModel` all, `QuasiNewtonModel` the
diagonal and the last few steps. Each solves its model with or without the lasso (proximal Newton: Lee, Sun and
Saunders, SIAM J. Optim. 24, 2014). Every decision is taken on sums over workers, on directions they have agreed on,
and on correctly rounded sums of these, so all workers take the same one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import linalg

from claydist.errors import TrainingError
from claydist.models.penalties import Lasso, exact_sum

_EPSILON = float(np.finfo(np.float64).eps)
_ROUNDING = 1e-13  # relative error of a value that is a sum over many rows
_SWEEPS = 10  # of coordinate descent, before what it left is solved exactly: together they cost about the same
_CROSSINGS = 10  # signs that one exact solution may change


@dataclass(frozen=True)
class Point:
    """The smooth objective at `params`: value, gradient (n_params,), Hessian (n_params, n_params) where asked for."""

    params: np.ndarray
    value: float
    gradient: np.ndarray
    hessian: np.ndarray | None = None


class Smooth(Protocol):
    """What a solver needs of an objective; every method is called by all workers in the same order."""

    def evaluate(self, params: np.ndarray, *, hessian: bool = False) -> Point:
        """The objective at `params` (n_params,)."""

    def along(self, params: np.ndarray, direction: np.ndarray) -> Callable[[float], float]:
        """Its value at `params + step * direction`, as a cheap function of step."""

    def agree(self, local: np.ndarray) -> np.ndarray:
        """The mean over workers of an array that they computed alike."""


class Model(Protocol):
    """A quadratic model of the objective around the last point.

    Attributes
    ----------
    n_extra : steps to take beyond the tolerance where the model still sees a way to go: a small gradient is no small
        error where the objective is flat, as for a rare category.
    patience : steps without gain, where rounding hides the change of the objective, before giving up.
    """

    n_extra: int
    patience: int

    def wants_hessian(self, violation: float, last: float) -> bool:
        """Whether the next point is worth a Hessian, given the largest violations here and one step before."""

    def learn(self, point: Point) -> None:
        """Take in the next point."""

    def direction(self, point: Point, lasso: Lasso, tolerance: float) -> np.ndarray:
        """Step (n_params,) to the minimum of the model plus the lasso."""


@dataclass(frozen=True)
class Solution:
    """Where the solver stopped; `violation` is the largest absolute gradient, or distance from optimality."""

    params: np.ndarray
    value: float
    violation: float
    n_iter: int
    converged: bool
    history: tuple[float, ...]


def minimise(
    smooth: Smooth,
    lasso: Lasso,
    model: Model,
    start: np.ndarray,
    *,
    tolerance: float,
    max_iter: int,
    report: Callable[[int, float, np.ndarray], None],
) -> Solution:
    """Solution for `smooth + lasso`, from `start`; stops at `tolerance`, `max_iter`, or where rounding forbids more.

    Parameters
    ----------
    smooth : sums over all workers.
    start : (n_params,) float64, equal on all workers.
    tolerance : largest `lasso.violation` at the end.
    report : called with iteration, objective and params after each step.

    Raises
    ------
    TrainingError
        when the objective at `start` is not finite.
    """
    point = smooth.evaluate(start, hessian=model.wants_hessian(math.inf, math.inf))
    value = point.value + lasso.value(start)
    if not (math.isfinite(value) and np.isfinite(point.gradient).all()):
        raise TrainingError(
            f"expected a finite objective at the starting coefficients, found {value!r}; "
            "features, labels, weights or offsets are infinite, missing or too large: scale or filter them"
        )
    violation, last, best, n_stalled, n_extra = _largest(lasso, point), math.inf, math.inf, 0, model.n_extra
    history = [value]
    while (violation > tolerance or n_extra > 0) and len(history) <= max_iter and n_stalled < model.patience:
        model.learn(point)
        step = smooth.agree(model.direction(point, lasso, tolerance))
        if violation <= tolerance:
            n_extra -= 1
            if np.abs(step).max() <= 0.1 * tolerance * max(1.0, np.abs(point.params).max()):
                break
        slope = _slope(point, lasso, step)
        trial = smooth.evaluate(point.params + step, hessian=model.wants_hessian(violation, last))
        if not _is_enough(trial.value + lasso.value(trial.params), value, slope):
            length = _backtrack(smooth, lasso, point.params, step, value, slope)
            if length == 0.0:
                break
            trial = smooth.evaluate(point.params + length * step, hessian=model.wants_hessian(math.inf, math.inf))
        point, value, last = trial, trial.value + lasso.value(trial.params), violation
        violation = _largest(lasso, point)
        at_rounding = -slope <= _ROUNDING * abs(value)
        n_stalled = n_stalled + 1 if at_rounding and violation > 0.5 * best else 0
        best = min(best, violation)
        history.append(value)
        report(len(history) - 1, value, point.params)
    return Solution(point.params, value, violation, len(history) - 1, violation <= tolerance, tuple(history))


def _largest(lasso: Lasso, point: Point) -> float:
    return float(lasso.violation(point.params, point.gradient).max())


def _slope(point: Point, lasso: Lasso, step: np.ndarray) -> float:
    """Predicted change of the objective, to first order; Lee, Sun and Saunders, equation 2.18."""
    change = lasso.strength * (np.abs(point.params + step) - np.abs(point.params))
    return exact_sum(point.gradient * step + change)


def _is_enough(trial: float, value: float, slope: float) -> bool:
    """Armijo's condition; differences below the rounding of the values do not count."""
    return trial <= value + 1e-4 * min(slope, 0.0) + _ROUNDING * abs(value)


def _backtrack(smooth: Smooth, lasso: Lasso, params: np.ndarray, step: np.ndarray, value: float, slope: float) -> float:
    """Length in (0, 1) that lowers the objective enough; 0 where none does, which only rounding can cause."""
    along = smooth.along(params, step)
    length = 1.0
    while length > 1e-12:
        length *= 0.5
        if _is_enough(along(length) + lasso.value(params + length * step), value, length * slope):
            return length
    return 0.0


class NewtonModel:
    """The full Hessian: Cholesky without the lasso, coordinate descent and active sets with it.

    Parameters
    ----------
    intercepts : positions among the parameters, whose size does not count where the solution is not unique.
    tolerance : the solver's.
    """

    n_extra = 3
    patience = 5

    def __init__(self, intercepts: np.ndarray, tolerance: float) -> None:
        self.intercepts = intercepts
        self.tolerance = tolerance
        self._hessian: np.ndarray | None = None

    def wants_hessian(self, violation: float, last: float) -> bool:
        """False where quadratic convergence makes the next point the last, which is then only checked."""
        return not math.isfinite(last) or violation * (violation / last) ** 2 > self.tolerance

    def learn(self, point: Point) -> None:
        """Keep the Hessian; a point without one keeps the last (chord method)."""
        if point.hessian is not None:
            self._hessian = point.hessian

    def direction(self, point: Point, lasso: Lasso, tolerance: float) -> np.ndarray:
        """Step to the minimum of the model plus the lasso."""
        assert self._hessian is not None
        if lasso.is_zero:
            return -solve_symmetric(self._hessian, point.gradient, self.intercepts)
        target = self._hessian @ point.params - point.gradient
        return solve_lasso(self._hessian, target, lasso.strength, point.params, 0.01 * tolerance) - point.params


def solve_symmetric(A: np.ndarray, b: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The x (n,) with A x = b for A positive semi-definite; of many, the one whose part outside `free` is shortest.

    Parameters
    ----------
    A : (n, n) float64.
    b : (n,) float64, in the range of A.
    free : (m,) int positions whose size does not count: intercepts.
    """
    try:
        factor, _ = linalg.cho_factor(A, lower=True)
    except linalg.LinAlgError:
        return _solve_singular(A, b, free)
    pivots = np.diag(factor) ** 2
    if pivots.min(initial=math.inf) <= 1e-10 * np.diag(A)[pivots.argmin()]:
        return _solve_singular(A, b, free)
    return linalg.cho_solve((factor, True), b)


def _solve_singular(A: np.ndarray, b: np.ndarray, free: np.ndarray) -> np.ndarray:
    rest = np.setdiff1d(np.arange(len(b)), free)
    inverse = _pseudo_inverse(A[np.ix_(free, free)])
    cross = A[np.ix_(rest, free)] @ inverse
    x = np.empty_like(b)
    x[rest] = _pseudo_inverse(A[np.ix_(rest, rest)] - cross @ A[np.ix_(free, rest)]) @ (b[rest] - cross @ b[free])
    x[free] = inverse @ (b[free] - A[np.ix_(free, rest)] @ x[rest])
    return x


def _pseudo_inverse(A: np.ndarray) -> np.ndarray:
    """Moore-Penrose inverse of a symmetric matrix; eigenvalues at the level of rounding count as zero."""
    values, vectors = np.linalg.eigh(A)
    kept = values > 8 * max(len(values), 8) * _EPSILON * np.abs(values).max(initial=0.0)
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T


def solve_lasso(
    A: np.ndarray, b: np.ndarray, strength: np.ndarray, start: np.ndarray, tolerance: float, max_rounds: int = 300
) -> np.ndarray:
    """The x (n,) that minimises x.A.x / 2 - b.x + sum_j strength_j |x_j|, A (n, n) positive semi-definite.

    Coordinate descent finds which entries are zero; between sweeps the rest is solved exactly, stopping where an entry
    changes its sign (feature-sign search: Lee, Battle, Raina and Ng, NIPS 2006).
    """
    x = start.copy()
    lasso = Lasso(strength)
    floor = 16 * _EPSILON * float(np.abs(b).max(initial=0.0))
    for _ in range(max_rounds):
        for _ in range(_SWEEPS):
            _sweep(A, b, strength, x)
        x = _solve_signs(A, b, strength, x)
        if lasso.violation(x, A @ x - b).max() <= max(tolerance, floor):
            break
    return x


def _sweep(A: np.ndarray, b: np.ndarray, strength: np.ndarray, x: np.ndarray) -> None:
    """One round of coordinate descent, in place."""
    residual = b - A @ x
    for j in np.flatnonzero(np.diag(A) > 0):
        target = residual[j] + A[j, j] * x[j]
        new = math.copysign(max(abs(target) - strength[j], 0.0), target) / A[j, j]
        if new != x[j]:
            residual -= A[j] * (new - x[j])
            x[j] = new


def _solve_signs(A: np.ndarray, b: np.ndarray, strength: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Minimum over the entries that are not zero or not penalised, as far as no sign changes; never worse than x."""
    x = x.copy()
    # softmax leaves directions without curvature: a little of it, relative to the rest, makes the step unique
    damping = 1e-10 * np.diag(A).max(initial=0.0)
    for _ in range(_CROSSINGS):
        active = np.flatnonzero((x != 0) | ((strength == 0) & (np.diag(A) > 0)))
        if not len(active):
            break
        old, rows = x[active], A[np.ix_(active, active)]
        gap = b[active] - strength[active] * np.sign(old) - rows @ old
        rows[np.diag_indices_from(rows)] += damping
        try:
            move = linalg.cho_solve(linalg.cho_factor(rows, lower=True), gap)
        except linalg.LinAlgError:  # rounding beyond the damping: coordinate descent goes on alone
            break
        crossing = (strength[active] > 0) & (old * (old + move) < 0)
        if not crossing.any():
            x[active] = old + move
            break
        lengths = np.where(crossing, old / np.where(crossing, -move, 1.0), np.inf)
        x[active] = old + lengths.min() * move
        x[active[lengths.argmin()]] = 0.0
    return x


class QuasiNewtonModel:
    """Limited memory BFGS on top of a diagonal, for many parameters.

    Without the lasso: Nocedal's two loops (Nocedal and Wright, Numerical Optimization, algorithm 7.4). With it: the
    compact form of the same matrix (theorem 7.4), whose lasso problem is solved by accelerated proximal gradients
    with restarts (O'Donoghue and Candes, Found. Comput. Math. 15, 2015), without a pass over the rows.

    Parameters
    ----------
    diagonal : (n_params,) float64, diagonal of the Hessian at the start, not negative.
    n_pairs : steps remembered.
    """

    n_extra = 0  # its steps do not tell the error
    patience = 25

    def __init__(self, diagonal: np.ndarray, n_pairs: int = 20) -> None:
        positive = np.maximum(diagonal, 1e-10 * diagonal.max(initial=1e-300))
        self._scale = np.sqrt(positive)  # all below is in units where the diagonal is one
        self._pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=n_pairs)
        self._last: Point | None = None

    def wants_hessian(self, violation: float, last: float) -> bool:
        """Never."""
        return False

    def learn(self, point: Point) -> None:
        """Remember the last step and its change of gradient; steps at the level of rounding say nothing."""
        if self._last is not None:
            s = (point.params - self._last.params) * self._scale
            y = (point.gradient - self._last.gradient) / self._scale
            if s @ y > 1e-12 * np.linalg.norm(s) * np.linalg.norm(y):
                self._pairs.append((s, y))
        self._last = point

    def direction(self, point: Point, lasso: Lasso, tolerance: float) -> np.ndarray:
        """Step to the minimum of the model plus the lasso."""
        if lasso.is_zero:
            return -self._inverse(point.gradient / self._scale) / self._scale
        violation = float(lasso.violation(point.params, point.gradient).max())
        goal = max(0.01 * tolerance, min(0.1, violation) * violation)
        scaled = Lasso(lasso.strength / self._scale)
        x = point.params * self._scale
        return (self._proximal(x, point.gradient / self._scale, scaled, goal) - x) / self._scale

    def _curvature(self) -> float:
        """Size of the matrix before the first pair, from the last one."""
        if not self._pairs:
            return 1.0
        s, y = self._pairs[-1]
        return float(y @ y / (s @ y))

    def _inverse(self, gradient: np.ndarray) -> np.ndarray:
        q = gradient.copy()
        weights = []
        for s, y in reversed(self._pairs):
            weights.append((s @ q) / (s @ y))
            q -= weights[-1] * y
        q /= self._curvature()
        for (s, y), weight in zip(self._pairs, reversed(weights), strict=True):
            q += (weight - (y @ q) / (s @ y)) * s
        return q

    def _low_rank(self) -> tuple[np.ndarray, np.ndarray]:
        """U (n, 2 m) and M (2 m, 2 m) of the matrix curvature I - U M U.T."""
        S = np.stack([s for s, _ in self._pairs], axis=1)
        Y = np.stack([y for _, y in self._pairs], axis=1)
        size = self._curvature()
        products = S.T @ Y
        lower = np.tril(products, -1)
        middle = np.block([[size * (S.T @ S), lower], [lower.T, -np.diag(np.diag(products))]])
        return np.concatenate([size * S, Y], axis=1), np.linalg.inv(middle)

    def _proximal(self, start: np.ndarray, gradient: np.ndarray, lasso: Lasso, goal: float) -> np.ndarray:
        """Minimum of the model around `start` plus the lasso, to the violation `goal`, in scaled units."""
        size = self._curvature()
        U, M = self._low_rank() if self._pairs else (np.zeros((len(start), 1)), np.zeros((1, 1)))
        largest = size + max(float(np.linalg.eigvals(-M @ (U.T @ U)).real.max()), 0.0)
        x, z, momentum = start, start, 1.0
        for _ in range(1000):
            slope = gradient + size * (z - start) - U @ (M @ (U.T @ (z - start)))
            new = lasso.prox(z - slope / largest, 1.0 / largest)
            if float((np.abs(new - z) * self._scale).max()) * largest <= goal:
                return new
            restart = float((z - new) @ (new - x)) > 0
            following = 1.0 if restart else 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * momentum**2))
            z = new if restart else new + (momentum - 1.0) / following * (new - x)
            x, momentum = new, following
        return x
