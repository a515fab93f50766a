"""Penalties of linear models: value, derivatives, proximal operator, and how far a point is from optimal.

The strength is an array with one entry a parameter, zero where there is no penalty (intercepts), so neither the
solvers nor the losses need to know which parameters are penalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def exact_sum(terms: np.ndarray) -> float:
    """Correctly rounded sum: the same bits on every CPU, whatever the width of its vectors."""
    return math.fsum(terms.tolist())


@dataclass(frozen=True)
class Ridge:
    """sum_j strength_j params_j^2 / 2, with strength (n_params,) float64, not negative."""

    strength: np.ndarray

    def value(self, params: np.ndarray) -> float:
        """The penalty."""
        return 0.5 * exact_sum(self.strength * params * params)

    def gradient(self, params: np.ndarray) -> np.ndarray:
        """Its derivative (n_params,); the second derivative is `strength`."""
        return self.strength * params


@dataclass(frozen=True)
class Lasso:
    """sum_j strength_j |params_j|, with strength (n_params,) float64, not negative."""

    strength: np.ndarray

    @property
    def is_zero(self) -> bool:
        """Whether nothing is penalised."""
        return not self.strength.any()

    def value(self, params: np.ndarray) -> float:
        """The penalty."""
        return exact_sum(self.strength * np.abs(params))

    def prox(self, params: np.ndarray, step: float | np.ndarray = 1.0) -> np.ndarray:
        """The z (n_params,) that minimises (z - params)^2 / (2 step) + strength |z|, in each entry.

        Soft thresholding; Parikh and Boyd, Proximal Algorithms, 6.5.2.
        """
        return np.sign(params) * np.maximum(np.abs(params) - step * self.strength, 0.0)

    def violation(self, params: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Distance (n_params,) of minus the smooth gradient from the subdifferential; zero at the optimum.

        It is the absolute gradient of the whole objective where that exists.
        """
        at_zero = np.maximum(np.abs(gradient) - self.strength, 0.0)
        return np.where(params == 0.0, at_zero, np.abs(gradient + self.strength * np.sign(params)))
