"""`ray job submit` of jobs/train.py to a cluster of two CPUs that asks for a token, and what that cluster refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import Cluster, cluster_of_jobs
from tests.tables import cut, make_table, spec_of, write_files

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of_jobs() as head:
        yield head


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    tree = spec_of(write_files(tmp_path / "data", cut(make_table(0, 400), 2)), tmp_path / "registry")
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return path


def find_json(text: str) -> dict[str, Any]:
    """The one object that the job printed, among Ray's own lines, which repeat those of a failed job."""
    lines = sorted({line for line in text.splitlines() if line.startswith("{")})
    assert len(lines) == 1, text[-3000:]
    tree = json.loads(lines[0])
    assert isinstance(tree, dict)
    return tree


def test_a_job_succeeds_and_registers(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    done = cluster.submit(
        "train.py", str(spec), "--set", "train.workers=2", "--set", "train.cpus_per_worker=1", "--json"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    tree = find_json(done.stdout)
    assert (tree["version"], tree["workers"], tree["promoted"]) == (1, 2, True)
    assert (tmp_path / "registry" / "parcels" / "1" / "manifest.json").is_file()


def test_a_job_with_a_bad_spec_fails_with_our_message(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    spec.write_text(spec.read_text().replace("rounds:", "rouns:"))
    done = cluster.submit("train.py", str(spec), "--json")
    assert done.returncode == 1
    assert "failed" in done.stdout
    assert find_json(done.stdout)["error"]["problems"] == ["model.rouns: unknown key; did you mean 'rounds'?"]
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "registry").exists()


def test_a_job_refuses_relative_paths(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    done = cluster.submit("train.py", str(spec), "--set", "data.path=data", "--json")
    assert done.returncode == 1
    error = find_json(done.stdout)["error"]
    assert error["kind"] == "SpecError"
    assert "relative paths ['data']" in error["message"]
    assert "s3://" in error["message"]


def test_64_workers_are_refused_at_once_with_a_setting_that_works(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    given = ("train", str(spec), "--set", "train.workers=64", "--json", "--address", f"127.0.0.1:{cluster.port}")
    began = time.monotonic()
    done = cluster.run("claydist", *given)
    seconds = time.monotonic() - began
    print(f"\n64 workers on 2 CPUs refused after {seconds:.1f} s, imports and joining the cluster included")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "ClusterError"
    assert "64 workers of 1 CPUs: it has 1 nodes with 2 CPUs, room for 2; set train.workers=2" in error["message"]
    assert seconds < 30
    assert not list((tmp_path / "registry").glob("*"))


def test_without_the_token_the_error_says_where_it_is_looked_for(cluster: Cluster, spec: Path) -> None:
    done = cluster.run(
        "claydist", "train", str(spec), "--json", "--address", f"127.0.0.1:{cluster.port}",
        RAY_AUTH_TOKEN_PATH="/nonexistent/token",
    )  # fmt: skip
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "ClusterError"
    assert "RAY_AUTH_TOKEN_PATH" in error["message"]
    assert "Traceback" not in done.stderr
