"""The mean loss and its derivatives, summed over the rows of all workers: `Objective`.

Whatever is asked for takes one pass over this worker's chunks and one sum over the workers. What a chunk adds is
computed in blocks of rows that stay in the cache, so the temporaries are a few numbers a row and not a second matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

from claydist.models.losses import Loss
from claydist.models.penalties import Ridge
from claydist.models.solvers import Point

Total = Callable[[np.ndarray], np.ndarray]
_PART_ROWS = 16_384  # one thread's work between two looks at the queue
_BLOCK_ROWS = 1024  # of 28 float64 columns, and their weighted copy: both stay in the second-level cache


class Chunk(Protocol):
    """Rows in memory: numerics made on the fly, and positions of one-hot coefficients."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    @property
    def codes(self) -> np.ndarray:
        """(n_rows, n_categorical) int32 in [0, n_onehot), or -1 where no coefficient applies."""

    @property
    def y(self) -> np.ndarray:
        """(n_rows,) float64 labels."""

    @property
    def w(self) -> np.ndarray | None:
        """(n_rows,) float64 weights, None is all ones."""

    @property
    def offset(self) -> np.ndarray | None:
        """(n_rows,) float64 added to raw predictions, None is zeros."""

    def dense(self) -> np.ndarray:
        """(n_rows, n_dense) float64, imputed and standardised, of any layout; may be overwritten by the next call."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the parameters: a matrix (n_outputs, n_dense + n_onehot + 1), the intercept last, raveled."""

    n_dense: int
    n_onehot: int
    n_outputs: int

    @property
    def n_coef(self) -> int:
        """Coefficients of one output, without the intercept."""
        return self.n_dense + self.n_onehot

    @property
    def n_params(self) -> int:
        """Parameters of all outputs, with the intercepts."""
        return self.n_outputs * (self.n_coef + 1)


class Objective:
    """Mean loss plus ridge, sum_i w_i loss_i / sum_w + sum_j ridge_j params_j^2 / 2, over the rows of all workers.

    Parameters
    ----------
    chunks : this worker's rows; may be empty.
    loss : one of `LOSSES`.
    ridge : strengths (n_params,), zero at intercepts.
    shape : sizes of the parameters.
    sum_w : float, sum of weights of all workers.
    total : sum over workers of an equally shaped float64 array; every worker calls it in the same order.
    parallel : as the builtin `map`; a thread pool's gives the same bits.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        loss: Loss,
        ridge: Ridge,
        *,
        shape: Shape,
        sum_w: float,
        total: Total,
        parallel: Callable[..., Iterable[np.ndarray]] = map,
    ) -> None:
        self.chunks = chunks
        self.loss = loss
        self.ridge = ridge
        self.shape = shape
        self.sum_w = sum_w
        self.total = total
        self._map = parallel
        self.n_workers = float(total(np.ones(1))[0])
        self._curvature: np.ndarray | None = None  # of the loss alone, kept where it is constant

    def evaluate(self, params: np.ndarray, *, hessian: bool = False) -> Point:
        """Point at `params` from one pass over the rows; with the Hessian only where it is asked for."""
        n_params = self.shape.n_params
        fresh = hessian and self._curvature is None
        sums = np.zeros(1 + n_params + fresh * n_params**2)
        for chunk in self.chunks:
            for part in self._part_sums(chunk, params, len(sums)):
                sums += part
        sums = self.total(sums) / self.sum_w
        curvature = self._curvature
        if fresh:
            curvature = _mirrored(self._blocks(sums))
            self._curvature = curvature if self.loss.constant_curvature else None
        return Point(
            params,
            float(sums[0]) + self.ridge.value(params),
            sums[1 : 1 + n_params] + self.ridge.gradient(params),
            curvature + np.diag(self.ridge.strength) if hessian and curvature is not None else None,
        )

    def along(self, params: np.ndarray, direction: np.ndarray) -> Callable[[float], float]:
        """Value at `params + step * direction` as a function of step; one pass, then 16 bytes a row and output."""
        margins = []
        for chunk in self.chunks:
            X, onehot = chunk.dense(), _onehot(chunk.codes, self.shape.n_onehot)
            slope = self._margin(direction, X, onehot)
            margins.append((chunk, _with_offset(self._margin(params, X, onehot), chunk.offset), slope))

        def value(step: float) -> float:
            local = np.zeros(1)
            with np.errstate(over="ignore", invalid="ignore"):
                for chunk, raw, slope in margins:
                    local[0] += _weighted_sum(self.loss.evaluate(raw + step * slope, chunk.y)[0], chunk.w)
            return float(self.total(local)[0]) / self.sum_w + self.ridge.value(params + step * direction)

        return value

    def diagonal(self, params: np.ndarray) -> np.ndarray:
        """Diagonal (n_params,) of the Hessian at `params`; one pass."""
        sums = np.zeros((self.shape.n_outputs, self.shape.n_coef + 1))
        n_dense = self.shape.n_dense
        for chunk in self.chunks:
            X, onehot = chunk.dense(), _onehot(chunk.codes, self.shape.n_onehot)
            mean = self.loss.evaluate(_with_offset(self._margin(params, X, onehot), chunk.offset), chunk.y)[1]
            for k, row in enumerate(sums):
                h = _weighted(self.loss.curvature(mean, k, k), chunk.w)
                row[:n_dense] += np.einsum("ij,ij,i->j", X, X, h)
                row[n_dense:-1] += onehot.T @ h
                row[-1] += h.sum()
        return self.total(sums.ravel()) / self.sum_w + self.ridge.strength

    def agree(self, local: np.ndarray) -> np.ndarray:
        """Mean over workers of what each computed alone: on unlike CPUs their LAPACKs differ in the last bits."""
        return self.total(local) / self.n_workers

    def _margin(self, params: np.ndarray, X: np.ndarray, onehot: sparse.csr_array) -> np.ndarray:
        matrix = params.reshape(self.shape.n_outputs, -1)
        n_dense = self.shape.n_dense
        margin = X @ matrix[:, :n_dense].T
        if self.shape.n_onehot:
            margin += onehot @ matrix[:, n_dense:-1].T
        margin += matrix[:, -1]
        return margin

    def _blocks(self, sums: np.ndarray) -> np.ndarray:
        """The Hessian's part of the sums, (n_outputs, n_coef + 1, n_outputs, n_coef + 1); empty where there is none."""
        blocks = sums[1 + self.shape.n_params :]
        return blocks.reshape((self.shape.n_outputs, self.shape.n_coef + 1) * 2) if len(blocks) else blocks

    def _part_sums(self, chunk: Chunk, params: np.ndarray, n_sums: int) -> Iterable[np.ndarray]:
        """Sums of parts of a chunk, computed in parallel; parts and order do not depend on the number of threads."""
        X = chunk.dense()

        def part_sums(rows: slice) -> np.ndarray:
            sums = np.zeros(n_sums)
            with np.errstate(over="ignore", invalid="ignore"):  # a step too far is not finite; the solvers refuse it
                self._add_rows(_Part.of(chunk, X, rows), params, sums)
            return sums

        return self._map(part_sums, _slices(len(X), max(_PART_ROWS, 64 * self.shape.n_params)))

    def _add_rows(self, part: _Part, params: np.ndarray, sums: np.ndarray) -> None:
        n_dense, X, onehot = self.shape.n_dense, part.X, _onehot(part.codes, self.shape.n_onehot)
        value, mean = self.loss.evaluate(_with_offset(self._margin(params, X, onehot), part.offset), part.y)
        sums[0] += _weighted_sum(value, part.w)
        g = _weighted(self.loss.gradient(mean, part.y), part.w)
        gradient = sums[1 : 1 + self.shape.n_params].reshape(self.shape.n_outputs, -1)
        gradient[:, :n_dense] += g.T @ X
        gradient[:, -1] += g.sum(axis=0)
        if self.shape.n_onehot:
            gradient[:, n_dense:-1] += (onehot.T @ g).T
        blocks = self._blocks(sums)
        for i in range(len(blocks)):
            for j in range(i + 1):
                h = _weighted(self.loss.curvature(mean, i, j), part.w)
                _add_gram(blocks[i, :, j], X, part.codes, onehot, h)


@dataclass(frozen=True)
class _Part:
    """Some rows of a chunk."""

    X: np.ndarray
    codes: np.ndarray
    y: np.ndarray
    w: np.ndarray | None
    offset: np.ndarray | None

    @classmethod
    def of(cls, chunk: Chunk, X: np.ndarray, rows: slice) -> _Part:
        w = None if chunk.w is None else chunk.w[rows]
        offset = None if chunk.offset is None else chunk.offset[rows]
        return cls(X[rows], chunk.codes[rows], chunk.y[rows], w, offset)


def _onehot(codes: np.ndarray, n_onehot: int) -> sparse.csr_array:
    """(n_rows, n_onehot) ones at the codes; a negative code is an empty place."""
    kept = codes >= 0
    indices = codes.ravel() if kept.all() else codes[kept]
    starts = np.zeros(len(codes) + 1, dtype=np.int32)
    np.cumsum(kept.sum(axis=1), out=starts[1:])
    return sparse.csr_array((np.ones(len(indices)), indices, starts), shape=(len(codes), n_onehot))


def _with_offset(margin: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    if offset is not None:
        margin += offset[:, None]
    return margin


def _weighted(array: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    if w is None:
        return array
    return array * (w if array.ndim == 1 else w[:, None])


def _weighted_sum(value: np.ndarray, w: np.ndarray | None) -> float:
    return float(value.sum() if w is None else w @ value)


def _add_gram(out: np.ndarray, X: np.ndarray, codes: np.ndarray, onehot: sparse.csr_array, h: np.ndarray) -> None:
    """Add Z.T diag(h) Z to `out` for Z = [X, onehot, 1]; of the parts beside the diagonal only those above it."""
    n_dense = X.shape[1]
    with_onehot = onehot.shape[1] > 0
    buffer = np.empty_like(X[:_BLOCK_ROWS])  # in the layout of X: to change it on the way costs more than the product
    for rows in _slices(len(X), _BLOCK_ROWS):
        scaled = np.multiply(X[rows], h[rows, None], out=buffer[: rows.stop - rows.start])
        out[:n_dense, :n_dense] += X[rows].T @ scaled
        if with_onehot:
            out[:n_dense, n_dense:-1] += (onehot[rows].T @ scaled).T
    out[:n_dense, -1] += h @ X
    out[-1, -1] += h.sum()
    if with_onehot:
        out[n_dense:-1, -1] += onehot.T @ h
        _add_pairs(out[n_dense:-1, n_dense:-1], codes, h)


def _slices(n_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _add_pairs(out: np.ndarray, codes: np.ndarray, h: np.ndarray) -> None:
    """Add the weights of all pairs of codes, column by column: far faster than a product of two sparse matrices."""
    n_columns = codes.shape[1]
    kept = codes >= 0
    low = [int(codes[kept[:, a], a].min(initial=len(out) - 1)) for a in range(n_columns)]
    size = [int(codes[:, a].max(initial=0)) + 1 - low[a] for a in range(n_columns)]
    for a in range(n_columns):
        out_a = slice(low[a], low[a] + max(size[a], 0))
        for b in range(a, n_columns):
            both = kept[:, a] & kept[:, b]
            if not both.any():
                continue
            flat = (codes[both, a].astype(np.int64) - low[a]) * size[b] + (codes[both, b] - low[b])
            sums = np.bincount(flat, weights=h[both], minlength=size[a] * size[b]).reshape(size[a], size[b])
            out[out_a, low[b] : low[b] + size[b]] += sums
            if a != b:
                out[low[b] : low[b] + size[b], out_a] += sums.T


def _mirrored(blocks: np.ndarray) -> np.ndarray:
    """(n_params, n_params) symmetric from the parts that `_add_gram` filled; blocks is (n_outputs, n, n_outputs, n)."""
    n_outputs, n, _, _ = blocks.shape
    for i in range(n_outputs):
        for j in range(i + 1):
            block = np.triu(blocks[i, :, j])
            block += np.triu(block, 1).T
            blocks[i, :, j] = block
            blocks[j, :, i] = block
    return blocks.reshape(n_outputs * n, n_outputs * n)
