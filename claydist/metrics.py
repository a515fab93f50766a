"""Exact metrics of a prediction as sums that shards compute and add: `MetricSums`.

What crosses workers is a sum, never a metric: AUC from merged counts per distinct score is the AUC of all rows, while
a mean of workers' AUCs is not. Values equal scikit-learn's on the union of the rows (1.9, `sample_weight` where there
are weights), whatever the sharding. A metric that is not defined on the rows (AUC of one class) is None.

    binary      auc average_precision logloss brier accuracy precision recall f1
    multiclass  the same; auc (one against the rest), average_precision, precision, recall, f1 are means over classes
    regression  rmse mae r2 mape; poisson_deviance where y >= 0 and mu > 0; pinball for quantile models
    ranking     ndcg, map, and both at each depth (`ndcg@5`)

Choices where scikit-learn leaves or makes one:

- A binary row is predicted positive when p >= 0.5, compared in the dtype of p; a multiclass row is the first largest.
- Log loss is of float64(p), clipped to float64's eps, as `log_loss` does for float64 input (for float32 input it clips
  to float32's eps, which would cap the loss of a sure and wrong answer at 16).
- Precision, recall and F1 with nothing to divide by are 0. Their multiclass means take the classes that occur among
  labels or predictions; AUC and average precision need every class to occur, else they are None.
- Brier is in [0, 1] for binary and in [0, 2] for multiclass (`scale_by_half="auto"`).
- The definitions of NDCG and MAP are those of `claydist.ranking`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from claydist.errors import DataError
from claydist.ranking import rank_groups
from claydist.score_table import ScoreTable
from claydist.sketch import Sketch, bucket_keys

Array = npt.NDArray[Any]
Values = dict[str, float | None]

_CLASSES = ("auc", "average_precision", "logloss", "brier", "accuracy", "precision", "recall", "f1")
TASK_METRICS = {
    "binary": _CLASSES,
    "multiclass": _CLASSES,
    "regression": ("rmse", "mae", "r2", "mape", "pinball", "poisson_deviance"),
    "ranking": ("ndcg", "map"),
}
DEFAULT_METRIC = {"binary": "logloss", "multiclass": "logloss", "regression": "rmse", "ranking": "ndcg"}
AUC_CLASSES = 32  # the table of scores of a class is as large as the data; with more classes auc is None
_LOWER_IS_BETTER = frozenset({"logloss", "brier", "rmse", "mae", "mape", "pinball", "poisson_deviance"})
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Outcome:
    """Labels and predictions of the same rows, in row order.

    Parameters
    ----------
    y : (n,) binary: 1 of the positive class, else 0; multiclass: class index; regression: float; ranking: relevance.
    prediction : binary (n,) probability of the positive class; multiclass (n, n_classes) probabilities; regression
        (n,) mean, for quantile models the quantile nearest to the median; ranking (n,) score.
    w : (n,) weights, not negative; None is 1 each.
    group : (n,) uint64, the query of each row; ranking only.
    quantiles : (n, n_quantiles) predicted quantiles; quantile models only.
    """

    y: Array
    prediction: Array
    w: Array | None = None
    group: Array | None = None
    quantiles: Array | None = None

    def select(self, mask: Array) -> Outcome:
        """The rows where `mask` (n,) bool is true: a slice."""
        fields = (self.y, self.prediction, self.w, self.group, self.quantiles)
        return Outcome(*(None if field is None else field[mask] for field in fields))  # type: ignore[arg-type]


class MetricSums:
    """Sums that hold every metric of a task exactly; workers add batches, the sums of workers are added.

    Parameters
    ----------
    task : binary, multiclass, regression or ranking.
    n_classes : of multiclass.
    quantiles : levels of a quantile model, in the order of `Outcome.quantiles`.
    depths : the k of ndcg@k and map@k.

    Attributes
    ----------
    n_rows : int
    sum_w : float
    parts : the sums of the task, read by `reporting.curves`.
    """

    def __init__(
        self, task: str, *, n_classes: int = 2, quantiles: Sequence[float] = (), depths: Iterable[int] = ()
    ) -> None:
        self.task = task
        self.n_rows = 0
        self.sum_w = 0.0
        self._made_of = (n_classes, tuple(quantiles), tuple(sorted(set(depths))))
        make: dict[str, Callable[[], Any]] = {
            "binary": BinarySums,
            "multiclass": lambda: ClassSums(n_classes),
            "regression": lambda: ErrorSums(self._made_of[1]),
            "ranking": lambda: RankedRows(self._made_of[2]),
        }
        self.parts = make[task]()

    def add(self, outcome: Outcome) -> None:
        """Add a batch of rows; batches and their order do not matter beyond the last bits of float sums.

        Raises
        ------
        DataError : when a prediction is NaN, or a label cannot be one of the task.
        """
        n_bad = int(np.isnan(outcome.prediction).sum())
        if n_bad:
            raise DataError(f"metrics: expected a prediction for each row, found NaN in {n_bad} of {len(outcome.y)}")
        self.n_rows += len(outcome.y)
        self.sum_w += float(len(outcome.y) if outcome.w is None else outcome.w.sum(dtype=np.float64))
        if len(outcome.y):
            # What is infinite is told at the end, by `infinite`.
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                self.parts.add(outcome)

    def __add__(self, other: MetricSums) -> MetricSums:
        if (self.task, self._made_of) != (other.task, other._made_of):
            raise ValueError(f"sums of {self.task} {self._made_of} and of {other.task} {other._made_of} do not add")
        n_classes, quantiles, depths = self._made_of
        total = MetricSums(self.task, n_classes=n_classes, quantiles=quantiles, depths=depths)
        for part in (self, other):
            total.n_rows += part.n_rows
            total.sum_w += part.sum_w
            total.parts.merge(part.parts)
        return total

    def values(self) -> Values:
        """Metrics by name; None where one is not defined on these rows, or is infinite."""
        values = self.parts.values()
        if self.sum_w <= 0:
            return dict.fromkeys(values)
        return {name: None if value is None or not np.isfinite(value) else value for name, value in values.items()}

    def infinite(self) -> list[str]:
        """Names of the metrics that are not finite: some prediction is infinite, or its square is."""
        values = self.parts.values() if self.sum_w > 0 else {}
        return [name for name, value in values.items() if value is not None and not np.isfinite(value)]


class BinarySums:
    """Sums of binary metrics: all follow from the table of scores."""

    def __init__(self) -> None:
        self.scores = ScoreTable()

    def add(self, outcome: Outcome) -> None:
        """Add a batch of at least one row."""
        self.scores.add(outcome.prediction, outcome.y.astype(bool), outcome.w)

    def merge(self, other: BinarySums) -> None:
        """Add the sums of other rows."""
        self.scores.merge(other.scores)

    def confusion(self) -> Array:
        """[[true negative, false positive], [false negative, true positive]] weights at p >= 0.5; float64."""
        score, pos, neg = self.scores.table()
        chosen = score >= 0.5
        return np.array([[part[~chosen].sum(), part[chosen].sum()] for part in (neg, pos)], dtype=np.float64)

    def values(self) -> Values:
        """Metrics by name."""
        score, pos, neg = self.scores.table()
        p = score.astype(np.float64)
        loss = pos * np.log(_clip(p)) + neg * np.log(_clip(1.0 - p))
        (tn, fp), (fn, tp) = self.confusion()
        total = tn + fp + fn + tp
        return {
            "auc": self.scores.auc(),
            "average_precision": self.scores.average_precision(),
            "logloss": _ratio(-loss.sum(), total),
            "brier": _ratio((pos * (1.0 - p) ** 2 + neg * p**2).sum(), total),
            "accuracy": _ratio(tp + tn, total),
            "precision": _ratio(tp, tp + fp, 0.0),
            "recall": _ratio(tp, tp + fn, 0.0),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn, 0.0),
        }


class ClassSums:
    """Sums of multiclass metrics: the confusion matrix, two losses, and a table of scores for each class."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.confusion: Array = np.zeros((n_classes, n_classes))  # rows: label, columns: prediction; weights
        self.seen = np.zeros(n_classes, bool)  # among labels or predictions, at any weight
        self.log_loss = 0.0
        self.square = 0.0
        self.tables = [ScoreTable() for _ in range(n_classes)] if n_classes <= AUC_CLASSES else []

    def add(self, outcome: Outcome) -> None:
        """Add a batch of at least one row."""
        y, P = outcome.y.astype(np.int64), outcome.prediction
        if P.shape != (len(y), self.n_classes) or y.min() < 0 or y.max() >= self.n_classes:
            raise DataError(
                f"metrics: expected labels 0..{self.n_classes - 1} and one probability for each class, "
                f"found labels {y.min()}..{y.max()} and predictions of shape {P.shape}"
            )
        w = np.ones(len(y)) if outcome.w is None else outcome.w.astype(np.float64)
        chosen = P.argmax(axis=1)
        cells = np.bincount(y * self.n_classes + chosen, weights=w, minlength=self.n_classes**2)
        self.confusion = self.confusion + cells.reshape(self.confusion.shape)
        self.seen = self.seen | (np.bincount(np.r_[y, chosen], minlength=self.n_classes) > 0)
        off = P.astype(np.float64)
        own = off[np.arange(len(y)), y]
        self.log_loss -= float((w * np.log(_clip(own))).sum())
        off[np.arange(len(y)), y] -= 1.0
        self.square += float((w * (off**2).sum(axis=1)).sum())
        for k, table in enumerate(self.tables):
            table.add(P[:, k], y == k, outcome.w)

    def merge(self, other: ClassSums) -> None:
        """Add the sums of other rows."""
        self.confusion = self.confusion + other.confusion
        self.seen = self.seen | other.seen
        self.log_loss += other.log_loss
        self.square += other.square
        for table, another in zip(self.tables, other.tables, strict=True):
            table.merge(another)

    def values(self) -> Values:
        """Metrics by name."""
        total = self.confusion.sum()
        right, actual, chosen = np.diag(self.confusion), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        rates = {"precision": (right, chosen), "recall": (right, actual), "f1": (2 * right, actual + chosen)}
        return {
            "auc": _mean_or_none([table.auc() for table in self.tables]),
            "average_precision": _mean_or_none([table.average_precision() for table in self.tables]),
            "logloss": _ratio(self.log_loss, total),
            "brier": _ratio(self.square, total),
            "accuracy": _ratio(right.sum(), total),
            **{
                name: _mean_or_none([_ratio(a, b, 0.0) for a, b in zip(up[self.seen], down[self.seen], strict=True)])
                for name, (up, down) in rates.items()
            },
        }


class ErrorSums:
    """Sums of regression metrics, the sketch of residuals y - mu, and sums of mu and y by bucket of mu."""

    def __init__(self, quantiles: tuple[float, ...]) -> None:
        self.levels = quantiles
        self.n_rows = 0
        self.errors = np.zeros(5)  # weight, squared, absolute, relative error, Poisson deviance
        self.pinball = np.zeros(len(quantiles))
        self.poisson = True
        self.mean_y = 0.0
        self.square_y = 0.0  # sum of w (y - mean)^2, which loses no digits where the mean is large
        self.residuals = Sketch()
        self.by_mu: tuple[Array, Array] = (np.empty(0, np.int64), np.empty((3, 0)))  # keys; sums of w, w mu, w y

    def add(self, outcome: Outcome) -> None:
        """Add a batch of at least one row."""
        y, mu = outcome.y.astype(np.float64), outcome.prediction.astype(np.float64)
        w = np.ones(len(y)) if outcome.w is None else outcome.w.astype(np.float64)
        residual = y - mu
        size = np.abs(residual)
        poisson = bool((y >= 0).all() and (mu > 0).all())
        deviance = _poisson_deviance(y, mu) if poisson else np.zeros(1)
        errors = (np.ones(1), residual**2, size, size / np.maximum(np.abs(y), _EPS), deviance)
        batch = ErrorSums(self.levels)
        batch.n_rows, batch.poisson = len(y), poisson
        batch.errors = np.array([(w * error).sum() for error in errors])
        if outcome.quantiles is not None:
            gap = y[:, None] - outcome.quantiles.astype(np.float64)
            levels = np.asarray(self.levels)
            batch.pinball = (w[:, None] * np.maximum(levels * gap, (levels - 1) * gap)).sum(axis=0)
        batch.mean_y = float((w * y).sum() / w.sum()) if w.any() else 0.0
        batch.square_y = float((w * (y - batch.mean_y) ** 2).sum())
        batch.residuals.add(residual, outcome.w)
        keys = bucket_keys(mu)
        batch.by_mu = _sum_by_key(keys, np.stack([w, w * mu, w * y]))
        self.merge(batch)

    def merge(self, other: ErrorSums) -> None:
        """Add the sums of other rows."""
        mine, theirs = self.errors[0], other.errors[0]
        if theirs:  # Chan, Golub, LeVeque 1979
            step = other.mean_y - self.mean_y
            self.square_y += other.square_y + step**2 * mine * theirs / (mine + theirs)
            self.mean_y += step * theirs / (mine + theirs)
        self.n_rows += other.n_rows
        self.errors = self.errors + other.errors
        self.pinball = self.pinball + other.pinball
        self.poisson = self.poisson and other.poisson
        self.residuals = self.residuals + other.residuals
        keys, sums = (np.concatenate(pair, axis=-1) for pair in zip(self.by_mu, other.by_mu, strict=True))
        self.by_mu = _sum_by_key(keys, sums)

    def values(self) -> Values:
        """Metrics by name."""
        w, square, absolute, relative, deviance = self.errors
        mean_square = _ratio(square, w)
        values: Values = {
            "rmse": None if mean_square is None else float(np.sqrt(mean_square)),
            "mae": _ratio(absolute, w),
            "r2": self._r2(),
            "mape": _ratio(relative, w),
        }
        if self.poisson:
            values["poisson_deviance"] = _ratio(deviance, w)
        if self.levels:
            values["pinball"] = _ratio(self.pinball.mean(), w)
        return values

    def _r2(self) -> float | None:
        """1 - squared error / variance of y; as in scikit-learn 1 or 0 for a constant y, undefined for one row."""
        if self.n_rows < 2:
            return None
        if self.square_y == 0:
            return 1.0 if self.errors[1] == 0 else 0.0
        return float(1.0 - self.errors[1] / self.square_y)


class RankedRows:
    """The rows of a ranking: kept, since a group may be spread over batches and shards."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        self.depths = depths
        self._rows: list[tuple[Array, Array, Array, Array]] = []

    def add(self, outcome: Outcome) -> None:
        """Add a batch of at least one row."""
        if outcome.group is None:
            raise DataError("metrics: ranking needs the group of each row, found none; give data.group")
        y = outcome.y.astype(np.float64)
        if not (y >= 0).all():
            raise DataError(f"metrics: expected a relevance of 0 or more, found {y.min()}")
        w = np.ones(len(y)) if outcome.w is None else outcome.w.astype(np.float64)
        self._rows.append((outcome.group, outcome.prediction, y, w))

    def merge(self, other: RankedRows) -> None:
        """Add the sums of other rows."""
        self._rows.extend(other._rows)

    def values(self) -> Values:
        """Metrics by name."""
        names = [f"{metric}{at}" for at in ("", *(f"@{k}" for k in self.depths)) for metric in ("ndcg", "map")]
        if not self._rows:
            return dict.fromkeys(names)
        by_group, w = self.by_group()
        return {name: _ratio((w * by_group[name]).sum(), w.sum()) for name in names}

    def by_group(self) -> tuple[dict[str, Array], Array]:
        """Each metric's value in each group and the weight of each, (n_groups,) float64, by ascending group id."""
        group, score, y, w = (np.concatenate(part) for part in zip(*self._rows, strict=True))
        return rank_groups(group, score, y, w, self.depths)


def better(metric: str) -> int:
    """1 where a larger value of the metric is better, -1 where a smaller one is; `metric` may have a depth, @k."""
    return -1 if metric.partition("@")[0] in _LOWER_IS_BETTER else 1


def meets(value: float | None, at_least: float | None = None, at_most: float | None = None) -> bool:
    """Whether the value keeps the bounds that are given; an undefined value never does."""
    if value is None or np.isnan(value):
        return False
    return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


def constant_outcome(outcome: Outcome, task: str, prior: Sequence[float]) -> Outcome:
    """The outcome of the best constant model on the same rows: the baseline.

    Parameters
    ----------
    outcome : gives the labels, weights and groups.
    task : as for `MetricSums`.
    prior : of the training rows, weighted. binary: share of positive rows; multiclass: share of each class;
        regression: mean, then each quantile of a quantile model; ranking: nothing, all scores are 0.
    """
    n, constants = len(outcome.y), np.asarray(prior, dtype=np.float64)
    if task == "ranking":
        return replace(outcome, prediction=np.zeros(n))
    if task == "multiclass":
        return replace(outcome, prediction=np.broadcast_to(constants, (n, len(constants))))
    quantiles = None if outcome.quantiles is None else np.broadcast_to(constants[1:], (n, len(constants) - 1))
    return replace(outcome, prediction=np.full(n, constants[0]), quantiles=quantiles)


def _ratio(up: float, down: float, empty: float | None = None) -> float | None:
    return float(up / down) if down > 0 else empty


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _clip(p: Array) -> Array:
    return np.clip(p, _EPS, 1.0 - _EPS)


def _poisson_deviance(y: Array, mu: Array) -> Array:
    """2 (y log(y / mu) - y + mu) of each row."""
    log = np.log(np.where(y > 0, y, 1.0) / mu)
    return 2.0 * (np.where(y > 0, y * log, 0.0) - y + mu)


def _sum_by_key(keys: Array, sums: Array) -> tuple[Array, Array]:
    """Sorted distinct keys, and the columns of `sums` (k, n) added by key."""
    distinct, at = np.unique(keys, return_inverse=True)
    return distinct, np.stack([np.bincount(at, weights=row, minlength=len(distinct)) for row in sums])
