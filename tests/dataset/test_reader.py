from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claydist.dataset.footers import Inventory, take_inventory
from claydist.dataset.reader import BATCH_BYTES, BATCH_ROWS, Selection, batch_rows_of, read_parts, read_pieces
from claydist.dataset.shards import Piece, plan_groups, plan_shards
from claydist.dataset.split import SplitPlan, hash_values
from claydist.errors import DataError, InputChanged
from claydist.expressions import parse
from claydist.spec import SplitSpec

FLIGHTS = Path(__file__).parents[2] / "../shared/data/flights13"
SPLIT = SplitPlan.of(SplitSpec.model_validate({"valid": {"fraction": 0.2}, "test": {"fraction": 0.3}}), 3)


def write(path: Path, table: pa.Table, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **how)
    return path


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    """Two months, row groups of 70, one file of them narrower and without a column."""
    rng = np.random.default_rng(0)
    one = pa.table({"i": range(300), "x": rng.normal(size=300), "s": [f"s{i % 7}" for i in range(300)]})
    two = pa.table({"i": pa.array(range(300, 500), pa.int16()), "s": pa.array(["t"] * 200).dictionary_encode()})
    write(tmp_path / "m=1/a.parquet", one, row_group_size=70)
    write(tmp_path / "m=2/b.parquet", two, row_group_size=70)
    return take_inventory(str(tmp_path))


def read_all(inventory: Inventory, columns: Sequence[str], selection: Selection | None = None, **how) -> pa.Table:
    counts = counted(inventory, selection or Selection())
    [pieces] = plan_shards(counts, 1)
    return pa.concat_tables(read_pieces(inventory, pieces, columns, selection, **how))


def counted(inventory: Inventory, selection: Selection) -> list[list[int]]:
    """Selected rows by file and row group, from the pass that the statistics make."""
    counts = [[0] * len(entry.row_groups) for entry in inventory.files]
    part = {None: None, "train": 0, "valid": 1, "test": 2}[selection.part]
    for file, entry in enumerate(inventory.files):
        groups = range(len(entry.row_groups))
        for group, parts, table in read_parts(inventory, file, groups, ["i"], selection.where, selection.split):
            assert len(parts) == table.num_rows > 0
            counts[file][group] += len(parts) if part is None else int((parts == part).sum())
    return counts


def test_columns_have_the_types_of_the_inventory_and_the_order_asked_for(inventory: Inventory) -> None:
    table = read_all(inventory, ["m", "s", "x", "i"])
    assert table.schema == pa.schema({"m": pa.int64(), "s": pa.string(), "x": pa.float64(), "i": pa.int64()})
    assert table["i"].to_pylist() == list(range(500))
    assert table["m"].to_pylist() == [1] * 300 + [2] * 200
    assert table["x"].null_count == 200
    assert set(table["s"].to_pylist()[300:]) == {"t"}


@pytest.mark.parametrize("columns", [["m"], ["x"]])
def test_columns_that_no_file_holds_have_their_rows(inventory: Inventory, columns: list[str]) -> None:
    assert read_all(inventory, columns).num_rows == 500


SELECTIONS = [
    Selection(),
    Selection("x > 0"),
    Selection("m = 2 or s = 's3'"),
    Selection("i >= 480"),
    Selection(None, SPLIT, "train"),
    Selection("s != 's1'", SPLIT, "valid"),
    Selection("not x > 0", SPLIT, "test"),
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    chosen=st.sampled_from(SELECTIONS), n_workers=st.integers(1, 12), batch_rows=st.sampled_from([1, 16, 70, 100, 4096])
)
def test_workers_read_every_selected_row_once_in_order(inventory, chosen, n_workers, batch_rows) -> None:
    whole = read_all(inventory, ["i", "x", "s", "m"])
    parts = np.concatenate(
        [SPLIT.assign(pa.table({"i": range(300)}), "m=1/a.parquet", 0),
         SPLIT.assign(pa.table({"i": range(200)}), "m=2/b.parquet", 0)]
    )  # fmt: skip
    expected = np.ones(500, bool) if chosen.where is None else parse(chosen.where).mask(whole)
    if chosen.part:
        expected &= parts == {"train": 0, "valid": 1, "test": 2}[chosen.part]
    shards = plan_shards(counted(inventory, chosen), n_workers)
    found = []
    for pieces in shards:
        tables = list(read_pieces(inventory, pieces, ["i"], chosen, batch_rows=batch_rows))
        assert sum(t.num_rows for t in tables) == sum(piece.n_rows for piece in pieces)
        assert all(batch_rows <= t.num_rows < 2 * batch_rows for t in tables[:-1])
        assert all(t.num_rows and t.column_names == ["i"] and t["i"].num_chunks == 1 for t in tables)
        found += [i for t in tables for i in t["i"].to_pylist()]
    assert found == np.flatnonzero(expected).tolist()


def test_parts_are_of_the_rows_after_where(inventory: Inventory) -> None:
    found = {}
    for file in range(2):
        for _, parts, table in read_parts(inventory, file, [0, 1, 2], ["i"], "i < 350", SPLIT, batch_rows=32):
            assert parts.dtype == np.int8
            found.update(zip(table["i"].to_pylist(), parts.tolist(), strict=True))
    assert sorted(found) == [*range(210), *range(300, 350)]
    assert list(found.values())[:210] == SPLIT.assign(pa.table({"i": range(210)}), "m=1/a.parquet", 0).tolist()


def test_row_groups_that_where_rules_out_are_not_read(inventory: Inventory) -> None:
    for file, where, expected in [(0, "i >= 250", [3, 4]), (0, "m = 2", []), (1, "m = 2 and s = 't'", [0, 1, 2])]:
        groups = range(len(inventory.files[file].row_groups))
        assert [g for g, _, _ in read_parts(inventory, file, groups, ["s"], where)] == expected
    damage(inventory, 0, row_group=0, column="i")
    refreshed = take_inventory(str(Path(inventory.files[0].url).parents[1]))
    assert [g for g, _, _ in read_parts(refreshed, 0, range(5), ["i"], "i >= 250")] == [3, 4]


def test_pruning_keeps_to_the_types_of_the_inventory(tmp_path: Path) -> None:
    """0.1 in float32 is above 0.1, which the statistics of a float32 file do not show."""
    write(tmp_path / "a.parquet", pa.table({"f": pa.array([0.1], pa.float32())}))
    write(tmp_path / "b.parquet", pa.table({"f": pa.array([0.05])}))
    both = take_inventory(str(tmp_path))
    assert sum(t.num_rows for file in (0, 1) for _, _, t in read_parts(both, file, [0], ["f"], "f > 0.1")) == 1


def test_ranking_groups_come_whole_to_one_worker(inventory: Inventory) -> None:
    by_group = [[] for _ in inventory.files]
    for file, entry in enumerate(inventory.files):
        for number in range(len(entry.row_groups)):
            tables = [t for _, _, t in read_parts(inventory, file, [number], ["s"], "i != 5")]
            hashes = np.concatenate([hash_values(t["s"]) for t in tables])
            by_group[file].append(np.unique(hashes, return_counts=True))
    seen: list[set[str]] = []
    n_rows = 0
    for shard in plan_groups(by_group, 3):
        tables = list(
            read_pieces(inventory, shard.pieces, ["i"], Selection("i != 5"), groups=("s", shard.groups), batch_rows=50)
        )
        rows = [i for t in tables for i in t["i"].to_pylist()]
        assert len(rows) == shard.n_rows
        n_rows += len(rows)
        seen.append({f"s{i % 7}" if i < 300 else "t" for i in rows})
    assert n_rows == 499
    assert sum(map(len, seen)) == len(set.union(*seen)) == 8


def test_chunks_of_dictionaries_become_one(tmp_path: Path) -> None:
    for name, values in (("a", ["x", "y", None]), ("b", ["z", "y", "z"])):
        write(tmp_path / f"{name}.parquet", pa.table({"i": [1, 2, 3], "c": pa.array(values).dictionary_encode()}))
    table = read_all(take_inventory(str(tmp_path)), ["c"])
    assert table["c"].num_chunks == 1
    assert table["c"].to_pylist() == ["x", "y", None, "z", "y", "z"]


def test_dotted_names_and_nested_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"a": [1, 2], "a.b": [3, 4], "i": [0, 1], "n": [{"x": 1}, {"x": 2}]}))
    assert read_all(take_inventory(str(tmp_path)), ["a.b", "a"]).to_pydict() == {"a.b": [3, 4], "a": [1, 2]}
    assert read_all(take_inventory(str(tmp_path)), ["a"], Selection('"a.b" = 4')).to_pydict() == {"a": [2]}


def test_an_unknown_column_is_named(inventory: Inventory) -> None:
    with pytest.raises(DataError, match=r"columns \['q'\] are not in the input; it has i, m, s, x"):
        next(read_pieces(inventory, [Piece(0, 0, 0, 1)], ["q"]))
    with pytest.raises(DataError, match=r"\['q'\]"):
        next(read_parts(inventory, 0, [0], ["i"], "q = 1"))


def test_a_value_that_does_not_fit_the_wider_type_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"t": pa.array([2**40], pa.timestamp("s"))}))
    write(tmp_path / "b.parquet", pa.table({"t": pa.array([1], pa.timestamp("ns"))}))
    with pytest.raises(DataError, match=r"cannot read row group 0 of .*a\.parquet"):
        list(read_pieces(take_inventory(str(tmp_path)), [Piece(0, 0, 0, 1)], ["t"]))


def test_a_changed_file_is_an_error_that_names_it(inventory: Inventory) -> None:
    os.utime(inventory.files[0].url, ns=(1, 1))
    with pytest.raises(InputChanged, match=r"a\.parquet changed"):
        next(read_pieces(inventory, [Piece(0, 0, 0, 1)], ["i"]))


def test_a_damaged_page_is_an_error_that_names_file_and_row_group(inventory: Inventory) -> None:
    damage(inventory, 0, row_group=1, column="s")
    refreshed = take_inventory(str(Path(inventory.files[0].url).parents[1]))
    pieces = [Piece(0, 0, 0, 70), Piece(0, 1, 0, 70)]
    assert sum(t.num_rows for t in read_pieces(refreshed, pieces, ["i"])) == 140
    with pytest.raises(DataError, match=r"row group 1 of .*a\.parquet"):
        list(read_pieces(refreshed, pieces, ["s"]))


def test_rows_that_the_plan_counted_and_the_file_lacks_are_an_error(inventory: Inventory) -> None:
    with pytest.raises(DataError, match="expected more selected rows"):
        list(read_pieces(inventory, [Piece(0, 0, 0, 70)], ["i"], Selection("i < 10")))


def damage(inventory: Inventory, file: int, row_group: int, column: str) -> None:
    """Overwrite the pages of one column chunk, the header included."""
    path = Path(inventory.files[file].url)
    group = pq.read_metadata(path).row_group(row_group)
    [chunk] = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


@pytest.mark.skipif(not FLIGHTS.exists(), reason="../shared/data is not here")
def test_flights() -> None:
    flights = take_inventory(str(FLIGHTS))

    def tables(columns: Iterable[str], where: str | None = None) -> pa.Table:
        found = [t for f in range(12) for _, _, t in read_parts(flights, f, [0], list(columns), where)]
        return pa.concat_tables(found)

    carriers = dict(map(dict.values, tables(["carrier"])["carrier"].value_counts().to_pylist()))
    assert {name: carriers[name] for name in ("UA", "B6", "EV")} == {"UA": 58_665, "B6": 54_635, "EV": 54_173}
    delays = tables(["arr_delay"], "arr_delay is not null")["arr_delay"]
    assert len(delays) == 327_346
    assert pc.mean(delays).as_py() == pytest.approx(6.895377, abs=1e-6)
    assert tables(["flight"], "month >= 11").num_rows == 27_268 + 28_135
    assert tables(["flight"], "time_hour < '2013-02-01 00:00:00-05:00'").num_rows == pytest.approx(27_004, rel=0.05)


def test_wide_rows_come_in_smaller_batches(tmp_path) -> None:
    assert batch_rows_of([pa.float32()] * 28) == BATCH_ROWS
    assert batch_rows_of([pa.float64()] * 800) == BATCH_BYTES // 6400
    assert batch_rows_of([pa.string()] * 4_000_000) == 1
    table = pa.table({f"c{j}": np.arange(5000, dtype=np.float64) + j for j in range(3000)})
    pq.write_table(table, tmp_path / "wide.parquet", row_group_size=5000)
    inventory = take_inventory([str(tmp_path)])
    tables = list(read_pieces(inventory, (Piece(0, 0, 0, 5000),), table.column_names))
    assert max(t.nbytes for t in tables) <= 1.1 * BATCH_BYTES < table.nbytes
    assert pa.concat_tables(tables).combine_chunks().equals(table)
