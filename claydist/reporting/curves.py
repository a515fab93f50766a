"""From merged metric sums to the points that a report draws: JSON-able, at most 200 points a curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from claydist.metrics import BinarySums, ClassSums, ErrorSums, MetricSums, RankedRows
from claydist.score_table import ScoreTable

Array = npt.NDArray[Any]

N_POINTS = 200
N_BINS = 20
N_BARS = 40
N_CLASSES = 20


def curves(sums: MetricSums) -> dict[str, Any]:
    """What to draw of an evaluation, by name; {} where there are no rows.

    binary: `roc` {false_positive_rate, true_positive_rate}, `precision_recall` {recall, precision}, `calibration`
    {predicted, observed, rows} in 20 bins of about equal weight, `confusion`. multiclass: `confusion` {classes, matrix,
    left_out}: weights by label (row) and prediction (column) of the 20 most frequent classes. regression: `residuals`
    {edges, counts} of y - mu between its 0.5 % and 99.5 % quantiles, `deciles` {predicted, observed, rows} by predicted
    value. ranking: `groups` {edges, counts} of NDCG by group. `rows` and counts are sums of weights.
    """
    if not sums.sum_w > 0:
        return {}
    draw: dict[str, Any] = {"binary": _binary, "multiclass": _multiclass, "regression": _regression, "ranking": _groups}
    # Of infinite predictions come NaN, which the plot says it cannot draw.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found: dict[str, Any] = draw[sums.task](sums.parts)
    return found


def _binary(parts: BinarySums) -> dict[str, Any]:
    matrix = parts.confusion().tolist()
    found = {"calibration": _calibration(parts.scores), "confusion": {"classes": [0, 1], "matrix": matrix}}
    _, pos, neg = parts.scores.table()
    if not (pos.sum() and neg.sum()):
        return found
    found_pos, found_neg = (np.r_[0.0, np.cumsum(side[::-1], dtype=np.float64)] for side in (pos, neg))
    tpr, fpr = found_pos / found_pos[-1], found_neg / found_neg[-1]
    taken = found_pos + found_neg
    precision = found_pos[1:] / np.where(taken[1:] > 0, taken[1:], 1.0)
    at, by_recall = _spread(tpr + fpr), _spread(tpr[1:])
    roc = {"false_positive_rate": fpr[at].tolist(), "true_positive_rate": tpr[at].tolist()}
    recall = {"recall": tpr[1:][by_recall].tolist(), "precision": precision[by_recall].tolist()}
    return {"roc": roc, "precision_recall": recall, **found}


def _calibration(scores: ScoreTable) -> dict[str, list[float]]:
    """Mean probability and share of positives by quantile bin of the probability."""
    score, pos, neg = scores.table()
    weight = (pos + neg).astype(np.float64)
    return _means_by_bin(weight, weight * score, pos.astype(np.float64), N_BINS)


def _means_by_bin(weight: Array, predicted: Array, observed: Array, n_bins: int) -> dict[str, list[float]]:
    """Means of predicted and observed sums over at most `n_bins` runs of about equal weight."""
    middle = np.cumsum(weight) - weight / 2
    bins = np.minimum((middle / weight.sum() * n_bins).astype(np.int64), n_bins - 1)
    sums = [np.bincount(bins, weights=part, minlength=n_bins) for part in (weight, predicted, observed)]
    used = sums[0] > 0
    rows, total_predicted, total_observed = (part[used] for part in sums)
    return {
        "predicted": (total_predicted / rows).tolist(),
        "observed": (total_observed / rows).tolist(),
        "rows": rows.tolist(),
    }


def _multiclass(parts: ClassSums) -> dict[str, Any]:
    by_size = np.argsort(-parts.confusion.sum(axis=1), kind="stable")[:N_CLASSES]
    classes = np.sort(by_size)
    matrix = parts.confusion[np.ix_(classes, classes)].tolist()
    left_out = parts.n_classes - len(classes)
    return {"confusion": {"classes": classes.tolist(), "matrix": matrix, "left_out": left_out}}


def _regression(parts: ErrorSums) -> dict[str, Any]:
    _, (weight, predicted, observed) = parts.by_mu
    used = weight > 0
    deciles = _means_by_bin(weight[used], predicted[used], observed[used], 10)
    low, high = (parts.residuals.quantile(q) or 0.0 for q in (0.005, 0.995))
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, N_BARS + 1)
    counts = np.diff(parts.residuals.below(edges))
    return {"residuals": {"edges": edges.tolist(), "counts": counts.tolist()}, "deciles": deciles}


def _groups(parts: RankedRows) -> dict[str, Any]:
    values, w = parts.by_group()
    counts, edges = np.histogram(values["ndcg"], bins=N_BINS, range=(0.0, 1.0), weights=w)
    return {"groups": {"edges": edges.tolist(), "counts": counts.tolist()}}


def _spread(position: Array) -> Array:
    """Indices of at most 200 points at about equal steps of a rising position, with both ends."""
    steps = np.linspace(position[0], position[-1], N_POINTS)
    return np.unique(np.r_[0, np.searchsorted(position, steps)[1:-1], len(position) - 1])
