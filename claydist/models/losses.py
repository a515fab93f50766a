"""Losses of generalised linear models: a few pure functions of arrays each, listed in `LOSSES`.

All four have their canonical link, so the derivative of a row's loss with respect to its raw prediction is the mean
minus the label (McCullagh and Nelder, Generalized Linear Models, 2.2).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from scipy.special import expit


class Loss(Protocol):
    """Pure functions of raw predictions (n_rows, n_outputs) and labels (n_rows,), all float64.

    Attributes
    ----------
    labels : the labels that it knows, in words.
    constant_curvature : whether second derivatives depend on nothing, so that one Hessian serves all steps.
    """

    labels: str
    constant_curvature: bool

    def bad_labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        """(n_rows,) bool, where the label is none that this loss knows."""

    def start(self, mean_label: float, mean_offset: float) -> float:
        """Intercept that minimises the loss, or nearly, when all coefficients are zero."""

    def evaluate(self, raw: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses (n_rows,) and means (n_rows, n_outputs)."""

    def gradient(self, mean: np.ndarray, y: np.ndarray) -> np.ndarray:
        """First derivatives of the losses by raw, (n_rows, n_outputs)."""

    def curvature(self, mean: np.ndarray, i: int, j: int) -> np.ndarray:
        """Second derivatives of the losses by raw outputs i and j, (n_rows,)."""

    def mean(self, raw: np.ndarray) -> np.ndarray:
        """Means (n_rows, n_outputs) for predictions; a row's bits do not depend on the other rows."""


class _Single:
    """What the losses of one output share."""

    constant_curvature = False

    def gradient(self, mean: np.ndarray, y: np.ndarray) -> np.ndarray:
        return mean - y[:, None]


class _Squared(_Single):
    """Half squared error, identity link: (raw - y)^2 / 2."""

    labels = "finite numbers"
    constant_curvature = True

    def bad_labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        return ~np.isfinite(y)

    def start(self, mean_label: float, mean_offset: float) -> float:
        return mean_label - mean_offset

    def evaluate(self, raw: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        error = raw[:, 0] - y
        return 0.5 * error * error, raw

    def curvature(self, mean: np.ndarray, i: int, j: int) -> np.ndarray:
        return np.ones(len(mean))

    def mean(self, raw: np.ndarray) -> np.ndarray:
        return raw.copy()


class _Logistic(_Single):
    """Binary cross-entropy, logit link: log(1 + exp(raw)) - y raw, y in {0, 1}."""

    labels = "0 and 1"

    def bad_labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        return (y != 0) & (y != 1)

    def start(self, mean_label: float, mean_offset: float) -> float:
        share = min(max(mean_label, 1e-6), 1 - 1e-6)
        return math.log(share / (1 - share)) - mean_offset

    def evaluate(self, raw: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # exp of minus the absolute value cannot overflow, and serves the loss and the mean
        decay = np.exp(-np.abs(raw))
        mean = np.where(raw >= 0, 1.0, decay)
        decay += 1.0
        mean /= decay
        value = np.log(decay[:, 0])
        value += np.maximum(raw[:, 0], 0.0)
        value -= y * raw[:, 0]
        return value, mean

    def curvature(self, mean: np.ndarray, i: int, j: int) -> np.ndarray:
        return mean[:, 0] * (1.0 - mean[:, 0])

    def mean(self, raw: np.ndarray) -> np.ndarray:
        return expit(raw)


class _Poisson(_Single):
    """Half Poisson deviance without its constants, log link: exp(raw) - y raw, y >= 0."""

    labels = "numbers that are finite and not negative"

    def bad_labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        return ~(np.isfinite(y) & (y >= 0))

    def start(self, mean_label: float, mean_offset: float) -> float:
        # by Jensen never below the minimum; from above, Newton's steps for exp do not overshoot
        return math.log(max(mean_label, 1e-12)) - mean_offset

    def evaluate(self, raw: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = self.mean(raw)
        return mean[:, 0] - y * raw[:, 0], mean

    def curvature(self, mean: np.ndarray, i: int, j: int) -> np.ndarray:
        return mean[:, 0]

    def mean(self, raw: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinity is the answer beyond 709, and the line search refuses it
            return np.exp(raw)


class _Multinomial:
    """Cross-entropy of softmax, all classes with a coefficient vector: log(sum_k exp(raw_k)) - raw_y, y the class."""

    labels = "class numbers from 0 to n_outputs - 1"
    constant_curvature = False

    def bad_labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        return ~((y >= 0) & (y < n_outputs) & (y == np.floor(y)))

    def start(self, mean_label: float, mean_offset: float) -> float:
        return 0.0

    def evaluate(self, raw: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shifted = raw - raw.max(axis=1, keepdims=True)
        own = shifted[np.arange(len(y)), y.astype(np.intp)]
        mean = np.exp(shifted, out=shifted)
        sums = mean.sum(axis=1)
        mean /= sums[:, None]
        return np.log(sums) - own, mean

    def gradient(self, mean: np.ndarray, y: np.ndarray) -> np.ndarray:
        gradient = mean.copy()
        gradient[np.arange(len(y)), y.astype(np.intp)] -= 1.0
        return gradient

    def curvature(self, mean: np.ndarray, i: int, j: int) -> np.ndarray:
        return mean[:, i] * ((i == j) - mean[:, j])

    def mean(self, raw: np.ndarray) -> np.ndarray:
        # column by column: numpy's sums over an axis take an order that depends on shape and layout
        columns = [raw[:, k] for k in range(raw.shape[1])]
        top = columns[0]
        for column in columns[1:]:
            top = np.maximum(top, column)
        powers = [np.exp(column - top) for column in columns]
        scale = powers[0].copy()
        for power in powers[1:]:
            scale += power
        return np.stack([power / scale for power in powers], axis=1)


LOSSES: dict[str, Loss] = {
    "squared": _Squared(),
    "logistic": _Logistic(),
    "multinomial": _Multinomial(),
    "poisson": _Poisson(),
}
