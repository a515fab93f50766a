from __future__ import annotations

import json
from pathlib import Path

import pytest

from claydist.errors import StorageError
from claydist.storage import Store, open_store
from claydist.training.checkpoints import POINTER, find_checkpoint, save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs" / "r1"))


def payloads(run: Store) -> list[str]:
    return [name for name in run.list() if name.startswith("checkpoint-")]


def test_nothing_is_found_before_the_first(run: Store) -> None:
    assert find_checkpoint(run) is None


def test_the_newest_is_found_with_its_state_and_the_one_before_is_gone(run: Store) -> None:
    for done in (25, 50, 1_000_000):
        save_checkpoint(run, b"model %d" % done, {"round": done, "history": {"train": [0.5] * 3}})
        found = find_checkpoint(run)
        assert found is not None
        state, payload = found
        assert (state["round"], state["history"], payload) == (done, {"train": [0.5] * 3}, b"model %d" % done)
        assert len(payloads(run)) == 1


def test_the_same_round_again_replaces_it(run: Store) -> None:
    save_checkpoint(run, b"a", {"round": 25})
    save_checkpoint(run, b"a", {"round": 25})
    assert find_checkpoint(run) is not None


def test_a_crash_after_the_payload_leaves_the_one_before(run: Store) -> None:
    save_checkpoint(run, b"old", {"round": 25})
    run.join("checkpoint-000050.ubj").write(b"new")
    found = find_checkpoint(run)
    assert found is not None
    assert found[1] == b"old"


def test_a_crash_before_the_removal_leaves_the_new_one(run: Store) -> None:
    save_checkpoint(run, b"old", {"round": 25})
    old = run.join("checkpoint-000025.ubj").read()
    save_checkpoint(run, b"new", {"round": 50})
    run.join("checkpoint-000025.ubj").write(old)
    found = find_checkpoint(run)
    assert found is not None
    assert found[1] == b"new"
    save_checkpoint(run, b"newer", {"round": 100})
    assert payloads(run) == ["checkpoint-000100.ubj"]


@pytest.mark.parametrize("damage", ["gone", "changed", "cut", "pointer", "pointer list", "no digest"])
def test_what_is_not_whole_is_not_used(run: Store, damage: str) -> None:
    save_checkpoint(run, b"model", {"round": 25})
    payload, pointer = run.join("checkpoint-000025.ubj"), run.join(POINTER)
    if damage == "gone":
        payload.remove()
    elif damage in ("changed", "cut"):
        payload.write(b"modem" if damage == "changed" else b"mod")
    elif damage == "no digest":
        state = pointer.read_json()
        del state["sha256"]
        pointer.write(json.dumps(state).encode())
    else:
        pointer.write(b"{" if damage == "pointer" else b"[]")
    assert find_checkpoint(run) is None
    save_checkpoint(run, b"again", {"round": 25})
    assert find_checkpoint(run) is not None


def test_a_file_that_cannot_be_read_now_is_no_reason_to_start_anew(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(run, b"model", {"round": 25})
    read = Store.read
    for suffix in (".ubj", ".json"):

        def slow_down(place: Store, suffix: str = suffix) -> bytes:
            if place.name.endswith(suffix):
                raise StorageError("503 slow down")
            return read(place)

        monkeypatch.setattr(Store, "read", slow_down)
        with pytest.raises(StorageError, match="slow down"):
            find_checkpoint(run)
