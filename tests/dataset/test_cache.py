from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from claydist.dataset import cache as cache_module
from claydist.dataset.cache import ChunkCache
from claydist.dataset.footers import Inventory, take_inventory
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import plan_shards
from claydist.errors import InputChanged, StorageError
from claydist.storage import Store, open_store
from tests.stores import s3_options, store  # noqa: F401  fixtures


def put(url: str, options: dict, n_rows: int = 1000) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table(
        {"i": range(n_rows), "s": [f"s{i % 50}" for i in range(n_rows)], "y": [i / 7 for i in range(n_rows)]}
    )
    pq.write_table(table, sink, row_group_size=300)
    open_store(url, options).write(sink.getvalue().to_pybytes())


def read(inventory: Inventory, columns: list[str], cache_dir: Path | None, n_workers: int = 1) -> list[dict]:
    shards = plan_shards([entry.row_groups for entry in inventory.files], n_workers)
    return [
        row
        for pieces in shards
        for table in read_pieces(inventory, pieces, columns, cache_dir=cache_dir, batch_rows=128)
        for row in table.to_pylist()
    ]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that were fetched."""
    found: list[tuple[int, int]] = []
    load = ChunkCache._load

    def counting(self: ChunkCache, spans: list[tuple[int, int]]) -> list[bytes]:
        found.extend(spans)
        return load(self, spans)

    monkeypatch.setattr(ChunkCache, "_load", counting)
    return found


@pytest.mark.parametrize("store", ["memory", "s3"], indirect=True)
def test_later_passes_fetch_nothing_and_read_the_same(store, loads, tmp_path) -> None:  # noqa: F811
    options = store.fs.storage_options
    put(f"{store.url}/a.parquet", options)
    inventory = take_inventory(store.url, options=options)
    plain = read(inventory, ["i", "s"], None)
    assert not loads
    assert read(inventory, ["i", "s"], tmp_path / "cache", 3) == plain
    first = list(loads)
    assert len(first) == len(set(first))
    assert read(inventory, ["s", "i"], tmp_path / "cache") == plain
    assert loads == first
    more = read(inventory, ["y"], tmp_path / "cache")
    assert len(more) == 1000
    assert len(loads) == len(first) + 4  # one chunk of y in each row group; footer and the rest are here
    chunks = [span for span in loads if span != (0, inventory.files[0].size)]
    assert len(chunks) == 12, "each chunk alone, beside the footer of a file that fits into one read"


def test_a_new_version_is_another_name(loads, tmp_path) -> None:
    put("memory://cached/a.parquet", {})
    old = take_inventory("memory://cached")
    read(old, ["i"], tmp_path)
    put("memory://cached/a.parquet", {}, 600)
    with pytest.raises(InputChanged):
        read(old, ["i"], tmp_path)
    assert len(read(take_inventory("memory://cached"), ["i"], tmp_path)) == 600


def test_what_does_not_fit_on_the_disk_is_fetched_again(loads, tmp_path, monkeypatch) -> None:
    put("memory://full/a.parquet", {})
    inventory = take_inventory("memory://full")
    monkeypatch.setattr(cache_module, "KEEP_FREE_BYTES", shutil.disk_usage(tmp_path).total)
    assert read(inventory, ["i"], tmp_path) == read(inventory, ["i"], None)
    first = len(loads)
    read(inventory, ["i"], tmp_path)
    assert len(loads) == 2 * first
    assert list(tmp_path.iterdir()) == []


def test_local_files_are_not_copied(tmp_path) -> None:
    put(str(tmp_path / "data/a.parquet"), {})
    read(take_inventory(str(tmp_path / "data")), ["i"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_failed_fetch_names_the_file_and_no_secret(monkeypatch, tmp_path) -> None:
    place = open_store("memory://broken/a.parquet", {"secret": "hunter2hunter2"})
    put("memory://broken/a.parquet", {})

    def fail(*args, **kwargs):
        raise RuntimeError("denied for hunter2hunter2")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_ranges", fail)
    with pytest.raises(StorageError, match=r"cannot read memory://broken/a\.parquet: denied for \*\*\*"):
        ChunkCache(place, tmp_path, 10, "1").read((0, 10))


def test_places_that_are_shown_alike_are_cached_apart(tmp_path) -> None:
    put("memory://alike/a.parquet", {})
    place = open_store("memory://alike/a.parquet")
    other = Store(place.url, place.fs, "/elsewhere/a.parquet")
    place.fs.pipe_file(other.path, b"other")
    stored = Store(place.url, open_store("memory://alike", {"token": "hunter2"}).fs, place.path)
    assert ChunkCache(place, tmp_path, 4, "1").read((0, 4)) == b"PAR1"
    assert ChunkCache(other, tmp_path, 4, "1").read((0, 4)) == b"othe"
    assert ChunkCache(stored, tmp_path, 4, "1").read((0, 4)) == b"PAR1"
    assert len(list(tmp_path.iterdir())) == 3


def test_nobody_else_may_read_the_copy(tmp_path: Path) -> None:
    file = open_store("memory://cache-mode/a")
    file.write(b"0123456789")
    ChunkCache(file, tmp_path / "copy", 10, "one").fetch([(0, 4)])
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o700
