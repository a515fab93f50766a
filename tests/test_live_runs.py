"""A run that is still alive is not resumed by another process; tidying up never fails a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tables import cut, make_table, spec_of, write_files

from claydist import alive, runs
from claydist.display import Silent
from claydist.errors import TrainingError
from claydist.pipeline import train
from claydist.preparation import open_tables
from claydist.registry import open_registry
from claydist.runs import clean_runs, list_runs, start_run
from claydist.spec import TrainSpec
from claydist.specfile import load_spec

pytestmark = pytest.mark.ray


@pytest.fixture
def spec(ray_cluster: None, tmp_path: Path) -> TrainSpec:
    path = write_files(tmp_path / "d", cut(make_table(1, 200), 2))
    return load_spec(TrainSpec, spec_of(path, tmp_path / "registry"))


def test_a_live_run_is_not_resumed(spec: TrainSpec) -> None:
    registry = open_registry(None, spec.registry)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run = start_run(registry, "train", spec, spec.name, open_tables(spec).fingerprint)
        start = alive.started(other.pid)
        run.update(layout={"n_workers": 1, "n_threads": 1}, pid=other.pid, process_start=start)
        with pytest.raises(TrainingError, match=f"still going on, as process {other.pid}"):
            train(spec, registry, Silent(), resume=True)
    assert [r.state for r in list_runs(registry)] == ["lost", "failed"]
    assert os.getpid() != other.pid


def test_tidying_up_goes_on_when_another_was_faster(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = open_registry(None, spec.registry)
    made = [start_run(registry, "train", spec, spec.name, str(i)).finish() for i in range(3)]
    monkeypatch.setattr(runs, "KEEP_ENDED", 1)
    monkeypatch.setattr(runs, "list_runs", lambda _: made)
    made[0].store.remove(recursive=True)
    clean_runs(registry)
    assert not made[1].store.exists()
    assert made[2].store.exists()


def test_a_run_on_another_host_is_lost_when_its_lease_is_over(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = open_registry(None, spec.registry)
    run = start_run(registry, "train", spec, spec.name, open_tables(spec).fingerprint)
    run = run.update(layout={"n_workers": 1, "n_threads": 1}, host="old-pod/boot/pid:[1]", pid=os.getpid())
    with run.kept_alive():
        assert [r.state for r in list_runs(registry)] == ["running"]
        with pytest.raises(TrainingError, match=r"still going on, as process .* of old-pod"):
            train(spec, registry, Silent(), resume=True)
    monkeypatch.setattr(alive, "LEASE_S", 0.0)  # what it wrote a moment ago does not count any more
    trained = train(spec, registry, Silent(), resume=True)
    assert trained.summary["resumed"] is True
    assert [r.state for r in list_runs(registry)] == ["finished", "failed"], "the failed one was refused above"


def test_a_pid_that_another_process_has_now_is_not_the_run(spec: TrainSpec) -> None:
    registry = open_registry(None, spec.registry)
    run = start_run(registry, "train", spec, spec.name, "x")
    assert run.is_mine
    assert run.state == "running"
    other = run.update(process_start="1")
    assert not other.is_mine
    assert other.state == "lost"
