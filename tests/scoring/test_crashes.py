"""A crash at every single change of the output, then a rerun: the right rows, once; no reader ever saw a part."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import claydist.storage
from claydist.alive import Renewed
from claydist.errors import ClaydistError, StorageError
from claydist.scoring import publish, swap
from claydist.scoring.readers import read_scores
from claydist.storage import open_store
from tests.scoring.support import (
    Loop,
    expected,
    make_predictor,
    make_registry,
    make_spec,
    run_score,
    statuses,
    write_days,
)

pytestmark = pytest.mark.slow


class Crash(BaseException):
    """The process ends here; nothing of ours catches it."""


class Bomb:
    """Counts changes of the output and crashes at one of them, before or after it is made."""

    def __init__(self) -> None:
        self.n = 0
        self.at: int | None = None
        self.after = False
        self.look: Callable[[], None] = lambda: None

    def wrap(self, change: Callable[..., Any], where: Callable[..., bool]) -> Callable[..., Any]:
        def armed(*args: Any, **kwargs: Any) -> Any:
            if not where(*args):
                return change(*args, **kwargs)
            self.n += 1
            if self.n == self.at and not self.after:
                raise Crash
            result = change(*args, **kwargs)
            if self.at is None or self.n >= self.at - 1:
                self.look()
            if self.n == self.at:
                raise Crash
            return result

        return armed


@pytest.fixture
def bomb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bomb]:
    """Every way in which scoring changes a local output goes through the bomb."""
    armed = Bomb()

    def is_output(*args: Any) -> bool:
        return any("/out" in str(arg) or "/.out" in str(arg) for arg in args if isinstance(arg, (str, Path)))

    for module, name in (
        (claydist.storage, "replace_local"), (claydist.storage, "create_local"), (swap.os, "link"), (os, "rename"),
        (swap, "_exchange"), (os, "unlink"), (shutil, "rmtree"), (os, "mkdir"), (os, "rmdir"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, armed.wrap(getattr(module, name), is_output))
    monkeypatch.setattr(publish, "GRACE_S", 0.0)
    # A crash ends the lease's owner; here its process lives on, and only the lease's end tells.
    leave = Renewed.__exit__

    def exit_(self: Renewed, kind: Any = None, *rest: Any) -> None:
        self._stop.set()
        self._thread.join()
        if kind is Crash:
            Path(self.place.path).unlink(missing_ok=True)
        else:
            leave(self, kind, *rest)

    monkeypatch.setattr(Renewed, "__exit__", exit_)
    yield armed
    armed.at = None


def read_by_glob(output: Path) -> pa.Table:
    """What a reader that globs sees, hidden folders included as DuckDB does."""
    found = []
    for folder, _, files in os.walk(output):
        found += [f"{folder}/{name}" for name in files if name.endswith(".parquet")]
    tables = [pq.read_table(path, partitioning=None) for path in sorted(found)]
    return pa.concat_tables(tables) if tables else pa.table({})


def is_whole(table: pa.Table, versions: list[pa.Table]) -> bool:
    """True when each day's rows are those of one of the versions (an empty one included), whole."""
    ids = table.column("id").to_pylist() if table.num_rows else []
    assert len(ids) == len(set(ids)), "a row twice"
    for day in range(3):
        of_day = [i for i in range(table.num_rows) if ids[i] // 1_000_000 == day]
        rows = table.take(pa.array(of_day, pa.int64())).select(versions[0].column_names) if of_day else None
        wanted = [v.filter(pa.array([i // 1_000_000 == day for i in v.column("id").to_pylist()])) for v in versions]
        if rows is not None and not any(rows.equals(w) for w in wanted):
            return False
    return True


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replace"])
def test_a_crash_at_every_change_of_a_local_output_leaves_old_or_new(
    tmp_path: Path, bomb: Bomb, replacing: bool, after: bool
) -> None:
    old, new = make_predictor(), make_predictor(seed=1)
    days = write_days(tmp_path / "in", n_days=2, n_rows=20, row_group_size=10)
    registry = make_registry(tmp_path / "registry", old)
    bomb.after = after
    versions = [expected(old, days).drop_columns("dt")]
    if replacing:
        run_score(make_spec(tmp_path), registry)
        shutil.copytree(tmp_path / "out", tmp_path / "saved")
        make_registry(tmp_path / "registry", new)
        versions.append(expected(new, days).drop_columns("dt"))
    spec, n = make_spec(tmp_path), 0
    while True:
        n += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.publishing", ignore_errors=True)
        if replacing:
            shutil.copytree(tmp_path / "saved", tmp_path / "out")
        bomb.n, bomb.at = 0, n
        bomb.look = lambda: _look(tmp_path / "out", versions)
        with suppress(Crash):
            run_score(spec, registry, replace=replacing)
        n_changes, bomb.at, bomb.look = bomb.n, None, lambda: None
        _look(tmp_path / "out", versions)
        work = Loop()
        again = run_score(spec, registry, work=work, replace_stale=True)
        assert set(statuses(again).values()) <= {"published", "already"}, (n, again.summary)
        assert read_scores(str(tmp_path / "out")).drop_columns("dt").equals(versions[-1]), n
        assert read_by_glob(tmp_path / "out").sort_by("id").equals(versions[-1].sort_by("id")), n
        if n_changes < n:
            break
    assert n > (30 if replacing else 20), "the bomb counts the changes"


def _look(output: Path, versions: list[pa.Table]) -> None:
    """Both kinds of readers see whole dates."""
    assert is_whole(read_by_glob(output), versions)
    if output.exists():
        with suppress(ClaydistError):
            assert is_whole(read_scores(str(output)), versions)
        plain = ds.dataset(output, format="parquet", partitioning=None).to_table()
        assert is_whole(plain, versions)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Bomb]]:
    """An output in memory, which behaves as an object store; every change of it goes through the bomb."""
    url, armed = f"memory://{uuid.uuid4().hex}", Bomb()

    def is_output(_: Any, path: str, *__: Any) -> bool:
        return "/out" in path

    for name in ("pipe_file", "cp_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, armed.wrap(getattr(MemoryFileSystem, name), is_output))
    leave = Renewed.__exit__

    def exit_(self: Renewed, kind: Any = None, *rest: Any) -> None:
        if kind is not Crash:
            leave(self, kind, *rest)
            return
        self._stop.set()
        self._thread.join()
        with suppress(StorageError):
            self.place.remove()

    monkeypatch.setattr(Renewed, "__exit__", exit_)
    yield url, armed
    armed.at = None
    open_store(url).remove(recursive=True)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replace"])
def test_a_crash_at_every_change_of_a_remote_output_leaves_old_or_new(
    tmp_path: Path, remote: tuple[str, Bomb], replacing: bool, after: bool
) -> None:
    url, bomb = remote
    old, new = make_predictor(), make_predictor(seed=1)
    days = write_days(tmp_path / "in", n_days=2, n_rows=20, row_group_size=10)
    registry = make_registry(tmp_path / "registry", old)
    bomb.after = after
    versions = [expected(old, days).drop_columns("dt")]
    if replacing:
        make_registry(tmp_path / "registry", new)
        versions.append(expected(new, days).drop_columns("dt"))
    n = 0
    while True:
        n += 1
        output = f"{url}/out{n}"
        spec = make_spec(tmp_path, output=output)
        if replacing:
            run_score(make_spec(tmp_path, output=output, model="late:1"), registry)

        def look(output: str = output) -> None:
            with suppress(ClaydistError):
                assert is_whole(read_scores(output), versions)

        bomb.n, bomb.at, bomb.look = 0, n, look
        with suppress(Crash):
            run_score(spec, registry, replace=replacing)
        n_changes, bomb.at, bomb.look = bomb.n, None, lambda: None
        look()
        again = run_score(spec, registry, replace_stale=True)
        assert set(statuses(again).values()) <= {"published", "already"}, (n, again.summary)
        assert read_scores(output).drop_columns("dt").equals(versions[-1]), n
        listed = [f.path for f in open_store(output).files() if f.path.endswith(".parquet")]
        assert len(listed) == 2, "a glob finds the files of the manifests and no others"
        if n_changes < n:
            break
    assert n > 15, "the bomb counts the changes"
