from __future__ import annotations

from pathlib import Path

import pytest

from claydist.dataset.listing import HIVE_NULL, find_files, shared_files
from claydist.errors import DataError
from claydist.storage import Store, open_store
from tests.stores import s3_options, store  # noqa: F401  fixtures


def put(root: Path, *paths: str, data: bytes = b"x") -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def paths(*urls: Path | str) -> list[str]:
    return [f.path for f in find_files([str(url) for url in urls])]


def test_a_directory_is_read_at_every_depth_but_for_names_that_are_not_data(store: Store) -> None:  # noqa: F811
    for path in ("b.parquet", "m=1/a.parquet", "m=1/_SUCCESS", "_tmp/c.parquet", ".x/d.parquet", "m=1/.b.crc"):
        store.join(*path.split("/")).write(b"x")
    store.join("empty.parquet").write(b"")
    found = find_files([store.url], store.fs.storage_options)
    assert [f.path for f in found] == ["b.parquet", "m=1/a.parquet"]
    assert [f.store.read() for f in found] == [b"x", b"x"]
    assert [(f.size, f.stamp) for f in found] == [(f.store.info().size, f.store.info().stamp) for f in found]
    assert [f.path for f in find_files([f"{store.url}/m=*/*.parquet"], store.fs.storage_options)] == ["m=1/a.parquet"]
    assert [f.path for f in find_files([f"{store.url}/b.parquet"], store.fs.storage_options)] == ["b.parquet"]


def test_the_same_files_have_the_same_paths_however_they_are_given(tmp_path: Path) -> None:
    put(tmp_path, "m=1/a.parquet", "m=2/a.parquet")
    expected = ["m=1/a.parquet", "m=2/a.parquet"]
    assert paths(tmp_path) == expected
    assert paths(tmp_path / "m=*") == expected
    assert paths(tmp_path / "m=*/*.parquet") == expected
    assert paths(tmp_path / "m=2", tmp_path / "m=1") == expected
    assert paths(tmp_path / "m=2/a.parquet", tmp_path / "m=1/a.parquet") == expected


def test_a_path_given_twice_counts_once(tmp_path: Path) -> None:
    put(tmp_path, "a.parquet", "b.parquet")
    assert paths(tmp_path, f"{tmp_path}/", tmp_path / "a.parquet", tmp_path / "*.parquet") == ["a.parquet", "b.parquet"]


def test_a_literal_name_may_look_like_a_glob(tmp_path: Path) -> None:
    put(tmp_path, "a[1].parquet", "a1.parquet")
    assert paths(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_hive_keys_are_decoded_below_and_at_the_end_of_the_root(tmp_path: Path) -> None:
    put(tmp_path, f"x=9/t/y=2013/m=01/c={HIVE_NULL}/d=a%2Fb%20c/k=v.parquet")
    expected = (("y", "2013"), ("m", "01"), ("c", None), ("d", "a/b c"))
    for root in ("x=9/t", "x=9/t/y=2013", "x=9/t/y=2013/m=01", "x=9/t/y=*/m=*"):
        assert [f.keys for f in find_files([str(tmp_path / root)])] == [expected]
    put(tmp_path, "u/m=1/m=2/a.parquet")
    with pytest.raises(DataError, match=r"\['m'\] more than once"):
        find_files([str(tmp_path / "u")])


@pytest.mark.parametrize("root", ["t", "t/m=1", "t/*/*.parquet"])
def test_a_delta_table_is_refused(tmp_path: Path, root: str) -> None:
    put(tmp_path, "t/_delta_log/0.json", "t/m=1/a.parquet")
    with pytest.raises(DataError, match=r"table of Delta's.*plain Parquet"):
        paths(tmp_path / root)


@pytest.mark.parametrize("root", ["", "t", "t/data", "t/data/m=1", "t/data/*/*.parquet"])
def test_an_iceberg_table_is_refused(tmp_path: Path, root: str) -> None:
    put(tmp_path, "t/metadata/v1.metadata.json", "t/data/m=1/a.parquet")
    with pytest.raises(DataError, match="table of Iceberg's"):
        paths(tmp_path / root)


def test_a_folder_called_metadata_is_not_yet_a_table(tmp_path: Path) -> None:
    put(tmp_path, "metadata/a.parquet")
    assert paths(tmp_path) == ["metadata/a.parquet"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope", "no such file or directory"),
        ("e", "found only 2 files that are empty, hidden"),
        ("*.csv", "found no file"),
        ("e/zero.parquet", "found an empty file"),
    ],
)
def test_no_data_is_an_error_that_says_what_is_there(tmp_path: Path, url: str, message: str) -> None:
    put(tmp_path, "e/zero.parquet", data=b"")
    put(tmp_path, "e/_SUCCESS")
    with pytest.raises(DataError, match=message):
        paths(tmp_path / url)


def test_shared_files_follows_links(tmp_path: Path) -> None:
    put(tmp_path, "a/1.parquet", "a/2.parquet")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    a, b = (find_files([str(tmp_path / name)]) for name in "ab")
    assert shared_files([f.store for f in a[:1]], [f.store for f in b]) == [open_store(tmp_path / "a/1.parquet").url]
    assert shared_files([a[0].store], [b[1].store]) == []
