"""Who reads which rows: pure functions of the inventory's counts and the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# A cut moves to a row group's edge when that is so near; two moved cuts make a shard at most 5 % too large.
_SNAP = 40


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) among the selected rows of one row group, counted from 0."""

    file: int
    row_group: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Number of rows in the piece."""
        return self.stop - self.start


@dataclass(frozen=True)
class GroupShard:
    """The ranking groups of one worker: where to look, and which rows to keep.

    Attributes
    ----------
    pieces : whole row groups, each with at least one of the groups.
    groups : (n_groups,) uint64, sorted: `split.hash_values` of the groups.
    n_rows : rows of these groups; the pieces hold more where others' groups lie between.
    """

    pieces: tuple[Piece, ...]
    groups: np.ndarray
    n_rows: int


def plan_shards(counts: Sequence[Sequence[int]], n_workers: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each worker: contiguous in the order of the input, every selected row exactly once.

    The cut after worker i is at i/n of the rows; it moves to the nearest edge of a row group within 2.5 % of a shard,
    else it goes through the row group. So no shard is more than 5 % from the mean (or one row, where shards are tiny).

    Parameters
    ----------
    counts : selected rows, by file and row group.
    n_workers : how many workers there are, 1 or more.

    Returns
    -------
    One tuple of pieces a worker; none is empty: with fewer rows than workers there are fewer workers.
    """
    cells = [(file, group, rows) for file, groups in enumerate(counts) for group, rows in enumerate(groups) if rows]
    ends = np.cumsum([rows for _, _, rows in cells], dtype=np.int64)
    total = int(ends[-1]) if cells else 0
    n = min(n_workers, total)
    edges = np.concatenate([[0], ends])
    cuts = [0, *(_snap(i * total // n, edges, total // (_SNAP * n)) for i in range(1, n)), total]
    return tuple(tuple(_between(cells, edges, cuts[i], cuts[i + 1])) for i in range(n))


def _snap(cut: int, edges: np.ndarray, reach: int) -> int:
    """The nearest edge when it is within reach, else the cut."""
    at = int(np.searchsorted(edges, cut))
    nearest = min((int(edges[i]) for i in (at - 1, at) if 0 <= i < len(edges)), key=lambda edge: abs(edge - cut))
    return nearest if abs(nearest - cut) <= reach else cut


def _between(cells: Sequence[tuple[int, int, int]], edges: np.ndarray, start: int, stop: int) -> Iterator[Piece]:
    """Pieces of the rows [start, stop) of the whole input."""
    for at in range(int(np.searchsorted(edges, start, side="right")) - 1, len(cells)):
        file, group, rows = cells[at]
        first = int(edges[at])
        if first >= stop:
            return
        yield Piece(file, group, max(start - first, 0), min(stop - first, rows))


def plan_groups(groups: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], n_workers: int) -> tuple[GroupShard, ...]:
    """The ranking groups of each worker, every group whole, in the order of their first rows.

    Parameters
    ----------
    groups : by file and row group: hashes (n,) uint64 of the groups among the selected rows, and rows (n,) of each.
    n_workers : how many workers there are, 1 or more.

    Returns
    -------
    One shard a worker; none is empty: with fewer groups than workers there are fewer workers. The cut between two
    workers is at the edge of a group that is nearest to an equal share of the rows.
    """
    cells = [
        (file, number, np.asarray(hashes, np.uint64), np.asarray(rows, np.int64))
        for file, row_groups in enumerate(groups)
        for number, (hashes, rows) in enumerate(row_groups)
        if len(hashes)
    ]
    if not cells:
        return ()
    found, first, inverse = np.unique(np.concatenate([c[2] for c in cells]), return_index=True, return_inverse=True)
    n_rows = np.bincount(inverse, weights=np.concatenate([c[3] for c in cells])).astype(np.int64)
    order = np.argsort(first)
    cuts = _group_cuts(n_rows[order], min(n_workers, len(found)))
    owner = np.empty(len(found), np.int64)
    owner[order] = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    pieces: list[list[Piece]] = [[] for _ in cuts[1:]]
    owners = np.split(owner[inverse], np.cumsum([len(c[2]) for c in cells])[:-1])
    for (file, number, _, rows), mine in zip(cells, owners, strict=True):
        for worker in np.unique(mine):
            pieces[worker].append(Piece(file, number, 0, int(rows.sum())))
    return tuple(
        GroupShard(tuple(pieces[worker]), found[owner == worker], int(n_rows[owner == worker].sum()))
        for worker in range(len(pieces))
    )


def _group_cuts(n_rows: np.ndarray, n: int) -> list[int]:
    """Positions among groups where n shards begin and end; at least one group in each."""
    ends = np.cumsum(n_rows)
    cuts = [0]
    for i in range(1, n):
        share = i * int(ends[-1]) / n
        after = int(np.searchsorted(ends, share)) + 1
        before = int(ends[after - 2]) if after >= 2 else 0
        nearest = after if int(ends[after - 1]) - share < share - before else after - 1
        cuts.append(min(max(nearest, cuts[-1] + 1), len(n_rows) - (n - i)))
    return [*cuts, len(n_rows)]
