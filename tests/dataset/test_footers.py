from __future__ import annotations

import json
import os
import pickle
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from claydist.dataset.footers import (
    FILES_PER_TASK,
    Inventory,
    declared_types,
    read_footers,
    take_inventories,
    take_inventory,
)
from claydist.dataset.listing import find_files
from claydist.errors import DataError, InputChanged
from claydist.storage import Store
from tests.stores import s3_options, store  # noqa: F401  fixtures

FLIGHTS = Path(__file__).parents[2] / "../shared/data"


def write(path: Path, row_group_size: int | None = None, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def parquet_bytes(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_an_inventory_counts_rows_by_row_group(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4, x=range(10), s=["a"] * 10)
    write(tmp_path / "m=2" / "b.parquet", x=range(3), s=["b"] * 3)
    inventory = take_inventory(str(tmp_path))
    assert [entry.row_groups for entry in inventory.files] == [(4, 4, 2), (3,)]
    assert [entry.schema for entry in inventory.files] == [0, 0]
    assert inventory.n_rows == 13
    assert inventory.n_bytes == sum(map(sum, (entry.group_bytes for entry in inventory.files))) > 0
    assert inventory.schema == pa.schema({"x": pa.int64(), "s": pa.string(), "m": pa.int64()})
    assert [inventory.key_values(i)["m"].as_py() for i in range(2)] == [None, 2]
    assert inventory.missing("m") == [str(tmp_path / "a.parquet")]
    assert inventory.missing("x") == []


def test_it_reads_wherever_fsspec_does_and_tells_no_secret(store: Store) -> None:  # noqa: F811
    for month in (1, 2):
        store.join(f"m={month}", "a.parquet").write(parquet_bytes(x=[month]))
    options = {**store.fs.storage_options, "extra_secret": "hunter2"} if store.url.startswith("memory") else {}
    inventory = take_inventory(store.url, options={**store.fs.storage_options, **options})
    assert [entry.path for entry in inventory.files] == ["m=1/a.parquet", "m=2/a.parquet"]
    assert inventory.n_rows == 2
    back = pickle.loads(pickle.dumps(inventory))
    assert back.fingerprint == inventory.fingerprint
    back.check_unchanged(0)
    assert "hunter2" not in repr(inventory) + json.dumps(inventory.to_json())
    assert json.loads(json.dumps(inventory.to_json()))["n_rows"] == 2


def test_the_fingerprint_is_of_the_data_and_not_of_the_way_to_it(tmp_path: Path) -> None:
    for root in ("here", "there/deep"):
        for name in ("a", "b"):
            os.utime(write(tmp_path / root / f"m=1/{name}.parquet", x=[1, 2]), ns=(5, 5))
    one = take_inventory(str(tmp_path / "here"))
    files = [str(tmp_path / f"here/m=1/{name}.parquet") for name in "ba"]
    assert take_inventory(str(tmp_path / "there/deep")).fingerprint == one.fingerprint
    assert take_inventory(files[::-1]).fingerprint == take_inventory(files).fingerprint
    os.utime(tmp_path / "here/m=1/a.parquet", ns=(6, 6))
    assert take_inventory(str(tmp_path / "here")).fingerprint != one.fingerprint


def test_footers_are_read_in_chunks_by_whoever_runs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("claydist.dataset.footers.FEW_LOCAL_FILES", 3)
    monkeypatch.setattr("claydist.dataset.footers.FILES_PER_TASK", 2)
    for i in range(5):
        write(tmp_path / f"{i}.parquet", x=range(i + 1))
    sizes = []

    def run(function, chunks):
        assert function is read_footers
        sizes.extend(len(chunk) for chunk in chunks)
        return [pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(chunk))))) for chunk in chunks]

    inventory = take_inventory(str(tmp_path), run=run)
    assert sizes == [2, 2, 1]
    assert inventory == take_inventory(str(tmp_path))
    assert len(inventory.schemas) == 1
    assert FILES_PER_TASK > 1


def test_every_unreadable_file_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.parquet", x=range(100))
    (tmp_path / "b.parquet").write_bytes(whole.read_bytes()[:-20])
    (tmp_path / "c.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match="cannot be used") as caught:
        take_inventory(str(tmp_path))
    assert [problem.split(": cannot be read as Parquet")[0] for problem in caught.value.problems] == [
        str(tmp_path / "b.parquet"),
        str(tmp_path / "c.csv"),
    ]


def test_what_is_wrong_with_a_file_is_the_trouble_of_its_group_only(tmp_path: Path) -> None:
    whole = write(tmp_path / "m=1/a.parquet", x=range(100))
    write(tmp_path / "m=2/a.parquet", x=[1])
    write(tmp_path / "m=2/b.parquet", x=["text"])
    write(tmp_path / "m=3/a.parquet", x=[1])
    (tmp_path / "m=3/b.parquet").write_bytes(whole.read_bytes()[:-20])
    write(tmp_path / "m=x/a.parquet", x=[0.5])
    found = find_files([str(tmp_path)])
    groups = [[f for f in found if f.path.startswith(f"m={m}/")] for m in "123x"]
    first, mixed, spoilt, text = take_inventories(groups, types=declared_types(found, {}))
    assert isinstance(first, Inventory)
    assert isinstance(text, Inventory)
    assert first.schema == pa.schema({"x": pa.int64(), "m": pa.string()}), "one type of the key for all groups"
    assert text.schema == pa.schema({"x": pa.float64(), "m": pa.string()})
    assert "m=2/b.parquet: column 'x': expected int64" in str(mixed)
    assert "m=3/b.parquet: cannot be read as Parquet" in str(spoilt)
    declared = take_inventories(groups, types=declared_types(found, {"m": "integer"}))
    assert [isinstance(group, Inventory) for group in declared] == [True, False, False, False]
    assert "key 'm': expected integer, found 'x'" in str(declared[3])


def test_a_column_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns \['x'\] stand in it more than once"):
        take_inventory(str(tmp_path))


def test_a_key_inside_the_files_too_counts_as_in_the_path(tmp_path: Path) -> None:
    write(
        tmp_path / "d=2013-01-02/m=01/a.parquet", d=[date(2013, 1, 2)] * 2, m=pa.array([1, None], pa.int8()), x=[1, 2]
    )
    inventory = take_inventory(str(tmp_path))
    assert inventory.schema == pa.schema({"x": pa.int64(), "d": pa.string(), "m": pa.string()})


@pytest.mark.parametrize("value", [2, 1.5, "x", True, date(2013, 1, 1)])
def test_a_key_that_the_file_contradicts_is_refused(tmp_path: Path, value) -> None:
    write(tmp_path / "k=1/a.parquet", k=[value], x=[1])
    with pytest.raises(DataError, match=r"the path says k='1' and column 'k' inside holds"):
        take_inventory(str(tmp_path))


def test_notes_and_nullability_do_not_make_another_schema(tmp_path: Path) -> None:
    plain = pa.table({"x": [1]})
    noted = plain.cast(pa.schema([pa.field("x", pa.int64(), nullable=False)])).replace_schema_metadata({"pandas": "{}"})
    pq.write_table(plain, tmp_path / "a.parquet")
    pq.write_table(noted, tmp_path / "b.parquet")
    assert len(take_inventory(str(tmp_path)).schemas) == 1


def test_a_file_that_changes_or_goes_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1])
    inventory = take_inventory(str(tmp_path))
    inventory.check_unchanged(0)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputChanged, match=r"a\.parquet changed while it was in use"):
        inventory.check_unchanged(0)
    path.unlink()
    with pytest.raises(InputChanged, match=r"a\.parquet was in the input .* gone"):
        inventory.check_unchanged(0)


def test_overlap_names_the_files_of_both(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=[1])
    write(tmp_path / "b.parquet", x=[1])
    whole, part = take_inventory(str(tmp_path)), take_inventory(str(tmp_path / "b.parquet"))
    assert part.overlap(whole) == whole.overlap(part) == [str(tmp_path / "b.parquet")]


@pytest.mark.skipif(not (FLIGHTS / "flights13").exists(), reason="../shared/data is not here")
def test_flights() -> None:
    inventory = take_inventory(str(FLIGHTS / "flights13"))
    assert inventory.n_rows == 336_776
    by_month = {inventory.key_values(i)["month"].as_py(): e.n_rows for i, e in enumerate(inventory.files)}
    rows = [27004, 24951, 28834, 28330, 28796, 28243, 29425, 29327, 27574, 28889, 27268, 28135]
    assert [by_month[month] for month in range(1, 13)] == rows
    assert len(inventory.schema) == 19
    with pytest.raises(DataError, match="different types") as caught:
        take_inventory([str(FLIGHTS / "flights13"), str(FLIGHTS / "flights17")])
    assert len(caught.value.problems) == 12
    assert all("column 'time_hour'" in problem for problem in caught.value.problems)
    assert all("flights17" in problem.partition(":")[0] for problem in caught.value.problems)
