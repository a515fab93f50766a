"""Generalised linear models: loss times penalty times solver, fitted on all workers, applied row by row."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from claydist.errors import BundleError, DataError, TrainingError
from claydist.features import Encoded, FeaturePlan
from claydist.models.losses import LOSSES, Loss
from claydist.models.objective import Chunk, Objective, Shape, Total
from claydist.models.penalties import Lasso, Ridge
from claydist.models.solvers import Model, NewtonModel, QuasiNewtonModel, minimise
from claydist.spec import LinearSpec

ARRAYS_FILE = "arrays.npz"

_NEWTON_PARAMS = 1000  # up to here a Hessian costs less than the passes it saves
_MOST_NEWTON_PARAMS = 10_000  # 0.8 GB of Hessian, several times
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Coefficient:
    """One coefficient, for a person to read; `feature` is `(intercept)` for the intercept.

    `standardised` is per standard deviation of the feature, `original` per unit of it; equal for one-hot features.
    """

    output: int
    feature: str
    standardised: float
    original: float


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Coefficients of a fitted model, for features that are already imputed and standardised.

    Parameters
    ----------
    coef : (n_outputs, n_coef) float64, dense features first, then one-hot.
    intercept : (n_outputs,) float64.
    loss : one of `losses.LOSSES`.
    n_dense : number of dense features.
    """

    coef: np.ndarray
    intercept: np.ndarray
    loss: str
    n_dense: int

    kind: ClassVar[str] = "linear"

    def raw(self, dense: np.ndarray, codes: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
        """Raw predictions (n_rows, n_outputs) float64; a row's bits do not depend on the other rows.

        Features are added one after the other, elementwise: BLAS takes an order that depends on the number of rows.

        Parameters
        ----------
        dense : (n_rows, n_dense) float64, any strides.
        codes : (n_rows, n_categorical) int32, position among the one-hot coefficients, negative for none.
        offset : (n_rows,) float64, added last.
        """
        raw = np.empty((len(dense), len(self.coef)))
        onehot = np.append(self.coef[:, self.n_dense :], np.zeros((len(self.coef), 1)), axis=1)
        codes = np.where(codes < 0, onehot.shape[1] - 1, codes)
        for start in range(0, len(dense), _BLOCK_ROWS):  # columns of a block stay in the cache
            rows = slice(start, start + _BLOCK_ROWS)
            for k, coef in enumerate(self.coef):
                sums = np.full(len(dense[rows]), self.intercept[k])
                for j in range(self.n_dense):
                    sums += dense[rows, j] * coef[j]
                for j in range(codes.shape[1]):
                    sums += onehot[k, codes[rows, j]]
                raw[rows, k] = sums
        if offset is not None:
            raw += offset[:, None]
        return raw

    def mean(self, raw: np.ndarray) -> np.ndarray:
        """Means (n_rows, n_outputs) float64: probability of 1, of each class, or expected label; row by row."""
        return LOSSES[self.loss].mean(raw)

    def predict_encoded(self, plan: FeaturePlan, encoded: Encoded, offset: np.ndarray | None) -> np.ndarray:
        """Predictions float64 of an encoded table.

        (n_rows,) probability of 1 or expected label; (n_rows, n_classes) probabilities of a multinomial model.
        """
        mean = self.mean(self.raw(plan.dense(encoded), plan.onehot(encoded), offset))
        return mean[:, 0] if mean.shape[1] == 1 else mean

    def set_threads(self, n_threads: int) -> None:
        """Do nothing: a row is summed in one order, on one thread."""

    def importance(self, plan: FeaturePlan) -> list[dict[str, Any]]:
        """Every coefficient, for standardised and for original features; the largest standardised one first."""
        mean = np.zeros(plan.n_dense)
        scale = np.ones(plan.n_dense)
        for j, feature in enumerate(plan.dense_features):
            mean[j], scale[j] = feature.mean, feature.scale
        rows = self.coefficients(plan.coefficient_names, mean, scale)
        return [asdict(row) for row in sorted(rows, key=lambda row: -abs(row.standardised))]

    def to_files(self) -> dict[str, bytes]:
        """The model as files of a bundle."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = self.to_arrays()
        np.savez(buffer, **arrays)
        return {ARRAYS_FILE: buffer.getvalue()}

    def to_json(self) -> dict[str, Any]:
        """What is not in the files."""
        return {"kind": self.kind}

    @classmethod
    def from_files(cls, tree: Mapping[str, Any], files: Mapping[str, bytes]) -> LinearModel:
        """The model that `to_files` gave; nothing is unpickled.

        Raises
        ------
        BundleError
            when the file is not what `to_files` wrote.
        """
        try:
            with np.load(io.BytesIO(files[ARRAYS_FILE]), allow_pickle=False) as arrays:
                return cls.from_arrays(dict(arrays))
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, DataError) as e:
            raise BundleError(f"{ARRAYS_FILE} does not hold a linear model: {e}") from None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays that `from_arrays` takes; none needs pickle."""
        return {
            "coef": self.coef,
            "intercept": self.intercept,
            "loss": np.array(self.loss),
            "n_dense": np.array(self.n_dense, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LinearModel:
        """Model with the bits that `to_arrays` gave.

        Raises
        ------
        DataError
            when arrays are missing, not float64, of other shapes, or for an unknown loss.
        """
        if missing := sorted({"coef", "intercept", "loss", "n_dense"} - set(arrays)):
            raise DataError(
                f"arrays of a linear model: {missing} missing, found {sorted(arrays)}; copy the bundle again"
            )
        coef, intercept, loss = arrays["coef"], arrays["intercept"], str(arrays["loss"])
        n_dense = int(arrays["n_dense"])
        fits = coef.ndim == 2 and intercept.shape == coef.shape[:1] and 0 <= n_dense <= coef.shape[1]
        if not fits or coef.dtype != np.float64 or intercept.dtype != np.float64 or loss not in LOSSES:
            raise DataError(
                "arrays of a linear model: expected float64 coef (n_outputs, n_coef), float64 intercept (n_outputs,), "
                f"n_dense up to n_coef and a loss of {sorted(LOSSES)}, found coef {coef.dtype} {coef.shape}, "
                f"intercept {intercept.dtype} {intercept.shape}, n_dense {n_dense}, loss {loss!r}; "
                "copy the bundle again"
            )
        return cls(coef, intercept, loss, n_dense)

    def coefficients(self, features: Sequence[str], mean: np.ndarray, scale: np.ndarray) -> list[Coefficient]:
        """Every intercept and coefficient, for standardised and for original features.

        raw = intercept + sum_j coef_j (x_j - mean_j) / scale_j, so per original unit it is coef_j / scale_j, and the
        intercept is intercept - sum_j coef_j mean_j / scale_j.

        Parameters
        ----------
        features : (n_coef) names, dense first.
        mean, scale : (n_dense,) float64, of the standardisation; 0 and 1 where there is none.
        """
        original = self.coef.copy()
        original[:, : self.n_dense] /= scale
        origin = self.intercept - original[:, : self.n_dense] @ mean
        rows = []
        for k in range(len(self.coef)):
            rows.append(Coefficient(k, "(intercept)", float(self.intercept[k]), float(origin[k])))
            pairs = zip(features, self.coef[k].tolist(), original[k].tolist(), strict=True)
            rows.extend(Coefficient(k, name, standardised, value) for name, standardised, value in pairs)
        return rows


@dataclass(frozen=True)
class LinearFit:
    """A fitted model and how the fit ended.

    Parameters
    ----------
    n_iter : steps taken in this call.
    converged : whether `gradient_max` is at most the tolerance asked for; say so loudly where it is not.
    objective : mean loss plus penalties at the end.
    gradient_max : largest absolute gradient of the objective; with l1, distance from its subdifferential.
    history : objective at the start and after each step.
    """

    model: LinearModel
    n_iter: int
    converged: bool
    objective: float
    gradient_max: float
    history: tuple[float, ...]


def fit_linear(
    chunks: Sequence[Chunk],
    *,
    spec: LinearSpec,
    loss: str,
    n_dense: int,
    n_onehot: int,
    n_outputs: int,
    total: Total,
    n_threads: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> LinearFit:
    """Fit, equal on all workers, to sum w_i loss_i / sum w + l2 / (2 sum w) |coef|_2^2 + l1 / sum w |coef|_1.

    Parameters
    ----------
    chunks : this worker's rows; may be empty, the worker takes part all the same.
    spec : penalties, tolerance, iterations and solver.
    loss : "squared", "logistic" (softmax where n_outputs > 1), "multinomial" or "poisson".
    n_outputs : classes of a multinomial model, else 1.
    total : sum over workers of an equally shaped float64 array; every worker calls it in the same order.
    n_threads : threads of this worker; the result does not depend on it.
    progress : called with iteration and objective after each step.

    Raises
    ------
    DataError
        when no worker has a row, weights are not finite, negative or all zero, an offset is not finite, or labels are
        none of the loss.
    TrainingError
        when `solver: newton` has too many coefficients, or the objective is not finite.
    """
    name = "multinomial" if loss == "logistic" and n_outputs > 1 else loss
    shape = Shape(n_dense, n_onehot, n_outputs)
    sum_w, mean_label, mean_offset = _check_rows(chunks, LOSSES[name], n_outputs, total)
    penalised = np.ones((n_outputs, shape.n_coef + 1))
    penalised[:, -1] = 0.0
    ridge = Ridge(penalised.ravel() * (spec.l2 / sum_w))
    lasso = Lasso(penalised.ravel() * (spec.l1 / sum_w))
    start = np.zeros((n_outputs, shape.n_coef + 1))
    start[:, -1] = LOSSES[name].start(mean_label, mean_offset)

    def report(n_iter: int, value: float, _: np.ndarray) -> None:
        if progress is not None:
            progress(n_iter, value)

    # BLAS gains nothing from threads on matrices this narrow, and its bits depend on them: the rows are shared out
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(n_threads) as pool:
        objective = Objective(
            chunks,
            LOSSES[name],
            ridge,
            shape=shape,
            sum_w=sum_w,
            total=total,
            parallel=pool.map if n_threads > 1 else map,
        )
        solution = minimise(
            objective,
            lasso,
            _choose_model(spec, objective, start.ravel()),
            start.ravel(),
            tolerance=spec.tolerance,
            max_iter=spec.max_iter,
            report=report,
        )
    return LinearFit(
        _model(solution.params, name, shape),
        n_iter=solution.n_iter,
        converged=solution.converged,
        objective=solution.value,
        gradient_max=solution.violation,
        history=solution.history,
    )


def _choose_model(spec: LinearSpec, objective: Objective, start: np.ndarray) -> Model:
    n_params = objective.shape.n_params
    if spec.solver == "newton" and n_params > _MOST_NEWTON_PARAMS:
        raise TrainingError(
            f"model.solver: newton takes up to {_MOST_NEWTON_PARAMS} coefficients, found {n_params}; use lbfgs or auto"
        )
    if spec.solver == "newton" or (spec.solver != "lbfgs" and n_params <= _NEWTON_PARAMS):
        intercepts = np.arange(1, objective.shape.n_outputs + 1) * (objective.shape.n_coef + 1) - 1
        return NewtonModel(intercepts, spec.tolerance)
    # One scale for all outputs: softmax does not change when all classes move alike, and where the scales differ each
    # step has a part in this flat direction, which only the penalty takes back, in many steps.
    diagonal = objective.diagonal(start).reshape(objective.shape.n_outputs, -1)
    return QuasiNewtonModel(np.broadcast_to(diagonal.mean(axis=0), diagonal.shape).ravel())


def _check_rows(chunks: Sequence[Chunk], loss: Loss, n_outputs: int, total: Total) -> tuple[float, float, float]:
    """Sum of weights, weighted means of label and of offset, over all workers; all problems in one error."""
    sums = np.zeros(7)
    for chunk in chunks:
        w = np.ones(chunk.n_rows) if chunk.w is None else chunk.w
        offset = np.zeros(chunk.n_rows) if chunk.offset is None else chunk.offset
        bad_label, bad_w = loss.bad_labels(chunk.y, n_outputs), ~(np.isfinite(w) & (w >= 0))
        bad_offset = ~np.isfinite(offset)
        w = np.where(bad_label | bad_w | bad_offset, 0.0, w)
        sums += [
            chunk.n_rows,
            bad_label.sum(),
            bad_w.sum(),
            bad_offset.sum(),
            w.sum(),
            w @ np.where(bad_label, 0.0, chunk.y),
            w @ np.where(bad_offset, 0.0, offset),
        ]
    n_rows, n_labels, n_weights, n_offsets, sum_w, sum_wy, sum_wo = total(sums).tolist()
    problems = [
        f"{what}: expected {expected}, found {int(count)} others in {int(n_rows)} rows"
        for what, expected, count in (
            ("label", loss.labels, n_labels),
            ("weight", "finite numbers that are not negative", n_weights),
            ("offset", "finite numbers", n_offsets),
        )
        if count
    ]
    if not problems and sum_w <= 0:
        problems = [f"weight: expected a positive sum, found {sum_w!r} in {int(n_rows)} rows"]
    if problems:
        raise DataError("training rows do not fit the model; correct them or leave them out with data.where", problems)
    return sum_w, sum_wy / sum_w, sum_wo / sum_w


def _model(params: np.ndarray, loss: str, shape: Shape) -> LinearModel:
    matrix = params.reshape(shape.n_outputs, -1)
    return LinearModel(matrix[:, :-1].copy(), matrix[:, -1].copy(), loss, shape.n_dense)
