"""Two owners of one date, alive at the same moment, each held at every step of its publication.

The first is held at a step as by a long sleep; its lease ends, the second takes the lock over and is held at a step of
its own; then the first wakes and ends, and then the second. Whatever the steps are: one version is published, whole,
by `read_scores` and by a glob; no file is left that its manifest does not name; and who lost says Locked.
"""

from __future__ import annotations

import itertools
import math
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from claydist.errors import ClaydistError, DataError, Locked
from claydist.runs import list_runs
from claydist.scoring import publish, records
from claydist.scoring.publish import QUARANTINE, look
from claydist.scoring.readers import read_scores
from claydist.storage import Store, open_store
from tests.scoring.support import FIRST, make_predictor, make_registry, make_rows, make_spec, run_score

pytestmark = pytest.mark.slow

FOLDER = f"dt={FIRST}"
REMOTE = ("compared", "copied", "recorded", "finishing", "writing", "repeated")
LOCAL = ("compared", "linked", "made", "exchanged")
SECOND_REMOTE = ("end", "fence", "fenced", "compared", "copied", "recorded", "finishing")
SECOND_LOCAL = ("end", "settled", "compared", "linked", "made", "exchanged")


class Owner(threading.Thread):
    """A run that waits where it is told to, until it is released."""

    def __init__(self, name: str, step: str, run: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.step, self.work = step, run
        self.held, self.released = threading.Event(), threading.Event()
        self.outcome = ""

    def run(self) -> None:
        try:
            self.outcome = self.work().summary["dates"][0]["status"]
        except Locked as e:
            self.outcome = f"locked: {e}"
        finally:
            self.held.set()

    def reach(self, step: str) -> None:
        if step == self.step and not self.held.is_set():
            self.held.set()
            assert self.released.wait(60)

    def go(self) -> None:
        self.start()
        assert self.held.wait(60)

    def end(self) -> None:
        self.released.set()
        self.join(60)
        assert not self.is_alive()


def reach(step: str) -> None:
    owner = threading.current_thread()
    if isinstance(owner, Owner):
        owner.reach(step)


@pytest.fixture(autouse=True)
def _steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step says when it is reached."""
    monkeypatch.setattr(publish, "GRACE_S", 0.0)

    def around(place: Any, name: str, before: str = "", after: str = "", of: str = "") -> None:
        real = getattr(place, name)

        def said(*args: Any, **kwargs: Any) -> Any:
            is_meant = of in getattr(args[0], "path", "")
            if before and is_meant:
                reach(before)
            result = real(*args, **kwargs)
            if after and is_meant:
                reach(after)
            return result

        monkeypatch.setattr(place, name, said)

    around(publish, "_compare", after="compared")
    around(publish, "settle", after="settled")
    around(publish, "_exchange", after="exchanged")
    around(records, "create", before="copied")
    around(records, "finish", before="finishing")
    around(records, "fence", before="fence", after="fenced")
    around(Store, "create", after="recorded", of="/_commits/")
    around(Store, "write", before="linked", after="made", of=".publishing/")
    around(Store, "write", before="writing", after="repeated", of=f"/{FOLDER}/_manifest.json")
    monkeypatch.setattr("claydist.scoring.run.settle", publish.settle)


def write_input(folder: Path) -> None:
    """One day in two files, a row of which goes to quarantine."""
    for number in range(2):
        rows = make_rows(20, seed=number)
        x = rows.column("x").to_pylist()
        x[3] = math.inf
        place = folder / FOLDER / f"part-{number}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.set_column(1, "x", pa.array(x)), place)


def take_leases(output: Store) -> None:
    """What time does to an owner that sleeps."""
    for name in output.join("_locks").list():
        if name.endswith(".lease"):
            output.join("_locks", name).remove()


def versions_of(tmp_path: Path, registry: Any, n_models: int) -> list[pa.Table]:
    found = []
    for version in range(1, n_models + 1):
        alone = f"{tmp_path}/alone-{version}"
        run_score(make_spec(tmp_path, output=alone, model=f"late:{version}", max_quarantined=2), registry)
        found.append(read_scores(alone))
    return found


def check_readers(output: Store, versions: list[pa.Table]) -> None:
    """At any moment."""
    if look(output, FOLDER).manifest is None:
        with pytest.raises(DataError, match="nothing is published"):
            read_scores(output.url)
    else:
        assert any(read_scores(output.url).equals(version) for version in versions)
    if output.is_local and (found := [f for f in output.files() if f.path.endswith(".parquet")]):
        globbed = pa.concat_tables([read_one(output, f.path) for f in found])
        assert any(globbed.equals(version.drop_columns("dt")) for version in versions)


def read_one(output: Store, path: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(output.join(path).read())).replace_schema_metadata(None)


def check_end(output: Store, versions: list[pa.Table], published_by: set[str]) -> None:
    """When all have ended: one version whole, by a glob too, and no file that its manifest does not name."""
    assert any(read_scores(output.url).equals(version) for version in versions)
    current = look(output, FOLDER)
    assert current.is_settled
    assert current.manifest is not None
    assert current.manifest["published_by"] in published_by
    parquet = [f.path for f in output.files() if f.path.endswith(".parquet")]
    assert parquet == [f"{FOLDER}/{file['name']}" for file in current.manifest["files"]]
    quarantined = output.join(QUARANTINE, FOLDER).list()
    assert quarantined == sorted(file["name"] for file in current.manifest["quarantine"])
    if output.is_local:
        beside = publish.swap.aside(Path(output.path))
        assert not beside.exists()


@pytest.fixture(params=["local", "memory"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """New outputs of one kind."""
    root = str(tmp_path / "outputs") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    yield lambda: f"{root}/{uuid.uuid4().hex}"
    if open_store(root).exists():
        open_store(root).remove(recursive=True)


@pytest.mark.parametrize("case", ["new", "replaced", "shared staging"])
def test_two_owners_at_any_two_steps(tmp_path: Path, places: Callable[[], str], case: str) -> None:
    registry = make_registry(tmp_path / "registry")
    for seed in (1, 2):
        make_registry(tmp_path / "registry", make_predictor(seed=seed))
    write_input(tmp_path / "in")
    versions = versions_of(tmp_path, registry, 3)
    is_local = not places().startswith("memory")
    steps = itertools.product(LOCAL, SECOND_LOCAL) if is_local else itertools.product(REMOTE, SECOND_REMOTE)
    outcomes = set()
    for first_step, second_step in steps:
        url = places()
        output = open_store(url)

        def score(version: int, url: str = url, **choice: Any) -> Any:
            spec = make_spec(tmp_path, output=url, model=f"late:{version}", max_quarantined=2)
            return run_score(spec, registry, **choice)

        if case == "replaced":
            score(1)
        second_version = 2 if case == "shared staging" else 3
        first = Owner("first", first_step, lambda score=score: score(2, replace_stale=True))
        second = Owner("second", second_step, lambda score=score, v=second_version: score(v, replace=True))
        first.go()
        check_readers(output, versions)
        take_leases(output)
        second.go()
        check_readers(output, versions)
        first.end()
        check_readers(output, versions)
        second.end()
        said = (first_step, second_step, first.outcome, second.outcome)
        is_published = [outcome == "published" for outcome in (first.outcome, second.outcome)]
        assert any(is_published), said
        for outcome in (first.outcome, second.outcome):
            assert outcome == "published" or "by another run while this one scored it" in outcome, said
        winners = [v for v, won in zip((2, second_version), is_published, strict=True) if won]
        runs = {run.run_id for run in list_runs(registry)}
        try:
            check_end(output, [versions[v - 1] for v in winners], runs)
        except (AssertionError, ClaydistError) as e:
            raise AssertionError(said) from e
        outcomes.add(tuple(is_published))
    assert outcomes >= {(True, False), (False, True)}, "either of the two wins somewhere"
