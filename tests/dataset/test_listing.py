from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

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


class Containers(MemoryFileSystem):
    """Azure's rules for a URL, over fsspec's memory: the container stands before the @, the account after it."""

    protocol = ("abfss",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, account: str = "", **options: Any) -> None:
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        if match := re.fullmatch(r"abfss://([^@/]+)@[^/]+(.*)", path):
            path = f"/{match[1]}{match[2]}"
        return super()._strip_protocol(path)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        match = re.match(r"abfss://[^@/]+@([^/]+)", path)
        return {"account": match[1]} if match else {}


@pytest.fixture
def containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme whose container stands before the @, with the file a.parquet in each of two containers."""
    monkeypatch.setitem(_registry, "abfss", Containers)
    monkeypatch.setattr(Containers, "store", {})
    for year in ("y2023", "y2024"):
        open_store(f"abfss://{year}@acct/t/a.parquet").write(year.encode())


@pytest.mark.usefixtures("containers")
def test_containers_with_equal_file_names_are_both_read() -> None:
    found = find_files(["abfss://y2023@acct/t", "abfss://y2024@acct/t", "abfss://y2023@acct/t/a.parquet"])
    assert [(f.path, f.store.read()) for f in found] == [
        ("y2023/t/a.parquet", b"y2023"),
        ("y2024/t/a.parquet", b"y2024"),
    ]
    one, two = ([f.store] for f in found)
    assert shared_files(one, two) == []
    assert shared_files(one, one) == ["abfss://y2023@acct/t/a.parquet"]
    elsewhere = find_files(["abfss://y2023@acct/t", "abfss://y2023@other/t"])
    assert [f.path for f in elsewhere] == ["abfss://y2023@acct/t/a.parquet", "abfss://y2023@other/t/a.parquet"]


@pytest.fixture
def exports() -> Iterator[str]:
    """URL of a web server whose answer is the query."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = self.path.partition("?")[2].encode()
            self.send_response(200 if query else 404)
            self.send_header("Content-Length", str(len(query)))
            self.end_headers()
            self.wfile.write(query)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/export"
        server.shutdown()


def test_queries_tell_files_apart_and_are_not_shown(exports: str) -> None:
    pytest.importorskip("aiohttp")
    found = find_files([f"{exports}?id=1", f"{exports}?id=2", f"{exports}?id=1"])
    assert [f.store.read() for f in found] == [b"id=1", b"id=2"]
    assert shared_files([found[0].store], [found[1].store]) == []
    assert {(f.path, f.store.url) for f in found} == {("export?***", f"{exports}?***")}
    assert [f.path for f in find_files([f"{exports}?sig=a/b"])] == ["export?***"]


def test_what_is_not_found_is_named_without_its_secrets() -> None:
    with pytest.raises(DataError, match=r"expected Parquet at 'memory://\*\*\*@h/nope', found no such") as caught:
        find_files(["memory://me:hunter2@h/nope"])
    assert "hunter2" not in str(caught.value)
