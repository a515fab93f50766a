from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from claydist.registry import Registry
from claydist.serving import jobs
from claydist.serving.jobs import BatchJobs, normalised
from claydist.serving.refusals import Refusal
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Served, Shelf


class Status(Enum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    def is_terminal(self) -> bool:
        return self.name in ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass
class Info:
    status: Status
    metadata: dict[str, str]
    start_time: int = 1
    end_time: int | None = None
    submission_id: str | None = None


@dataclass
class Client:
    """What `JobSubmissionClient` does, without a cluster: an id is taken once, and an unknown one is a RuntimeError."""

    jobs: dict[str, Info] = field(default_factory=dict)
    entrypoints: list[str] = field(default_factory=list)

    def submit_job(self, entrypoint: str, submission_id: str, metadata: dict[str, str]) -> str:
        if submission_id in self.jobs:
            raise RuntimeError("taken")
        self.jobs[submission_id] = Info(Status.PENDING, metadata, submission_id=submission_id)
        self.entrypoints.append(entrypoint)
        return submission_id

    def list_jobs(self) -> list[Info]:
        return [Info(Status.RUNNING, {}), *self.jobs.values()]

    def get_job_info(self, job_id: str) -> Info:
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist")
        return self.jobs[job_id]

    def get_job_status(self, job_id: str) -> Status:
        return self.get_job_info(job_id).status

    def get_job_logs(self, job_id: str) -> str:
        return 'Traceback (most recent call last):\n  File "/secret"\n{"model": "trees", "dates": []}\nbye\n'

    def stop_job(self, job_id: str) -> None:
        self.jobs[job_id].status = Status.STOPPED


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("in", "out", "other"):
        (tmp_path / name).mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def batch(roots: tuple[Path, Path], registry: Registry) -> tuple[BatchJobs, Client]:
    settings = {"input_roots": [str(roots[0]), "s3://bucket/in"], "output_roots": [str(roots[1])]}
    found = BatchJobs(ServeSpec(models=("trees",), registry=registry.store.url, batch=settings))
    client = Client()
    found._client = client
    return found, client


@pytest.fixture
def served(shelf: Shelf) -> Served:
    return shelf.find("trees")


def test_the_same_run_is_submitted_once(batch: Any, served: Served, roots: Any) -> None:
    found, client = batch
    tree = {"input": f"{roots[0]}/a", "output": str(roots[1]), "date": "dt", "key": ["flight"], "from": "2026-01-01"}
    first = found.submit(served, tree)
    assert first == {"id": first["id"], "status": "PENDING", **served.identity()}
    assert found.submit(served, dict(reversed(tree.items())))["id"] == first["id"]
    assert found.submit(served, {**tree, "date": "day"})["id"] != first["id"]
    client.jobs[first["id"]].status = Status.RUNNING
    assert found.submit(served, tree)["status"] == "RUNNING"
    assert len(client.jobs) == 2


def test_a_run_that_has_ended_is_run_again(batch: Any, served: Served, roots: Any) -> None:
    found, client = batch
    tree = {"input": f"{roots[0]}/a", "output": str(roots[1]), "date": "dt", "key": ["flight"]}
    first = found.submit(served, tree)["id"]
    last = first
    # A night each: more nights than an id had room for once, and an end of every kind.
    for night in range(1, 121):
        client.jobs[last].status = (Status.SUCCEEDED, Status.FAILED, Status.STOPPED)[night % 3]
        last = found.submit(served, tree)["id"]
        assert last == f"{first}-{night}"
        assert found.look(last)["status"] == "PENDING"
    del client.jobs[f"{first}-7"]
    assert found.submit(served, tree)["id"] == last
    assert len(client.entrypoints) == 121


def test_without_a_list_of_jobs_nothing_is_submitted(
    batch: Any, served: Served, roots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, client = batch

    def fails() -> None:
        raise RuntimeError("Request failed with status code 500")

    monkeypatch.setattr(client, "list_jobs", fails)
    with pytest.raises(Refusal, match="did not list its jobs") as caught:
        found.submit(served, {"input": f"{roots[0]}/a", "output": str(roots[1])})
    assert caught.value.status == 503
    assert not client.entrypoints


def test_the_command_gets_the_spec_by_a_pipe(batch: Any, served: Served, roots: Any) -> None:
    found, client = batch
    odd = "x'; touch /tmp/owned; echo '$(id)"
    found.submit(served, {"input": f"{roots[0]}/a", "output": str(roots[1]), "where": odd, "replace": True})
    command = client.entrypoints[0]
    assert shlex.split(command.split(" | ")[-1]) == [
        sys.executable,
        "-m",
        "claydist",
        "score",
        "/dev/stdin",
        "--json",
        "--replace",
    ]
    said = subprocess.run(["bash", "-c", command.rsplit(" | ", 1)[0]], capture_output=True, check=True).stdout
    spec = json.loads(said)
    assert spec["where"] == odd
    assert spec["model"] == "trees:1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": "/etc"}, "not below"),
        ({"output": "/tmp/elsewhere"}, "not below"),
        ({"input": "{in}/../other"}, "without '..'"),
        ({"input": "{in}/*/../../../other"}, "without '..'"),
        ({"input": "{in}x"}, "not below"),
        ({"input": "{in}/%2e%2e/other"}, "'%'"),
        ({"input": "s3://bucket/inside"}, "not below"),
        ({"input": "s3://elsewhere/in"}, "not below"),
        ({"input": ["{in}/a", "{in}/link/b"]}, "not below"),
        ({"model": "other"}, "operator's to say"),
        ({"storage_options": {"endpoint_url": "http://evil"}}, "operator's to say"),
        ({"inputs": "x"}, "the scoring spec is wrong"),
        ({"from": "yesterday"}, "expected a date"),
        ({"replace": "yes"}, "expected true or false"),
    ],
)
def test_what_is_not_allowed_is_refused(
    batch: Any, served: Served, roots: tuple[Path, Path], change: dict[str, Any], text: str
) -> None:
    (roots[0] / "link").symlink_to(roots[0].parent / "other")
    fill = lambda v: v.replace("{in}", str(roots[0])) if isinstance(v, str) else v  # noqa: E731
    change = {k: [fill(i) for i in v] if isinstance(v, list) else fill(v) for k, v in change.items()}
    tree = {"input": f"{roots[0]}/a", "output": f"{roots[1]}/b", **change}
    with pytest.raises(Refusal, match=r"expected|not|operator|wrong") as caught:
        batch[0].submit(served, tree)
    assert caught.value.status == 400
    assert text in caught.value.text
    assert not batch[1].entrypoints


def test_a_run_is_followed_and_stopped(batch: Any, served: Served, roots: Any) -> None:
    found, _client = batch
    job = found.submit(served, {"input": f"{roots[0]}/a", "output": str(roots[1])})["id"]
    assert found.look(job)["status"] == "PENDING"
    assert "result" not in found.look(job)
    assert found.stop(job)["status"] == "STOPPED"
    ended = found.look(job)
    assert ended["result"] == {"model": "trees", "dates": []}
    assert "secret" not in json.dumps(ended)
    for absent in ("claydist-score-00000000000000000000", "raysubmit_abc", "../x", ""):
        with pytest.raises(Refusal) as caught:
            found.look(absent)
        assert caught.value.status == 404


def test_without_roots_or_jobs_api_it_says_so(
    served: Served, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refusal, match="batch scoring is off") as caught:
        BatchJobs(ServeSpec(models=("trees",))).submit(served, {})
    assert caught.value.status == 503

    def absent() -> None:
        raise ConnectionError("it runs without a dashboard")

    monkeypatch.setattr(jobs, "_dashboard_address", absent)
    spec = ServeSpec(
        models=("trees",), batch={"input_roots": ["/a"], "output_roots": ["/b"]}, registry=registry.store.url
    )
    with pytest.raises(Refusal, match="Jobs API") as caught:
        BatchJobs(spec).submit(served, {"input": "/a/x", "output": "/b/x"})
    assert caught.value.status == 503
    assert caught.value.kind == "no_jobs_api"


@pytest.mark.parametrize("error", [OSError("refused"), RuntimeError("Request failed with status code 500: sorry")])
@pytest.mark.parametrize("call", ["get_job_info", "stop_job", "get_job_logs"])
def test_a_dashboard_in_trouble_is_503_and_logs_that_are_gone_are_none(
    batch: Any, served: Served, roots: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, call: str
) -> None:
    found, client = batch
    tree = {"input": f"{roots[0]}/a", "output": str(roots[1]), "date": "dt", "key": ["flight"]}
    job_id = found.submit(served, tree)["id"]

    def fail(job_id: str) -> Any:
        raise error

    monkeypatch.setattr(client, call, fail)
    if call == "get_job_logs":
        client.jobs[job_id].status = Status.FAILED
        assert found.look(job_id)["result"] is None
        return
    with pytest.raises(Refusal, match="does not answer") as refused:
        found.stop(job_id)
    assert refused.value.status == 503


def test_places_are_compared_as_they_are(tmp_path: Path) -> None:
    assert normalised(f"{tmp_path}/a/*/b.parquet") == f"{tmp_path.resolve()}/a/"
    assert normalised("s3://bucket/a/") == "s3://bucket/a/"
    with pytest.raises(Refusal):
        normalised("nosuch://x/y")
