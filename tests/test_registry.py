from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from claydist.bundle import write_bundle
from claydist.errors import BundleError, RegistryError, SpecError, StorageError
from claydist.predictor import Predictor
from claydist.registry import Ref, Registry, load, open_registry, parse_ref
from claydist.registry_commands import models_promote
from claydist.storage import Store, open_store
from tests.stores import s3_options, store
from tests.test_bundle import make_predictor, make_table

__all__ = ["s3_options", "store"]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor()


@pytest.fixture
def registry(store: Store) -> Registry:
    return Registry(store)


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return open_registry(str(tmp_path / "registry"))


def publish(registry: Registry, predictor: Predictor, name: str = "m") -> int:
    version = registry.reserve(name)
    facts = {"name": name, "version": version}
    write_bundle(registry.version_store(name, version), predictor, manifest=facts, extra_files={})
    return version


class TestVersions:
    def test_numbers_count_up_and_exist_with_their_manifest(self, registry: Registry, predictor: Predictor) -> None:
        assert registry.models() == registry.versions("m") == []
        assert [publish(registry, predictor), registry.reserve("m"), publish(registry, predictor)] == [1, 2, 3]
        registry.reserve("only-reserved")
        registry.store.join("_runs/x/1/manifest.json").write(b"{}")
        registry.store.join("m/3/report.html").write(b"")
        registry.store.join("m/notes/manifest.json").write(b"{}")
        assert registry.versions("m") == [1, 3]
        assert registry.models() == ["m"]
        assert registry.version_store("m", 3).url == f"{registry.store.url}/m/3"

    def test_ten_follows_nine(self, registry: Registry, predictor: Predictor) -> None:
        numbers = [registry.reserve("m") for _ in range(9)]
        assert publish(registry, predictor) == len(numbers) + 1 == 10
        assert publish(registry, predictor) == 11
        assert registry.versions("m") == [10, 11]
        assert registry.promote("m", 10).to_version == 10

    def test_two_trainers_never_take_the_same_number(self, registry: Registry) -> None:
        n_threads, n_each = 6, 3
        start = threading.Barrier(n_threads)

        def reserves(_: int) -> list[int]:
            start.wait()
            return [registry.reserve("m") for _ in range(n_each)]

        with ThreadPoolExecutor(n_threads) as pool:
            taken = [number for numbers in pool.map(reserves, range(n_threads)) for number in numbers]
        assert sorted(taken) == list(range(1, n_threads * n_each + 1))

    def test_a_reservation_says_whose_it_is(self, local: Registry) -> None:
        claim = local.version_store("m", local.reserve("m")).join("reserved.json").read_json()
        assert "@" in claim["by"]
        assert datetime.fromisoformat(claim["when"]).utcoffset() is not None

    @pytest.mark.parametrize("name", ["", "..", "a..b", "a/b", "A", "_runs", "-a", "x" * 64, "a b", "a\n", "\u00e9"])
    def test_names_that_are_none(self, local: Registry, name: str) -> None:
        acts: list[Any] = [local.reserve, local.versions, local.alias_version, local.history]
        acts += [lambda n: local.version_store(n, 1), lambda n: local.promote(n, 1), local.rollback]
        for act in acts:
            with pytest.raises(SpecError, match="expected a model's name"):
                act(name)
        with pytest.raises(SpecError, match="expected an alias"):
            local.alias_version("m", name)


class TestAliases:
    def test_history_is_made_of_moves(self, registry: Registry, predictor: Predictor) -> None:
        for _ in range(3):
            publish(registry, predictor)
        assert registry.alias_version("m") is None
        registry.promote("m", 1, why="first", by="ann")
        registry.promote("m", 3, "shadow", by="bob")
        registry.promote("m", 2, why="better", by="bob")
        assert registry.alias_version("m") == 2
        assert registry.alias_version("m", "shadow") == 3
        moves = [(m.sequence, m.from_version, m.to_version, m.why, m.by) for m in registry.history("m", "champion")]
        assert moves == [(1, None, 1, "first", "ann"), (2, 1, 2, "better", "bob")]
        assert [(m.alias, m.to_version) for m in registry.history("m")] == [
            ("champion", 1), ("shadow", 3), ("champion", 2)
        ]  # fmt: skip
        assert registry.versions("m") == [1, 2, 3]

    def test_a_move_is_a_file_that_a_person_can_read(self, registry: Registry, predictor: Predictor) -> None:
        publish(registry, predictor)
        move = registry.promote("m", 1, why="na\u00efve")
        place = registry.store.join("m/_aliases/champion")
        assert place.list() == ["000001.json"]
        assert place.join("000001.json").read_json() == move.to_json()
        assert move.to_json().keys() == {"alias", "sequence", "when", "from", "to", "why", "by"}
        assert datetime.fromisoformat(move.when).utcoffset() is not None
        assert registry.history("m") == [move]

    def test_where_it_is_already_nothing_is_written(self, registry: Registry, predictor: Predictor) -> None:
        publish(registry, predictor)
        move = registry.promote("m", 1, why="first")
        assert registry.promote("m", 1, why="again") == move
        assert registry.history("m") == [move]

    def test_an_absent_version_is_no_target(self, registry: Registry, predictor: Predictor) -> None:
        publish(registry, predictor)
        registry.reserve("m")
        for version in (2, 9):
            with pytest.raises(RegistryError, match=rf"'m' has no version {version} in .*; versions: 1"):
                registry.promote("m", version)
        assert registry.history("m") == []

    def test_expected_is_compared(self, registry: Registry, predictor: Predictor) -> None:
        for _ in range(3):
            publish(registry, predictor)
        registry.promote("m", 1, expected=None)
        with pytest.raises(RegistryError, match="expected m@champion at no version, found it at version 1"):
            registry.promote("m", 2, expected=None)
        registry.promote("m", 2, expected=1)
        with pytest.raises(RegistryError, match="expected m@champion at version 1, found it at version 2: somebody"):
            registry.promote("m", 3, expected=1)
        assert [m.to_version for m in registry.history("m")] == [1, 2]

    def test_moves_at_once_form_one_chain(self, registry: Registry, predictor: Predictor) -> None:
        n_threads = 5
        for _ in range(n_threads):
            publish(registry, predictor)
        start = threading.Barrier(n_threads)

        def promotes(version: int) -> None:
            start.wait()
            registry.promote("m", version)

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(promotes, range(1, n_threads + 1)))
        moves = registry.history("m")
        assert sorted(m.to_version for m in moves) == list(range(1, n_threads + 1))
        assert [m.sequence for m in moves] == list(range(1, n_threads + 1))
        assert [m.from_version for m in moves] == [None, *(m.to_version for m in moves[:-1])]

    def test_of_two_that_expect_the_same_one_wins(self, registry: Registry, predictor: Predictor) -> None:
        for _ in range(3):
            publish(registry, predictor)
        registry.promote("m", 1)
        start = threading.Barrier(2)

        def promotes(version: int) -> bool:
            start.wait()
            try:
                registry.promote("m", version, expected=1)
            except RegistryError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(promotes, (2, 3))) == [False, True]
        assert len(registry.history("m")) == 2

    def test_rollback_goes_to_the_last_other_version(self, registry: Registry, predictor: Predictor) -> None:
        for _ in range(3):
            publish(registry, predictor)
        for version in (1, 2, 3):
            registry.promote("m", version)
        assert registry.rollback("m", why="bad", by="ann").to_version == 2
        assert registry.alias_version("m") == 2
        assert [m.to_version for m in registry.history("m")] == [1, 2, 3, 2]
        assert registry.history("m")[-1].from_version == 3
        assert registry.rollback("m").why == "rollback from version 2"
        assert registry.alias_version("m") == 3

    def test_nothing_to_roll_back_to(self, registry: Registry, predictor: Predictor) -> None:
        publish(registry, predictor)
        with pytest.raises(RegistryError, match=r"nothing to roll m@champion back to: it is at no version"):
            registry.rollback("m")
        registry.promote("m", 1)
        with pytest.raises(RegistryError, match=r"it is at version 1 and was never elsewhere; versions: 1"):
            registry.rollback("m")

    def test_rollback_to_a_removed_version_is_refused(self, local: Registry, predictor: Predictor) -> None:
        for _ in range(2):
            publish(local, predictor)
        for version in (1, 2):
            local.promote("m", version)
        local.version_store("m", 1).remove(recursive=True)
        with pytest.raises(RegistryError, match="no version 1"):
            local.rollback("m")
        assert local.alias_version("m") == 2

    @pytest.mark.parametrize("data", [b"{}", b"[]", b'{"when": "", "from": null, "to": "x", "why": "", "by": ""}'])
    def test_a_damaged_move_is_said_with_its_place(self, local: Registry, predictor: Predictor, data: bytes) -> None:
        publish(local, predictor)
        local.store.join("m/_aliases/champion/000001.json").write(data)
        with pytest.raises(RegistryError, match=r"000001\.json is damaged"):
            local.alias_version("m")


class TestReferences:
    @pytest.mark.parametrize(
        ("text", "ref"),
        [
            ("m", Ref("m", "champion")),
            ("a-b.c_1", Ref("a-b.c_1", "champion")),
            ("m@shadow", Ref("m", "shadow")),
            ("m:12", Ref("m", version=12)),
            ("s3://b/m/1", Ref(url="s3://b/m/1")),
            ("/a/m", Ref(url="/a/m")),
            ("./m", Ref(url="./m")),
            ("../m", Ref(url="../m")),
        ],
    )
    def test_what_they_say(self, text: str, ref: Ref) -> None:
        assert parse_ref(text) == ref

    @pytest.mark.parametrize(
        "text",
        ["", "M", "m@", "m:", "m:0", "m:01", "m:-1", "m:1.0", "m:x", "m:1:2", "m@a:1", "m@A", "a/b", "m..n", "m@..",
         "m\n", "m:1\n", "m:\u0661", "m:9999999999"],
    )  # fmt: skip
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(SpecError, match=f"expected a reference to a model.*found {re.escape(repr(text))}"):
            parse_ref(text)

    def test_each_form_is_resolved(self, registry: Registry, predictor: Predictor) -> None:
        for _ in range(3):
            publish(registry, predictor)
        registry.promote("m", 2)
        registry.promote("m", 3, "shadow")
        found = {ref: registry.resolve(ref) for ref in ("m", "m@champion", "m@shadow", "m:1")}
        assert {ref: r.version for ref, r in found.items()} == {"m": 2, "m@champion": 2, "m@shadow": 3, "m:1": 1}
        assert [r.alias for r in found.values()] == ["champion", "champion", "shadow", None]
        assert found["m"].store == registry.version_store("m", 2)
        assert {r.name for r in found.values()} == {"m"}

    def test_what_is_not_there_is_said_with_what_is(self, registry: Registry, predictor: Predictor) -> None:
        with pytest.raises(RegistryError, match=r"no model 'm' in .*; models: none; train it, or check --registry"):
            registry.resolve("m")
        for _ in range(2):
            publish(registry, predictor, "flight-delay")
        with pytest.raises(
            RegistryError,
            match=r"'flight-delay' has no champion in .*; versions: 1, 2; name one, e\.g\. flight-delay:2, "
            r"or promote it: claydist models promote flight-delay:2",
        ):
            registry.resolve("flight-delay")
        with pytest.raises(RegistryError, match="has no version 7"):
            registry.resolve("flight-delay:7")
        with pytest.raises(RegistryError, match=r"no model 'flight-delays' in .*; did you mean 'flight-delay'"):
            registry.resolve("flight-delays")
        with pytest.raises(RegistryError, match="no model 'flight-delays'"):
            registry.resolve("flight-delays:1")

    def test_a_url_is_resolved_from_what_the_bundle_says(self, local: Registry, predictor: Predictor) -> None:
        publish(local, predictor)
        url = local.version_store("m", 1).url
        resolved = local.resolve(url)
        assert (resolved.name, resolved.version, resolved.alias, resolved.store.url) == ("m", 1, None, url)
        bare = open_store(local.store.path + "-bare")
        write_bundle(bare, predictor, manifest={}, extra_files={})
        assert (local.resolve(bare.url).name, local.resolve(bare.url).version) == ("registry-bare", None)
        with pytest.raises(BundleError, match="expected a bundle"):
            local.resolve(local.store.url)

    def test_promote_does_not_take_a_url(self, tmp_path: Path, predictor: Predictor) -> None:
        staging, production = (open_registry(str(tmp_path / name)) for name in ("staging", "production"))
        for registry in (staging, production):
            publish(registry, predictor)
        url = staging.version_store("m", 1).url
        with pytest.raises(SpecError, match=f"expected NAME:VERSION of the registry to promote, .*{re.escape(url)}"):
            models_promote(url, registry=production.store.url)
        assert production.history("m") == []
        models_promote("m:1", registry=production.store.url)
        assert production.alias_version("m") == 1


class TestLoad:
    def test_every_reference_gives_the_bundle(
        self, local: Registry, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(local, predictor)
        local.promote("m", 1)
        table = make_table()
        expected: pa.Table = predictor.predict(table)
        for ref in ("m", "m@champion", "m:1", local.version_store("m", 1).url):
            assert load(ref, local).predict(table).equals(expected)
            assert load(ref, local.store.url).manifest["version"] == 1
        monkeypatch.setenv("CLAYDIST_REGISTRY", local.store.url)
        assert load("m").uri == local.version_store("m", 1).url
        with pytest.raises(RegistryError, match="no model 'n'"):
            load("n")

    def test_the_order_of_who_says_where(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CLAYDIST_REGISTRY", raising=False)
        assert open_registry().store.url == str(tmp_path / "registry")
        monkeypatch.setenv("CLAYDIST_REGISTRY", str(tmp_path / "env"))
        assert open_registry().store.name == "env"
        assert open_registry(spec="./spec").store.name == "spec"
        assert open_registry("./flag", "./spec").store.name == "flag"


class TestWritable:
    def test_a_registry_that_can_be_written_keeps_no_trace(self, registry: Registry) -> None:
        registry.check_writable()
        assert registry.store.files() == []
        assert registry.models() == []

    def test_one_that_cannot_says_so(self, tmp_path: Path, s3_options: dict[str, Any]) -> None:
        (tmp_path / "file").write_bytes(b"")
        for url, options in ((str(tmp_path / "file"), {}), ("s3://no-such-bucket/registry", s3_options)):
            with pytest.raises(StorageError, match=rf"cannot create {re.escape(url)}/_probe"):
                open_registry(url, options=options).check_writable()
