"""A worker or the driver is killed or stopped while it trains: the model has the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from claydist.display import Silent
from claydist.errors import TrainingError
from claydist.pipeline import Trained, train
from claydist.registry import Registry, open_registry
from claydist.runs import list_runs
from claydist.spec import TrainSpec
from claydist.specfile import load_spec

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROUNDS = 120
N_ROWS = 80_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures") / "table"
    folder.mkdir()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N_ROWS, 10)).astype(np.float32)
    y = X[:, 0] * X[:, 1] + np.sin(3 * X[:, 2]) + 0.3 * rng.normal(size=N_ROWS)
    columns = {f"x{j}": X[:, j] for j in range(X.shape[1])}
    pq.write_table(pa.table({**columns, "y": y}), folder / "part-0.parquet", row_group_size=N_ROWS // 8)
    return folder


def make_spec(table: Path, **train_options: Any) -> dict[str, Any]:
    return {
        "name": "resilient",
        "data": {"path": str(table), "label": "y"},
        "split": {"test": {"fraction": 0.1}},
        "model": {"kind": "xgboost", "rounds": ROUNDS, "params": {"max_depth": 6, "subsample": 0.7, "eta": 0.1}},
        "train": {"workers": 3, "cpus_per_worker": 1, "checkpoint_s": 0, **train_options},
    }


class Disturb(Silent):
    """Does something to a worker once, when it has come to a round."""

    def __init__(self, at_round: int, act: Callable[[int], None]) -> None:
        self.at_round = at_round
        self.act = act
        self.acted_at: float | None = None
        self.went_on_at: float | None = None

    def progress(self, board: Mapping[str, Any]) -> None:
        if "workers" not in board:
            return  # of statistics or evaluation
        words = board["workers"]
        rounds = [word.get("round", 0) for word in words.values() if word["stage"] == "boost"]
        if self.acted_at is None and len(rounds) == 3 and min(rounds) >= self.at_round:
            self.acted_at = time.monotonic()
            self.act(words[1]["pid"])
        elif self.acted_at is not None and board["starts"] > 1 and rounds and self.went_on_at is None:
            self.went_on_at = time.monotonic()

    @property
    def seconds_to_go_on(self) -> float:
        assert self.acted_at is not None
        assert self.went_on_at is not None
        return self.went_on_at - self.acted_at


def run(table: Path, registry: Registry, display: Silent, **train_options: Any) -> Trained:
    return train(load_spec(TrainSpec, make_spec(table, **train_options)), registry, display)


def model_bytes(registry: Registry, version: int) -> bytes:
    return registry.version_store("resilient", version).join("model.ubj").read()


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, table: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    registry = open_registry(str(tmp_path_factory.mktemp("undisturbed")))
    trained = run(table, registry, Silent())
    assert trained.summary["restarts"] == 0
    return model_bytes(registry, trained.version)


def test_a_killed_worker_costs_time_only(undisturbed: bytes, table: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    display = Disturb(ROUNDS // 3, lambda pid: os.kill(pid, signal.SIGKILL))
    trained = run(table, registry, display)
    assert trained.summary["restarts"] == 1
    assert model_bytes(registry, trained.version) == undisturbed
    print(f"SIGKILL of a worker: {display.seconds_to_go_on:.1f} s until boosting again")


def test_a_stopped_worker_is_replaced_within_the_timeout(undisturbed: bytes, table: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    display = Disturb(ROUNDS // 3, lambda pid: os.kill(pid, signal.SIGSTOP))
    trained = run(table, registry, display, timeout_s=10)
    assert trained.summary["restarts"] == 1
    assert model_bytes(registry, trained.version) == undisturbed
    print(f"SIGSTOP of a worker, timeout_s 10: {display.seconds_to_go_on:.1f} s until boosting again")


def test_more_failures_than_allowed_are_an_error(ray_cluster: None, table: Path, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path))
    display = Disturb(10, lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(TrainingError, match=r"max_failures"):
        run(table, registry, display, max_failures=0)
    assert registry.models() == []
    assert [r.facts["state"] for r in list_runs(registry)] == ["failed"]


def test_a_killed_driver_resumes(undisturbed: bytes, table: Path, tmp_path: Path) -> None:
    import ray

    registry = open_registry(str(tmp_path / "registry"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(make_spec(table)))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "claydist", "train", str(spec), "--json", "--address", address]
    command += ["--registry", registry.store.url]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any((r.store.join("checkpoint.json")).exists() for r in list_runs(registry)):
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=180, check=False)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["resumed"] is True
    assert model_bytes(registry, summary["version"]) == undisturbed
    (only,) = list_runs(registry)
    assert only.facts["state"] == "finished"
    assert only.store.list() == ["run.json"]
