from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claydist.dataset.shards import Piece, plan_groups, plan_shards

counts_by_file = st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=5)


def rows_of(shards) -> list[tuple[int, int, int]]:
    return [(p.file, p.row_group, row) for shard in shards for p in shard for row in range(p.start, p.stop)]


@given(counts_by_file, st.integers(1, 9))
def test_every_row_is_read_once_in_order_and_no_worker_is_empty(counts, n_workers) -> None:
    shards = plan_shards(counts, n_workers)
    expected = [(f, g, row) for f, groups in enumerate(counts) for g, n in enumerate(groups) for row in range(n)]
    assert rows_of(shards) == expected
    assert len(shards) == min(n_workers, len(expected))
    assert all(shards)
    assert all(piece.n_rows > 0 for shard in shards for piece in shard)


@given(counts_by_file, st.integers(1, 9))
def test_shards_are_within_5_percent_of_the_mean(counts, n_workers) -> None:
    sizes = [sum(piece.n_rows for piece in shard) for shard in plan_shards(counts, n_workers)]
    if sizes:
        mean = sum(sizes) / len(sizes)
        assert max(abs(size - mean) for size in sizes) <= max(0.05 * mean, 1)


def test_a_cut_moves_to_a_near_edge_of_a_row_group_and_else_goes_through_it() -> None:
    near = plan_shards([[1010, 990]], 2)
    assert near == ((Piece(0, 0, 0, 1010),), (Piece(0, 1, 0, 990),))
    far = plan_shards([[1100, 900]], 2)
    assert far == ((Piece(0, 0, 0, 1000),), (Piece(0, 0, 1000, 1100), Piece(0, 1, 0, 900)))


def test_one_row_group_serves_more_workers_than_there_are_files() -> None:
    assert [p.n_rows for (p,) in plan_shards([[10]], 4)] == [2, 3, 2, 3]
    assert plan_shards([[2], []], 4) == ((Piece(0, 0, 0, 1),), (Piece(0, 0, 1, 2),))
    assert plan_shards([[0], []], 3) == ()


@given(st.lists(st.lists(st.lists(st.integers(0, 12), max_size=20), max_size=3), max_size=4), st.integers(1, 6))
def test_ranking_groups_stay_whole_and_every_row_has_one_worker(table, n_workers) -> None:
    groups = [[np.unique(np.array(rows, np.uint64), return_counts=True) for rows in file] for file in table]
    shards = plan_groups(groups, n_workers)
    present = {group for file in table for rows in file for group in rows}
    assert sorted(int(g) for shard in shards for g in shard.groups) == sorted(present)
    assert len(shards) == min(n_workers, len(present))
    for shard in shards:
        mine = set(shard.groups.tolist())
        assert mine
        assert shard.groups.tolist() == sorted(mine)
        holding = [(f, n) for f, file in enumerate(table) for n, rows in enumerate(file) if mine & set(rows)]
        assert [(p.file, p.row_group) for p in shard.pieces] == holding
        assert all((p.start, p.stop) == (0, len(table[p.file][p.row_group])) for p in shard.pieces)
        assert shard.n_rows == sum(row in mine for file in table for rows in file for row in rows)


@pytest.mark.parametrize("n_workers", [2, 3, 7])
def test_clustered_groups_are_balanced_and_read_about_once(n_workers) -> None:
    rows = np.repeat(np.arange(1000, dtype=np.uint64), 10)
    groups = [[np.unique(part, return_counts=True) for part in np.array_split(rows, 40)]]
    shards = plan_groups(groups, n_workers)
    assert max(abs(s.n_rows - 10_000 / n_workers) for s in shards) <= 10
    assert sum(len(s.pieces) for s in shards) <= 40 + n_workers
