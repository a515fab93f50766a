"""What follows a publication, and what is left by one that failed, step by step."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from claydist.alive import lease_end
from claydist.errors import DataError, Locked, StorageError
from claydist.scoring import publish, records, swap
from claydist.scoring.judge import evaluate_scores
from claydist.scoring.lock import Lease
from claydist.scoring.manifest import PROTOCOL, is_ours, read_manifest
from claydist.scoring.publish import look, settle
from claydist.scoring.readers import published_folders, read_scores
from claydist.storage import Store, open_store
from tests.scoring.support import (
    FIRST,
    Loop,
    Saying,
    expected,
    make_predictor,
    make_registry,
    make_spec,
    run_score,
    statuses,
    write_days,
)

FOLDER = f"dt={FIRST}"
DAY = FIRST.isoformat()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "GRACE_S", 0.0)


@pytest.fixture
def remote() -> Iterator[Store]:
    place = open_store(f"memory://{uuid.uuid4().hex}/out")
    yield place
    if place.exists():
        place.remove(recursive=True)


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "out")
    place: Store = request.getfixturevalue("remote")
    return place


def manifest(sequence: int, name: str) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "sequence": sequence, "published_by": name, "rows": 1, "quarantined": 0,
            "files": [{"name": part(name), "rows": 1}], "quarantine": [], "state": {}}  # fmt: skip


def part(name: str) -> str:
    return f"part-00000-00000000-20261121T000000-{name}-000000.parquet"


def copy(output: Store, name: str) -> None:
    output.join(FOLDER, part(name)).write(name.encode())


def put(output: Store, sequence: int, name: str) -> None:
    copy(output, name)
    assert records.create(output, FOLDER, manifest(sequence, name))
    assert records.finish(output, FOLDER) is None


def fail(monkeypatch: pytest.MonkeyPatch, method: str, is_meant: Callable[[Store], bool]) -> None:
    """Have a method of places of a kind fail, until `monkeypatch.undo`."""
    real = getattr(Store, method)

    def failing(self: Store, *args: Any) -> Any:
        if is_meant(self):
            raise StorageError(f"cannot {method} {self}: 503 SlowDown")
        return real(self, *args)

    monkeypatch.setattr(Store, method, failing)


# Records


def test_an_overtaken_number_cannot_be_taken_again(remote: Store) -> None:
    put(remote, 1, "a")
    put(remote, 2, "c")  # removes the record of a, so that its number is free again
    copy(remote, "b")
    assert not records.create(remote, FOLDER, manifest(1, "b"))
    current = look(remote, FOLDER)
    assert current.identity == (2, "c")
    assert remote.join("_commits", FOLDER).list() == ["000002.json"]
    assert set(remote.join(FOLDER).list()) == {"_manifest.json", part("b"), part("c")}


def test_a_late_finish_leaves_the_newest_manifest_and_every_file_of_others(remote: Store) -> None:
    copy(remote, "a")
    assert records.create(remote, FOLDER, manifest(1, "a"))
    copy(remote, "c")  # at work, without a record
    records.finish(remote, FOLDER)
    assert part("c") in remote.join(FOLDER).list()
    assert records.create(remote, FOLDER, manifest(2, "c"))
    records.finish(remote, FOLDER)
    records.finish(remote, FOLDER)  # a wakes
    assert remote.join(FOLDER, "_manifest.json").read_json()["published_by"] == "c"
    assert remote.join(FOLDER).list() == ["_manifest.json", part("c")]


def test_a_fence_repeats_what_is_published_and_takes_the_number_of_who_sleeps(remote: Store) -> None:
    put(remote, 1, "a")
    copy(remote, "sleeper")
    settle(remote, FOLDER)
    assert remote.join(FOLDER).list() == ["_manifest.json", part("a")]
    current = look(remote, FOLDER)
    assert (current.identity, current.is_settled) == ((2, "a"), True)
    assert not records.create(remote, FOLDER, manifest(2, "sleeper"))


@pytest.mark.parametrize("read", [read_manifest, lease_end, Lease._tree], ids=["manifest", "lease", "owner"])
def test_what_appears_just_after_it_was_looked_for_is_absent_and_no_error(
    remote: Store, monkeypatch: pytest.MonkeyPatch, read: Callable[[Store], Any]
) -> None:
    place, real = remote.join(FOLDER, "x.json"), Store.read

    def too_late(self: Store) -> bytes:
        try:
            return real(self)
        finally:
            self.write(b"{}")

    monkeypatch.setattr(Store, "read", too_late)
    assert read(place) is None
    assert place.exists()


def test_a_publisher_whose_record_is_repeated_by_a_fence_has_published(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(remote, "a")
    real = Store.create

    def then_fenced(self: Store, data: bytes) -> None:
        real(self, data)
        monkeypatch.setattr(Store, "create", real)
        assert records.fence(remote, FOLDER, manifest(1, "a"))

    monkeypatch.setattr(Store, "create", then_fenced)
    assert records.create(remote, FOLDER, manifest(1, "a")), "its files are those that are published"


def test_a_record_whose_answer_was_lost_is_there(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.create

    def lost(self: Store, data: bytes) -> None:
        real(self, data)
        raise StorageError("cannot create: connection reset")

    monkeypatch.setattr(Store, "create", lost)
    assert records.create(remote, FOLDER, manifest(1, "a"))
    monkeypatch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(StorageError("connection reset")))
    with pytest.raises(StorageError, match="reset"):
        records.create(remote, FOLDER, manifest(2, "b"))


def test_names_that_are_ours() -> None:
    assert is_ours("part-00000-80fc67bf-20261126T011330-late-cc2ba5.parquet")
    assert is_ours("part-123456-80fc67bf-20261126T011330-a.b_c-d-cc2ba5.arrow")
    for name in (
        "part-00000-4f1e2d3c-1234-5678-9abc-def012345678-c000.snappy.parquet", "theirs.parquet", "_SUCCESS",
        "part-00000-80fc67bf-20261126T011330-late-cc2ba5.parquet.crc", "part-0.parquet",
    ):  # fmt: skip
        assert not is_ours(name)


def test_where_nothing_is_published_a_fence_says_so(tmp_path: Path, remote: Store) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=2)
    copy(remote, "sleeper")
    settle(remote, FOLDER)
    assert remote.join(FOLDER).list() == []
    assert look(remote, FOLDER).manifest is None
    assert published_folders(remote) == {}
    with pytest.raises(DataError, match="nothing is published"):
        read_scores(remote.url)
    with pytest.raises(DataError, match="nothing is published"):
        evaluate_scores(remote.url, str(tmp_path / "in"), work=Loop())
    copy(remote, "another")
    assert set(statuses(run_score(make_spec(tmp_path, output=remote.url), registry)).values()) == {"published"}
    assert read_scores(remote.url).equals(expected(make_predictor(), days))
    assert look(remote, FOLDER).is_settled


# After the publication


@pytest.mark.parametrize("kind", ["manifest", "old files", "quarantine"])
def test_what_fails_after_the_record_is_a_warning_and_the_next_run_ends_it(
    tmp_path: Path, remote: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    spec = make_spec(tmp_path, output=remote.url)
    run_score(spec, registry)
    old = [name for name in remote.join(FOLDER).list() if name.endswith(".parquet")]
    make_registry(tmp_path / "registry", make_predictor(seed=1))
    said = Saying()
    if kind == "manifest":
        fail(monkeypatch, "write", lambda place: place.path.endswith(f"{FOLDER}/_manifest.json"))
    elif kind == "old files":
        fail(monkeypatch, "remove", lambda place: place.name in old)
    else:
        before = look(remote, FOLDER).record
        bad = {"name": part("q").replace("parquet", "arrow"), "rows": 1}
        remote.join("_commits", FOLDER, "000001.json").write(
            json.dumps({**(before or {}), "quarantine": [bad]}).encode()
        )
        remote.join("_quarantine", FOLDER, bad["name"]).write(b"")
        fail(monkeypatch, "remove", lambda place: "_quarantine" in place.path)
    summary = run_score(spec, registry, replace_stale=True, display=said)
    assert (statuses(summary), summary.exit_code) == ({DAY: "published"}, 0)
    assert any("is published; the next run ends what this one could not" in text for text in said.said)
    assert any("503 SlowDown" in text for text in said.said)
    wanted = read_scores(remote.url)
    assert not look(remote, FOLDER).is_settled
    monkeypatch.undo()
    assert statuses(run_score(spec, registry)) == {DAY: "already"}
    current = look(remote, FOLDER)
    assert current.is_settled
    assert current.manifest is not None
    assert remote.join(FOLDER).list() == ["_manifest.json", *(file["name"] for file in current.manifest["files"])]
    assert remote.join("_quarantine", FOLDER).list() == []
    assert remote.join("_commits", FOLDER).list() == ["000002.json"]
    assert read_scores(remote.url).equals(wanted)


def test_what_was_staged_is_gone(tmp_path: Path, output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    real = publish._compare

    def then_gone(*args: Any) -> None:
        real(*args)
        for name in output.join("_staging").list():
            output.join("_staging", name).remove()

    monkeypatch.setattr(publish, "_compare", then_gone)
    with pytest.raises(Locked, match="was taken over by another run while this one scored it") as caught:
        run_score(make_spec(tmp_path, output=output.url), registry)
    assert caught.value.exit_code == 4
    assert output.join(FOLDER).list() == []


def test_another_run_does_not_remove_what_was_just_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "GRACE_S", 0.5)
    output, old = open_store(tmp_path / "out"), tmp_path / "out" / FOLDER
    old.mkdir(parents=True)
    (old / "a.parquet").touch()
    os.utime(old, (time.time() - 86_400,) * 2)
    new = swap.aside(tmp_path / "out") / f"{FOLDER}~run"
    new.mkdir(parents=True)
    swap.put_in_place(new, old)
    publish.sweep(output, [])
    assert (new / "a.parquet").exists(), "it is replaced, and not a day old"
    publish.sweep(output, [new])
    assert not new.parent.exists()


# A date that is not whole, and outputs that are not ours


@pytest.mark.parametrize("lost", ["a file", "the folder"])
def test_a_date_of_which_files_are_missing_is_scored_anew(tmp_path: Path, output: Store, lost: str) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=1)
    spec = make_spec(tmp_path, output=output.url)
    run_score(spec, registry)
    names = [name for name in output.join(FOLDER).list() if name.endswith(".parquet")]
    if lost == "the folder" and not output.is_local:
        output.join(FOLDER).remove(recursive=True)
    else:
        output.join(FOLDER, names[0]).remove()
    with pytest.raises(DataError, match="restore them, or score anew"):
        read_scores(output.url)
    said = run_score(spec, registry).summary["dates"][0]
    assert (said["status"], said["reason"]) == ("published", f"files are missing: {names[0]}")
    assert read_scores(output.url).equals(expected(make_predictor(), days))
    assert look(output, FOLDER).identity[0] == 2
    assert statuses(run_score(spec, registry)) == {DAY: "already"}


def test_foreign_files_of_a_date_stay_and_refuse_it(tmp_path: Path, output: Store) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    spec = make_spec(tmp_path, output=output.url)
    theirs = output.join(FOLDER, "part-00000-4f1e2d3c-1234-5678-9abc-def012345678-c000.snappy.parquet")
    theirs.write(b"PRECIOUS")
    with pytest.raises(DataError, match=r"holds files and no _manifest\.json, so they are not ours; move them away"):
        run_score(spec, registry)
    assert theirs.read() == b"PRECIOUS"
    theirs.remove()
    run_score(spec, registry)
    output.join(FOLDER, "notes.txt").write(b"PRECIOUS")
    if output.is_local:
        with pytest.raises(DataError, match=r"holds files that _manifest\.json does not name") as caught:
            run_score(spec, registry, replace=True)
        assert caught.value.problems == ("notes.txt",)
    else:
        assert statuses(run_score(spec, registry, replace=True)) == {DAY: "published"}
    assert output.join(FOLDER, "notes.txt").read() == b"PRECIOUS"


@pytest.mark.parametrize("name", ["_delta_log", "_metadata", "_common_metadata", "_SUCCESS", "metadata"])
def test_what_other_writers_rely_on_is_foreign(tmp_path: Path, output: Store, name: str) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    output.join(name, "0.json").write(b"{}")
    with pytest.raises(DataError, match="holds what this spec does not publish") as caught:
        run_score(make_spec(tmp_path, output=output.url), registry)
    assert caught.value.problems == (name,)
    assert output.list() == [name]


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another filesystem than the tests' own."""
    shared = Path("/dev/shm" if sys.platform == "linux" else "/nowhere")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem")
    place = shared / f"claydist-{uuid.uuid4().hex}"
    place.mkdir()
    yield place
    shutil.rmtree(place)


def test_an_output_that_is_a_link_to_another_disk(tmp_path: Path, other_disk: Path) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=1)
    (other_disk / "inside").mkdir()
    (tmp_path / "out").symlink_to(other_disk / "inside")
    run_score(make_spec(tmp_path), registry)
    run_score(make_spec(tmp_path), registry, replace=True)
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))
    assert [path.name for path in other_disk.iterdir()] == ["inside"]


def test_an_output_that_is_a_volume_is_refused_before_a_row_is_scored(
    tmp_path: Path, other_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, work = make_registry(tmp_path / "registry"), Loop()
    write_days(tmp_path / "in", n_days=1)
    # No test can mount: the folder beside the output is elsewhere, as it is for a mounted one.
    monkeypatch.setattr(swap, "aside", lambda output: other_disk / ".out.publishing")
    with pytest.raises(StorageError, match=r"it is a volume of its own.*give a folder inside the volume"):
        run_score(make_spec(tmp_path), registry, work)
    assert not work.scored
    assert list(other_disk.iterdir()) == []
    assert [path.name for path in (tmp_path / "out/_locks").iterdir()] == ["publish.flock"]


@pytest.mark.parametrize("damage", ["newer", "no JSON", "no names", "lock", "lock of others", "lease"])
def test_one_damaged_date_fails_alone(tmp_path: Path, output: Store, damage: str) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    spec = make_spec(tmp_path, output=output.url)
    place = output.join(FOLDER, "_manifest.json")
    if damage in ("newer", "no JSON", "no names"):
        run_score(spec, registry, date=DAY)
        newer = {**place.read_json(), **({"protocol": 2} if damage == "newer" else {"files": ["a.parquet"]})}
        place.write(b"{" if damage == "no JSON" else json.dumps(newer).encode())
        expected_words = "damaged"
    else:
        owner = {"run": "x", "host": "elsewhere", "pid": 1, "started": "", "since": ""}
        lock = {"lock": b"{", "lock of others": b'{"who": 1}', "lease": json.dumps(owner).encode()}[damage]
        output.join("_locks", f"{FOLDER}~000001.json").write(lock)
        output.join("_locks", "x.lease").write(b'{"till": "noon"}')
        expected_words = "damaged"
    summary = run_score(spec, registry)
    assert list(statuses(summary).values()) == ["failed", "published", "published"]
    assert expected_words in summary.summary["dates"][0]["reason"]
    assert summary.exit_code == 1


def test_a_manifest_without_scores_is_compared_with_nothing(tmp_path: Path, output: Store) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    spec = make_spec(tmp_path, output=output.url)
    run_score(spec, registry, date=DAY)
    places = [output.join(FOLDER, "_manifest.json")]
    places += [output.join("_commits", FOLDER, name) for name in output.join("_commits", FOLDER).list()]
    for place in places:
        tree = place.read_json()
        del tree["scores"]
        place.write(json.dumps(tree).encode())
    assert list(statuses(run_score(spec, registry)).values()) == ["already", "published"]
    manifest = look(output, f"dt={FIRST.replace(day=2)}").manifest
    assert manifest is not None
    assert all(gate["gate"] != "psi_last" or gate["value"] is None for gate in manifest["gates"])
