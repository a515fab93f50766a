"""Weight of positive and negative rows at each distinct score: what ROC and precision-recall need, exactly.

Tables of shards add up to the table of all rows, so AUC does not depend on the sharding, nor on a shard that has one
class only. Without weights the counts are integers, and every value has the same bits however the rows are spread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_PENDING_ROWS = 1 << 20


class ScoreTable:
    """Sums by distinct score; memory is bounded by these (12 bytes each for float32 scores without weights)."""

    def __init__(self) -> None:
        self._rows: list[tuple[Array, Array, Array]] = []
        self._n_pending = 0

    def add(self, score: Array, positive: Array, w: Array | None = None) -> None:
        """Add rows: `score` (n,) float keeps its dtype, `positive` (n,) bool, `w` (n,) weights or None."""
        weight = np.ones(len(score), np.int32) if w is None else w.astype(np.float64)
        self._rows.append((score, weight * positive, weight * ~positive))
        self._n_pending += len(score)
        # Waiting until the pending rows outnumber the table keeps the total cost that of one sort.
        if self._n_pending > max(_PENDING_ROWS, len(self._rows[0][0])):
            self.table()

    def merge(self, other: ScoreTable) -> None:
        """Add the rows of another table."""
        self._rows.extend(other._rows)
        self._n_pending += sum(len(rows[0]) for rows in other._rows)

    def table(self) -> tuple[Array, Array, Array]:
        """Distinct scores in ascending order, and the weight of positive and of negative rows at each; (m,) each."""
        if not self._rows:
            self._rows = [(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int32))]
        if self._n_pending:
            score, pos, neg = (np.concatenate(part) for part in zip(*self._rows, strict=True))
            # Integer sums have no order; float sums need that of the rows to be the same on every machine.
            order = np.argsort(score, kind=None if pos.dtype.kind == "i" else "stable")
            score = score[order]
            first = np.flatnonzero(np.r_[True, score[1:] != score[:-1]][: len(score)])
            self._rows = [(score[first], _sum_runs(pos[order], first), _sum_runs(neg[order], first))]
            self._n_pending = 0
        return self._rows[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": [self.table()], "_n_pending": 0}

    def auc(self) -> float | None:
        """Chance that a positive row scores above a negative one, ties half: the area under the ROC curve."""
        _, pos, neg = self.table()
        n_pos, n_neg = float(pos.sum()), float(neg.sum())
        if not (n_pos and n_neg):
            return None
        below = np.cumsum(neg, dtype=np.float64) - 0.5 * neg
        return float((pos * below).sum() / n_pos / n_neg)

    def average_precision(self) -> float | None:
        """Sum over distinct scores, from the top, of the recall that each adds times the precision down to it."""
        _, pos, neg = self.table()
        n_pos = float(pos.sum())
        if not n_pos:
            return None
        pos = pos[::-1].astype(np.float64)
        found = np.cumsum(pos)
        taken = found + np.cumsum(neg[::-1], dtype=np.float64)
        precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
        return float((pos * precision).sum() / n_pos)


def _sum_runs(weights: Array, first: Array) -> Array:
    """Sum of each run that starts at `first`; counts stay int32 while each fits, to halve what is sent."""
    if not len(first):
        return weights
    if weights.dtype.kind != "i":
        return np.add.reduceat(weights, first)
    counts = np.add.reduceat(weights, first, dtype=np.int64)
    return counts.astype(np.int32) if counts.max() < 2**31 else counts
