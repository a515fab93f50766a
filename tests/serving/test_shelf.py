from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from asking import ask, client
from serving_models import DATA, boosted, register

from claydist.bundle import MANIFEST, read_bundle
from claydist.errors import BundleError, RegistryError, SpecError
from claydist.registry import Registry, load, open_registry
from claydist.serving import shelf as module
from claydist.serving.application import Application
from claydist.serving.keys import KeyRing
from claydist.serving.refusals import Refusal
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Shelf
from claydist.values import to_plain


@pytest.fixture
def moving(tmp_path: Path, table: pa.Table) -> Registry:
    """A model with two versions, the champion at the first."""
    registry = open_registry(str(tmp_path / "registry"))
    register(registry, "m", boosted(table, rounds=3), table)
    register(registry, "m", boosted(table, rounds=6), table, promote=False)
    return registry


def test_a_promotion_is_followed_and_the_old_one_stays_warm(moving: Registry) -> None:
    shelf = Shelf(["m"], moving)
    first = shelf.find("m")
    assert asyncio.run(shelf.refresh()) == []
    moving.promote("m", 2)
    assert asyncio.run(shelf.refresh()) == ["m"]
    assert shelf.find("m").version == "2"
    assert shelf.find("m", "1") is first
    assert shelf.versions("m") == ["1", "2"]
    moving.rollback("m")
    asyncio.run(shelf.refresh())
    assert shelf.find("m") is first


def test_two_looks_at_once_are_one_swap(moving: Registry) -> None:
    shelf, swaps = Shelf(["m"], moving), []
    shelf.on_swap = swaps.append
    first = shelf.find("m")
    moving.promote("m", 2)

    async def both() -> list[list[str]]:
        return await asyncio.gather(shelf.refresh(), shelf.refresh())

    assert sorted(asyncio.run(both())) == [[], ["m"]]
    assert shelf.find("m", "1") is first
    assert [s.version for s in swaps] == ["2"]
    assert not shelf._swap(shelf.slots[0], shelf.slots[0].current)
    assert shelf.slots[0].previous is first


def test_a_version_that_fails_its_golden_rows_is_not_taken(moving: Registry, table: pa.Table) -> None:
    shelf = Shelf(["m"], moving)
    place = Path(moving.version_store("m", 2).join(MANIFEST).path)
    place.write_bytes(place.read_bytes()[:-40])
    moving.promote("m", 2)
    assert asyncio.run(shelf.refresh()) == []
    assert shelf.find("m").version == "1"
    assert "damaged" in shelf.slots[0].error
    third = register(moving, "m", boosted(table, rounds=4), table)
    assert asyncio.run(shelf.refresh()) == ["m"]
    assert shelf.find("m").version == str(third)
    assert shelf.slots[0].error == ""


def test_what_is_not_there_stops_the_start(moving: Registry, tmp_path: Path) -> None:
    for ref, error in (
        ("absent", RegistryError),
        ("m@next", RegistryError),
        ("m:9", RegistryError),
        (str(tmp_path), BundleError),
    ):
        with pytest.raises(error):
            Shelf([ref], moving)


def test_references_that_meet_share_one_model(moving: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    moving.promote("m", 2, "shadow")
    shelf = Shelf(["m", "m@shadow"], moving)
    monkeypatch.setattr(module, "read_bundle", None)  # nothing is read twice
    moving.promote("m", 2)
    assert asyncio.run(shelf.refresh()) == ["m"]
    assert shelf.slots[0].current is shelf.slots[1].current is shelf.find("m", "2")
    assert shelf.versions("m") == ["1", "2"]
    monkeypatch.undo()
    # As a replica that starts later sees it.
    reads: list[Any] = []
    monkeypatch.setattr(module, "read_bundle", lambda store: reads.append(store) or read_bundle(store))
    later = Shelf(["m", "m@shadow", "m:2"], moving)
    assert len(reads) == 1
    assert [(s.name, s.version) for s in later.served] == [("m", "2")]
    url = moving.version_store("m", 2).url
    again = Shelf(["m", url], moving)
    assert again.slots[0].current is again.slots[1].current
    moving.promote("m", 1, "shadow")
    assert asyncio.run(later.refresh()) == ["m@shadow"]
    assert [slot.current.version for slot in later.slots] == ["2", "1", "2"]


def test_different_bundles_of_one_name_and_version_are_refused(
    moving: Registry, tmp_path: Path, table: pa.Table
) -> None:
    staging = open_registry(str(tmp_path / "staging"))
    register(staging, "m", boosted(table, rounds=4), table)
    with pytest.raises(SpecError, match="different bundles of the same name and version"):
        Shelf(["m", staging.version_store("m", 1).url], moving)


def test_a_version_that_fails_is_tried_ever_more_seldom(moving: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(["m"], moving, poll_s=100)
    slot, reads = shelf.slots[0], []

    def fails(store: Any) -> Any:
        reads.append(store.name)
        raise BundleError("damaged")

    def refresh(*, wait_is_over: bool) -> float:
        if wait_is_over:
            assert slot.failure is not None
            slot.failure = replace(slot.failure, until=0.0)
        assert asyncio.run(shelf.refresh()) == []
        assert slot.error == "damaged"
        assert slot.failure is not None
        return slot.failure.wait_s

    monkeypatch.setattr(module, "read_bundle", fails)
    moving.promote("m", 2)
    assert [refresh(wait_is_over=False) for _ in range(4)] == [100] * 4
    assert reads == ["2"]
    assert [refresh(wait_is_over=True) for _ in range(3)] == [200, 300, 300]
    assert reads == ["2"] * 4
    # Back, and there again: somebody has looked at it in between.
    moving.rollback("m")
    assert asyncio.run(shelf.refresh()) == []
    assert (slot.error, slot.failure) == ("", None)
    moving.promote("m", 2)
    assert refresh(wait_is_over=False) == 100
    assert reads == ["2"] * 5
    monkeypatch.undo()
    slot.failure = replace(slot.failure, until=0.0) if slot.failure else None
    assert asyncio.run(shelf.refresh()) == ["m"]
    assert (slot.error, slot.failure) == ("", None)


def test_the_ends_of_64_bits_are_served_as_their_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ns = np.r_[np.iinfo(np.int64).min, np.iinfo(np.int64).max, rng.integers(-(2**63), 2**63 - 1, 198)]
    large = np.r_[np.uint64(2**63), np.uint64(2**64 - 1), rng.integers(2**63 - 9, 2**64 - 1, 198, np.uint64)]
    rows = pa.table({"distance": rng.random(200) * 3000, "large": large, "departs": pa.array(ns, pa.timestamp("ns"))})
    registry = open_registry(str(tmp_path / "registry"))
    data = DATA.model_copy(update={"types": {}, "calendar": {}})
    register(registry, "ends", boosted(rows, data=data), rows)
    app = Application(ServeSpec(models=("ends",), access_log=False), Shelf(["ends"], registry), KeyRing())
    predictor = app.shelf.find("ends").predictor
    answer = ask(app, "POST", "/predict/ends", json={"rows": to_plain(rows, predictor.plan)})
    assert answer.json()["predictions"] == predictor.predict(rows).to_pylist()
    assert ask(app, "GET", "/openapi.json").status_code == 200


def test_versions_and_urls_do_not_move(moving: Registry) -> None:
    shelf = Shelf(["m:1", moving.version_store("m", 2).url], moving)
    moving.promote("m", 2)
    assert asyncio.run(shelf.refresh()) == []
    assert [s.version for s in shelf.served] == ["1", "2"]
    with pytest.raises(Refusal, match="versions: 1, 2"):
        shelf.find("m", "3")


def test_answers_are_of_the_version_they_name_while_it_moves(moving: Registry, table: pa.Table) -> None:
    spec = ServeSpec(models=("m",), access_log=False, poll_s=0.01, limits={"queue_requests": 64})
    expected = {str(v): load(f"m:{v}", moving).predict(table[:5]).to_pylist() for v in (1, 2)}
    app = Application(spec, Shelf(spec.models, moving, poll_s=spec.poll_s), KeyRing())
    body = {"rows": to_plain(table[:5], app.shelf.find("m").predictor.plan)}

    async def run() -> set[str]:
        seen, ended = set(), asyncio.Event()

        async def asking() -> None:
            async with client(app) as http:
                while not ended.is_set():
                    answer = (await http.post("/predict/m", json=body)).json()
                    assert answer["predictions"] == expected[answer["version"]]
                    seen.add(answer["version"])

        async def moves() -> None:
            for version in (2, 1, 2, 1):
                await asyncio.to_thread(moving.promote, "m", version)
                await asyncio.sleep(0.2)
            ended.set()

        await asyncio.gather(moves(), *(asking() for _ in range(8)))
        app.close()
        return seen

    assert asyncio.run(run()) == {"1", "2"}


def test_the_first_rows_of_a_model_are_its_examples(moving: Registry) -> None:
    served = Shelf(["m"], moving).find("m")
    matrix = served.encoder.from_rows(served.examples)
    assert len(served.predict_values(matrix.values)) == len(served.examples) > 0
    assert served.seconds_per_row > 0


def test_following_survives_what_nobody_foresaw(moving: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(["m"], moving, poll_s=0.01)
    calls: list[int] = []

    async def fails() -> Any:
        calls.append(1)
        raise RuntimeError("storage exploded")

    monkeypatch.setattr(shelf, "refresh", fails)

    async def run() -> None:
        shelf.follow()
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        shelf.close()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_settings_are_checked() -> None:
    from claydist.specfile import load_spec

    with pytest.raises(SpecError) as caught:
        load_spec(ServeSpec, {"models": [], "replica": 2, "limits": {"rows": 0}, "poll_s": -1})
    assert len(caught.value.problems) == 4
    assert load_spec(ServeSpec, {"models": "a, b@x"}).models == ("a", "b@x")
    for wrong in ({"models": ["a", "a"]}, {"models": ["a"], "autoscaling": {"min_replicas": 3, "max_replicas": 2}}):
        with pytest.raises(SpecError):
            load_spec(ServeSpec, wrong)


def test_swaps_are_counted_for_prometheus(moving: Registry) -> None:
    app = Application(ServeSpec(models=("m",), access_log=False), Shelf(["m"], moving), KeyRing())
    moving.promote("m", 2)
    asyncio.run(app.shelf.refresh())
    text = ask(app, "GET", "/metrics").text
    assert 'claydist_model_info{model="m",version="2"' in text
    assert 'claydist_swaps_total{model="m",version="2"} 1' in text
