from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from claydist import files
from claydist.errors import Absent, AlreadyExists, StorageError
from claydist.storage import FileInfo, Store, open_store, redact, sha256, split_glob
from tests.stores import s3_options, store

__all__ = ["s3_options", "store"]


def paths(found: list[FileInfo]) -> list[str]:
    return [f.path for f in found]


class TestEverywhere:
    def test_write_then_read(self, store: Store) -> None:
        place = store.join("a", "b c.json")
        assert not place.exists()
        place.write(b'{"x": [1, null]}')
        assert place.read() == b'{"x": [1, null]}'
        assert place.read_json() == {"x": [1, None]}
        assert place.exists()
        assert not place.is_dir()
        assert store.join("a").is_dir()
        assert place.name == "b c.json"
        assert place.sha256() == sha256(place.read()) == hashlib.sha256(b'{"x": [1, null]}').hexdigest()

    def test_write_replaces_and_the_stamp_changes(self, store: Store) -> None:
        place = store.join("x")
        place.write(b"old")
        before = place.info()
        place.write(b"new one")
        after = place.info()
        assert place.read() == b"new one"
        assert (before.path, before.size, after.size) == ("x", 3, 7)
        assert before.stamp != after.stamp
        assert store.files() == [after]

    def test_listings_are_fresh_and_show_no_temporary_files(self, store: Store) -> None:
        assert store.list() == store.files() == []
        store.join("b").write(b"1")
        assert store.list() == ["b"]
        store.join("a/deep/er").write(b"22")
        store.join("a-").write(b"")
        assert store.list() == ["a", "a-", "b"]
        assert [(f.path, f.size) for f in store.files()] == [("a-", 0), ("a/deep/er", 2), ("b", 1)]
        assert store.join("a").list() == ["deep"]
        assert store.join("b").list() == store.join("b").files() == []
        assert store.join("absent").list() == store.join("absent").files() == []
        store.join("b").remove()
        assert store.list() == ["a", "a-"]

    def test_create_finds_the_name_taken(self, store: Store) -> None:
        place = store.join("versions/1/reserved.json")
        place.create(b"first")
        with pytest.raises(AlreadyExists, match="somebody else was first"):
            place.create(b"second")
        assert place.read() == b"first"
        assert store.files()[0].path == "versions/1/reserved.json"
        assert len(store.files()) == 1

    def test_one_of_many_threads_creates(self, store: Store) -> None:
        n_threads, n_names = 8, 5
        start = threading.Barrier(n_threads)

        def creates(who: int) -> list[int]:
            won = []
            for name in range(n_names):
                start.wait()
                try:
                    store.join(str(name)).create(f"{who}".encode() * 1000)
                    won.append(name)
                except AlreadyExists:
                    pass
            return won

        with ThreadPoolExecutor(n_threads) as pool:
            wins = list(pool.map(creates, range(n_threads)))
        assert sorted(name for won in wins for name in won) == list(range(n_names))
        for who, won in enumerate(wins):
            assert all(store.join(str(name)).read() == f"{who}".encode() * 1000 for name in won)

    def test_readers_see_old_or_new(self, store: Store) -> None:
        place = store.join("x")
        values = [bytes([n]) * 50_000 for n in range(4)]
        place.write(values[0])
        done = threading.Event()

        def writes() -> None:
            for _ in range(5):
                for value in values:
                    place.write(value)
            done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(writes)
            seen = {place.read()}
            while not done.is_set():
                seen.add(place.read())
            writing.result()
        assert seen <= set(values)

    def test_open_reads_at_any_position_and_twice_at_once(self, store: Store) -> None:
        place = store.join("x")
        place.write(b"0123456789")
        with place.open() as one, place.open() as other:
            one.seek(4)
            assert other.read(2) == b"01"
            assert one.read(2) == b"45"
            assert other.read() == b"23456789"

    def test_arrow_reads_what_was_written(self, store: Store) -> None:
        table = pa.table({"x": [1, 2, None], "y": ["a", None, "c"]})
        place = store.join("t/x.parquet")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        place.write(sink.getvalue().to_pybytes())
        filesystem, path = place.arrow()
        assert pq.read_table(path, filesystem=filesystem).equals(table)
        with place.open() as file:
            assert pq.ParquetFile(file).metadata.num_rows == 3

    def test_glob(self, store: Store) -> None:
        for path in ("dt=1/a.parquet", "dt=1/b.csv", "dt=2/sub/a.parquet", "dt=10/a.parquet", "top.parquet"):
            store.join(path).write(b"x")
        assert paths(store.glob("*.parquet")) == ["top.parquet"]
        assert paths(store.glob("dt=?/*.parquet")) == ["dt=1/a.parquet"]
        assert paths(store.glob("dt=[12]")) == ["dt=1/a.parquet", "dt=1/b.csv", "dt=2/sub/a.parquet"]
        assert paths(store.glob("**/*.parquet")) == [
            "dt=1/a.parquet",
            "dt=10/a.parquet",
            "dt=2/sub/a.parquet",
            "top.parquet",
        ]
        assert store.glob("nothing*") == []
        with pytest.raises(StorageError, match="expected a pattern"):
            store.glob("a**b")

    def test_remove(self, store: Store) -> None:
        store.join("d/x").write(b"1")
        store.join("d/y/z").write(b"1")
        with pytest.raises(StorageError, match="directory"):
            store.join("d").remove()
        store.join("d/x").remove()
        assert paths(store.files()) == ["d/y/z"]
        store.join("d").remove(recursive=True)
        assert not store.join("d").exists()
        with pytest.raises(StorageError, match="cannot remove"):
            store.join("d").remove()

    def test_rename_file_and_directory(self, store: Store) -> None:
        store.join("d/x").write(b"1")
        store.join("d/y/z").write(b"22")
        store.join("d").rename(store.join("e/f"))
        assert [(f.path, f.size) for f in store.files()] == [("e/f/x", 1), ("e/f/y/z", 2)]
        store.join("e/f/x").rename(store.join("e/f/y/z"))
        assert [(f.path, f.size) for f in store.files()] == [("e/f/y/z", 1)]
        store.join("other/x").write(b"3")
        with pytest.raises(AlreadyExists, match="something in it"):
            store.join("other").rename(store.join("e"))
        with pytest.raises(StorageError, match="cannot move"):
            store.join("absent").rename(store.join("e"))

    def test_what_is_absent_or_no_file_is_said_with_the_url(self, store: Store) -> None:
        store.join("d/x").write(b"not json")
        for act in ("read", "info", "open", "sha256"):
            with pytest.raises(Absent, match=r"cannot read .*/absent"):
                getattr(store.join("absent"), act)()
        with pytest.raises(StorageError, match="directory"):
            store.join("d").info()
        with pytest.raises(StorageError, match=r"expected JSON in .*d/x"):
            store.join("d/x").read_json()

    @pytest.mark.parametrize("part", ["", ".", "..", "/etc", "a/../b", "a//b", "a/", "a\0b"])
    def test_join_stays_below(self, store: Store, part: str) -> None:
        with pytest.raises(StorageError, match="expected a name below"):
            store.join("a", part)

    def test_a_pickled_store_works(self, store: Store) -> None:
        store.join("x").write(b"1")
        again = pickle.loads(pickle.dumps(store))
        assert again == store
        assert again.join("x").read() == b"1"

    def test_odd_names(self, store: Store) -> None:
        names = ["[a]*", "a b", "na\u00efve \u6f22", "x#y", "x?y", "%41", "k=v"]
        for name in names:
            store.join(name, "f").create(name.encode())
        assert store.list() == sorted(names)
        assert {store.join(f.path).read().decode() + "/f" for f in store.files()} == set(paths(store.files()))
        assert paths(store.join("[a]*").glob("*")) == ["f"]


def creates_in_child(store: Store, queue) -> None:  # type: ignore[no-untyped-def]
    try:
        store.join("once").create(str(os.getpid()).encode())
        queue.put(True)
    except AlreadyExists:
        queue.put(False)


class TestOtherProcesses:
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    @pytest.mark.parametrize("place", ["local", "s3"])
    def test_one_of_several_forked_processes_creates(
        self, place: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        here = open_store(tmp_path)
        if place == "s3":
            here = open_store(f"s3://claydist/{tmp_path.name}", request.getfixturevalue("s3_options"))
        here.join("x").write(b"")  # the filesystem has been used before the fork
        context = get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=creates_in_child, args=(here, queue)) for _ in range(4)]
        for child in children:
            child.start()
        won = [queue.get(timeout=30) for _ in children]
        for child in children:
            child.join(30)
        assert sorted(won) == [False, False, False, True]
        assert int(here.join("once").read()) in {child.pid for child in children}

    def test_a_killed_writer_leaves_the_old_file_and_nothing_in_listings(self, tmp_path: Path) -> None:
        place = open_store(tmp_path / "x")
        place.write(b"old")
        script = (
            "import os, sys; from claydist.storage import open_store\n"
            "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
            "getattr(open_store(sys.argv[1]), sys.argv[2])(b'new' * 1000)\n"
        )
        for act in ("write", "create"):
            run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x"), act], check=False)
            assert run.returncode == -9
        assert place.read() == b"old"
        assert open_store(tmp_path).list() == ["x"]
        assert paths(open_store(tmp_path).files()) == ["x"]
        assert len(list(tmp_path.iterdir())) == 3


class TestLocal:
    def test_relative_and_file_urls_are_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert open_store("a/../b").url == str(tmp_path / "b")
        assert open_store(f"file://{tmp_path}/b/") == open_store("b")
        assert open_store("b").is_local
        assert open_store("/").join("etc").path == "/etc"

    def test_create_without_hard_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_link(*_: str) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", no_link)
        place = open_store(tmp_path / "x")
        place.create(b"1")
        with pytest.raises(AlreadyExists):
            place.create(b"2")
        assert place.read() == b"1"
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    def test_a_link_made_whose_answer_was_lost_is_ours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        link = os.link

        def twice(source: str, target: str) -> None:
            link(source, target)
            link(source, target)

        monkeypatch.setattr(files.os, "link", twice)
        open_store(tmp_path / "x").create(b"1")
        assert (tmp_path / "x").read_bytes() == b"1"

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        for act in ("write", "create"):
            with pytest.raises(StorageError, match=rf"cannot {act} .*/x: No space left on device; free some space"):
                getattr(open_store(tmp_path / "x"), act)(b"1")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_where_a_directory_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for act in ("write", "create"):
            with pytest.raises(StorageError) as caught:
                getattr(open_store(tmp_path / "file" / "x"), act)(b"1")
            assert caught.type is StorageError

    def test_below_a_file_nothing_is_there_to_read(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(Absent, match=r"cannot read .*/file/x"):
            open_store(tmp_path / "file" / "x").read()

    def test_links_are_followed_once_and_broken_ones_are_said(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "x").write_bytes(b"1")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "alias").symlink_to(tmp_path / "real")
        assert paths(open_store(tmp_path).files()) == ["alias/x", "real/x"]
        open_store(tmp_path / "alias").remove()
        assert paths(open_store(tmp_path).files()) == ["real/x"]
        (tmp_path / "gone").symlink_to(tmp_path / "nothing")
        with pytest.raises(StorageError, match=r"gone, found a link to nothing"):
            open_store(tmp_path).files()

    def test_moving_to_another_filesystem_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="another filesystem"):
            open_store(tmp_path / "x").rename(open_store("memory://x"))

    def test_a_mistake_of_ours_is_no_storage_error(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError):
            open_store(tmp_path / "x").write("text")  # type: ignore[arg-type]


class TestS3:
    def test_another_s3_that_does_not_name_the_condition(
        self, s3_options: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_store("s3://claydist/unnamed/x", s3_options)
        place.create(b"1")
        monkeypatch.setattr("s3fs.errors.ERROR_CODE_TO_EXCEPTION", {})
        monkeypatch.setattr("moto.s3.exceptions.PreconditionFailed.__init__", _without_condition)
        with pytest.raises(AlreadyExists):
            place.create(b"2")

    def test_a_put_whose_answer_was_lost_is_ours(
        self, s3_options: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_store("s3://claydist/lost/x", s3_options)
        pipe, calls = place.fs.pipe_file, []

        def twice(*args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(pipe(*args, **kwargs))
            return pipe(*args, **kwargs)

        monkeypatch.setattr(place.fs, "pipe_file", twice)
        place.create(b"1")
        assert (place.read(), len(calls)) == (b"1", 1)

    def test_a_conflict_is_tried_again(self, s3_options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        from botocore.exceptions import ClientError

        place = open_store("s3://claydist/conflict/x", s3_options)
        pipe, calls = place.fs.pipe_file, []

        def busy(*args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(1)
            if len(calls) < 3:
                cause = ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
                raise OSError(errno.EIO, "conflict") from cause
            return pipe(*args, **kwargs)

        monkeypatch.setattr(place.fs, "pipe_file", busy)
        place.create(b"1")
        assert (place.read(), len(calls)) == (b"1", 3)

    def test_an_absent_bucket(self, s3_options: dict[str, str]) -> None:
        place = open_store("s3://no-such-bucket/x", s3_options)
        for act in ("write", "create"):
            with pytest.raises(StorageError, match=rf"cannot {act} s3://no-such-bucket/x: .*bucket does not exist"):
                getattr(place, act)(b"1")

    def test_a_marker_of_a_folder_is_no_file(self, s3_options: dict[str, str]) -> None:
        place = open_store("s3://claydist/marked", s3_options)
        for key in ("marked/", "marked/sub/"):
            place.fs.call_s3("put_object", Bucket="claydist", Key=key, Body=b"")
        place.join("sub/x").write(b"1")
        assert paths(place.files()) == ["sub/x"]
        assert place.list() == ["sub"]
        assert place.join("sub").list() == ["x"]

    def test_ranges_are_not_read_ahead(self, s3_options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        place = open_store("s3://claydist/ranges/x", s3_options)
        place.write(bytes(1_000_000))
        with place.open() as file:
            fetch, ranges = file._fetch_range, []
            monkeypatch.setattr(file.cache, "fetcher", lambda *span: ranges.append(span) or fetch(*span))
            file.seek(-8, 2)
            assert file.read(8) == bytes(8)
        assert ranges == [(999_992, 1_000_000)]

    def test_an_endpoint_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        no_retries = {"config_kwargs": {"retries": {"max_attempts": 0}}}
        place = open_store("s3://claydist/x", {"endpoint_url": "http://127.0.0.1:9", **no_retries})
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"cannot look at s3://claydist/x: .*127\.0\.0\.1:9"):
            place.exists()
        assert time.monotonic() - started < 20


def _without_condition(self, failed_condition: str) -> None:  # type: ignore[no-untyped-def]
    super(type(self), self).__init__("At least one of the pre-conditions you specified did not hold")


class TestIdentity:
    def test_it_tells_apart_what_the_url_does_not(self, store: Store) -> None:
        assert store.join("a").identity == store.join("a").identity != store.join("b").identity
        one, other = (open_store("memory://x", {"token": token}) for token in ("hunter2", "hunter3"))
        assert one.url == other.url
        assert one.path == other.path
        assert one.identity != other.identity
        assert "hunter2" not in str(one.identity)

    def test_it_is_the_same_in_every_thread_and_process(self, store: Store) -> None:
        with ThreadPoolExecutor(1) as pool:
            assert (
                pool.submit(lambda: open_store(store.url, store.fs.storage_options).identity).result() == store.identity
            )
        script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).identity)"
        told = subprocess.run(
            [sys.executable, "-c", script], input=pickle.dumps(store), capture_output=True, check=True
        )
        assert told.stdout.decode().strip() == str(store.identity)

    def test_links_are_followed_on_local_paths_only(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        assert open_store(tmp_path / "link/a").resolved() == open_store(tmp_path / "a")
        assert open_store("memory://link/a").resolved() == open_store("memory://link/a")


class TestSecrets:
    def test_repr_and_messages_hide_options(self, s3_options: dict[str, str]) -> None:
        place = open_store(
            "s3://claydist/x", {**s3_options, "key": "AKIDEXAMPLE", "secret": "wJalrXUtn", "config_kwargs": {}}
        )
        assert repr(place) == "Store(url='s3://claydist/x')"
        with pytest.raises(StorageError) as caught:
            place.read()
        for text in (repr(place), str(place), str(caught.value), repr(caught.value)):
            assert "AKIDEXAMPLE" not in text
            assert "wJalrXUtn" not in text

    def test_user_information_and_queries_of_urls(self) -> None:
        assert redact("cannot read sftp://me:pw@host/x") == "cannot read sftp://***@host/x"
        assert redact("sftp://me@host/x and sftp://me:p@w@host/x") == "sftp://***@host/x and sftp://***@host/x"
        assert redact("url='https://h/x?sig=abc&se=1'") == "url='https://h/x?***'"
        assert redact("HTTPS://h/x?sig=abc") == "HTTPS://h/x?***"
        assert redact("token abcd is wrong", {"client_kwargs": {"auth": {"value": "abcd"}}}) == "token *** is wrong"
        assert redact("s3://b/a?.parquet", {"anon": True, "endpoint_url": "s3://b"}) == "s3://b/a?.parquet"

    @pytest.mark.parametrize("scheme", ["abfs", "abfss", "wasb", "wasbs", "ABFSS"])
    def test_a_container_is_no_secret(self, scheme: str) -> None:
        assert redact(f"{scheme}://raw@acct.dfs.core.windows.net/t") == f"{scheme}://raw@acct.dfs.core.windows.net/t"
        assert redact(f"{scheme}://raw:pw@acct/t") == f"{scheme}://***@acct/t"

    def test_a_failing_filesystem_does_not_give_them_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = open_store("memory://x", {"token": "hidden-token"})

        def fails(*_: object, **__: object) -> bytes:
            raise RuntimeError("401 for hidden-token at https://u:hidden-pw@h/x?sig=hidden-sig")

        monkeypatch.setattr(type(place.fs), "cat_file", fails)
        with pytest.raises(
            StorageError, match=r"cannot read memory://x: 401 for \*\*\* at https://\*\*\*@h/x\?\*\*\*"
        ) as caught:
            place.read()
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "install"),
        [
            ("gs://b/x", "pip install gcsfs"),
            ("s3://b/x", "pip install s3fs"),
            ("az://c/x", "pip install adlfs"),
        ],
    )
    def test_a_missing_package_is_named(self, url: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = sys.modules["fsspec.registry"]._registry  # fsspec remembers the classes that it has imported
        for name in ("s3fs", "gcsfs", "adlfs"):
            monkeypatch.setitem(sys.modules, name, None)
        for scheme in ("s3", "gs", "az"):
            monkeypatch.delitem(loaded, scheme, raising=False)
        with pytest.raises(StorageError, match=install):
            open_store(url)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("", "expected a path or URL"),
            ("a\0b", "expected a path or URL"),
            ("nope://u:pw@x/y", r"cannot open nope://\*\*\*@x/y: .*found nope://"),
            ("simplecache::s3://b/x", "single URL"),
            ("zip://a::file://b.zip", "single URL"),
        ],
    )
    def test_what_cannot_be_opened(self, url: str, message: str) -> None:
        with pytest.raises(StorageError, match=message):
            open_store(url)

    def test_options_that_the_filesystem_refuses(self) -> None:
        with pytest.raises(StorageError, match="check storage_options"):
            open_store("s3://b/x", {"max_concurrency": 0})

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("/a/b", ("/a/b", None)),
            ("s3://b/a/*.parquet", ("s3://b/a", "*.parquet")),
            ("s3://b/dt=*/x?.parquet", ("s3://b", "dt=*/x?.parquet")),
            ("/*", ("/", "*")),
            ("*.parquet", (".", "*.parquet")),
            ("data/**/[ab].parquet", ("data", "**/[ab].parquet")),
        ],
    )
    def test_split_glob(self, url: str, expected: tuple[str, str | None]) -> None:
        assert split_glob(url) == expected
