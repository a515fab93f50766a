"""NDCG and MAP of each group, from the rows of all groups at once.

NDCG is scikit-learn's `ndcg_score`: linear gain (XGBoost's own `ndcg` has 2^y - 1), discount 1 / log2(rank + 1), equal
scores averaged. MAP@k is XGBoost's: the sum of the precision at each relevant rank up to k over min(k, number of
relevant rows), relevant meaning y > 0; where scores are equal it is the expectation over their orders (McSherry and
Najork, "Computing information retrieval performance measures efficiently in the presence of tied scores", 2008). A
group without a relevant row counts as 0 in both (scikit-learn's choice; XGBoost's is 1), a single relevant row as 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rank_groups(
    group: Array, score: Array, y: Array, w: Array, depths: tuple[int, ...]
) -> tuple[dict[str, Array], Array]:
    """Values by group of `ndcg`, `map` and both at each depth, and the weights of groups.

    Parameters
    ----------
    group, score, y, w : (n_rows,) query, score, relevance (not negative) and weight; rows in any order, at least one.
    depths : the k of `ndcg@k` and `map@k`.

    Returns
    -------
    values : {name: (n_groups,) float64}, groups in ascending order.
    weights : (n_groups,) float64, the mean weight of the rows of each.
    """
    # y breaks ties, so that equal rows are all that can change places, whatever the sharding.
    order = np.lexsort((y, -score.astype(np.float64), group))
    group, score, y, w = group[order], score[order], y[order], w[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    start = np.flatnonzero(new_group)
    size = np.diff(np.r_[start, len(group)])
    rank = np.arange(len(group)) - np.repeat(start, size)
    tie = np.flatnonzero(new_group | np.r_[True, score[1:] != score[:-1]])
    tie_size = np.diff(np.r_[tie, len(group)])
    gain = np.repeat(np.add.reduceat(y, tie) / tie_size, tie_size)
    ideal_gain = y[np.lexsort((-y, group))]
    hit, n_hits = _expected_precision(y > 0, rank, start, tie)
    values: dict[str, Array] = {}
    for at, depth in {"": len(group), **{f"@{k}": k for k in depths}}.items():
        discount = np.where(rank < depth, 1.0 / np.log2(rank + 2.0), 0.0)
        gained, ideal = np.add.reduceat(discount * gain, start), np.add.reduceat(discount * ideal_gain, start)
        values[f"ndcg{at}"] = np.divide(gained, ideal, out=np.zeros_like(gained), where=ideal > 0)
        precision = np.add.reduceat(np.where(rank < depth, hit, 0.0), start)
        values[f"map{at}"] = precision / np.maximum(np.minimum(n_hits, depth), 1)
    return values, np.add.reduceat(w, start) / size


def _expected_precision(relevant: Array, rank: Array, start: Array, tie: Array) -> tuple[Array, Array]:
    """At each rank the chance of a relevant row times the precision then; and the relevant rows of each group."""
    n = len(relevant)
    tie_size = np.diff(np.r_[tie, n])
    running = np.cumsum(relevant) - relevant
    n_hits = np.add.reduceat(relevant.astype(np.int64), start)
    above = np.repeat(running[tie], tie_size) - np.repeat(running[start], np.diff(np.r_[start, n]))
    in_tie = np.repeat(np.add.reduceat(relevant.astype(np.int64), tie), tie_size)
    length, place = np.repeat(tie_size, tie_size), np.arange(n) - np.repeat(tie, tie_size)
    # Given a hit at this place of the tie, the other in_tie - 1 hits are spread evenly over its other places.
    hits = above + 1 + np.maximum(in_tie - 1, 0) * place / np.maximum(length - 1, 1)
    return in_tie / length * hits / (rank + 1), n_hits
