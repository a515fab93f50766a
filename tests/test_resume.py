"""What a run needs of its cluster and of its past, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from claydist import cluster, pipeline
from claydist.cluster import Node
from claydist.display import Silent
from claydist.errors import StorageError
from claydist.places import _differing_sizes
from claydist.preparation import open_tables
from claydist.registry import open_registry
from claydist.runs import Run, list_runs, start_run
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from tests.checks import without_ray
from tests.tables import make_table, spec_of, write_files


class Told(Silent):
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    without_ray(monkeypatch)
    return load_spec(TrainSpec, spec_of(write_files(tmp_path / "d", [make_table(0, 200)]), tmp_path / "registry"))


@pytest.mark.parametrize("xgboost", ["3.1.0", None])
def test_a_run_of_other_versions_is_not_gone_on_with(spec: TrainSpec, xgboost: str | None) -> None:
    registry, told = open_registry(spec.registry), Told()

    def open_run(*, resume: bool) -> tuple[Run, bool]:
        clock = pipeline.Clock(told, start_run(registry, "train", spec, spec.name))
        resumed = pipeline._open_run(clock, spec, registry, open_tables(spec), cluster.Layout(1, 1), resume=resume)
        return clock.run, resumed

    run, _ = open_run(resume=False)
    run.fail(RuntimeError("stopped"))
    if xgboost:
        run.update(state="failed", versions={**run.facts["versions"], "xgboost": xgboost})
    again, resumed = open_run(resume=True)
    assert (again.run_id == run.run_id, resumed) == ((False, False) if xgboost else (True, True))
    assert resumed is not bool(xgboost)
    assert not resumed or again.facts["error"] is None
    assert not xgboost or "made with other versions of xgboost (3.1.0, now " in told.texts[-1]


def test_a_registry_that_other_nodes_do_not_see_is_refused(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(function: Any, sizes: Any) -> list[Any]:
        there = {path: -1 if path.endswith("run.json") else size for path, size in sizes.items()}
        return [function(sizes), function(there) if function is _differing_sizes else None]

    monkeypatch.setattr(cluster, "living_nodes", lambda: [Node(a, a, 2, 2, 10**10) for a in ("10.0.0.1", "10.0.0.2")])
    monkeypatch.setattr(cluster, "run_on_every_node", elsewhere)
    with pytest.raises(StorageError, match="the registry is not the same on every node") as caught:
        pipeline.train(spec, open_registry(spec.registry), Silent())
    assert "run.json on" in caught.value.problems[0]
    assert [run.state for run in list_runs(open_registry(spec.registry))] == ["failed"]
