from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from claydist import cluster, pipeline
from claydist.cli import main
from claydist.display import Silent
from claydist.errors import DataError
from claydist.registry import open_registry
from claydist.runs import RESUMABLE_S, clean_runs, find_unfinished, list_runs, public_spec, spec_digest, start_run
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec
from tests.scoring.support import Loop, make_registry, make_spec, run_score, write_days


def train_spec(**data: Any) -> TrainSpec:
    tree = {"path": "in.parquet", "label": "y", "storage_options": {"token": "hunter2"}, **data}
    apart = {"path": ["sftp://me:hunter2@h/v", "plain/v"]}
    return load_spec(TrainSpec, {"name": "m", "data": tree, "model": {"kind": "linear"}, "split": {"valid": apart}})


def test_no_credential_is_written_down() -> None:
    signed = "https://acct.blob.core.windows.net/c/x.parquet?sig=hunter2"
    spec = train_spec(path=[signed, "abfss://raw@acct/t", "data/a?.parquet"])
    run = start_run(open_registry("memory://runs-secrets"), "train", spec, spec.name, "x")
    tree = run.store.join("run.json").read_json()["spec"]
    assert "hunter2" not in run.store.join("run.json").read().decode()
    assert tree == public_spec(spec)
    assert tree["data"]["path"] == [signed.replace("sig=hunter2", "***"), "abfss://raw@acct/t", "data/a?.parquet"]
    assert tree["split"]["valid"]["path"] == ["sftp://***@h/v", "plain/v"]
    places = {name: f"https://me:hunter2@h/{name}?sig=hunter2" for name in ("input", "output", "registry", "model")}
    public = public_spec(load_spec(ScoreSpec, places))
    assert "hunter2" not in json.dumps(public)
    assert public["input"] == ["https://***@h/input?***"]


def test_urls_in_labels_and_expressions_are_values_of_rows() -> None:
    where, label = "page = 'https://h/x?id=1'", {"column": "y", "positive": "https://h/x?id=1"}
    data = public_spec(train_spec(where=where, label=label))["data"]
    assert (data["where"], data["label"]["positive"]) == (where, "https://h/x?id=1")
    assert spec_digest(train_spec(where=where)) != spec_digest(train_spec(where=where.replace("1", "2")))


def test_a_url_that_is_signed_anew_is_the_same_spec() -> None:
    digests = {spec_digest(train_spec(path=f"https://h/x.parquet?sig={sig}")) for sig in ("one", "two")}
    assert len(digests) == 1
    assert digests != {spec_digest(train_spec(path="https://h/y.parquet?sig=one"))}


def test_a_scoring_run_says_its_stage_and_its_inventory(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    seen = []

    class Looks(Loop):
        def map(self, function: Callable[..., Any], items: Any, on_done: Any = None) -> list[Any]:
            seen.append(list_runs(registry)[-1].facts["stage"])
            return super().map(function, items, on_done)

    run_score(make_spec(tmp_path), registry, work=Looks())
    assert seen == ["score"]
    (run,) = list_runs(registry)
    assert (run.state, run.facts["stage"], len(run.facts["inventory"])) == ("finished", "clean", 64)


def test_a_scoring_that_fails_at_its_input_is_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    run_score(make_spec(tmp_path), registry)
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(DataError, match="expected Parquet"):
        run_score(make_spec(tmp_path), registry)
    good, bad = list_runs(registry)
    assert (bad.state, bad.facts["stage"], bad.facts["inventory"]) == ("failed", "plan", None)
    with pytest.raises(SystemExit):
        main(["runs", "list", "--registry", str(tmp_path / "registry")])
    header, first, second, error = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "kind", "state", "stage", "started", "inventory"]
    started = good.facts["started_at"]
    assert first.split() == [
        good.run_id, "score", "finished", "clean", started[:10], started[11:16], good.facts["inventory"][:8]
    ]  # fmt: skip
    assert second.split()[:4] == [bad.run_id, "score", "failed", "plan"]
    assert error.strip().startswith("DataError: expected Parquet")
    with pytest.raises(SystemExit):
        main(["runs", "list", "--json", "--registry", str(tmp_path / "registry")])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["kind"] for row in rows] == ["score", "score"]
    assert [row["inventory"] for row in rows] == [good.facts["inventory"], None]


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_that_fails_at_its_input_is_a_failed_run_that_nobody_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    monkeypatch.setattr(pipeline, "plan_workers", lambda _: cluster.Layout(1, 1))
    monkeypatch.setattr(cluster, "living_nodes", lambda: [])
    spec = train_spec(path=str(tmp_path / "absent"), storage_options={})
    registry = open_registry(str(tmp_path / "registry"))
    with pytest.raises(DataError, match="expected Parquet"):
        pipeline.train(spec, registry, Silent(), resume=resume)
    (run,) = list_runs(registry)
    assert (run.state, run.facts["stage"]) == ("failed", "inventory")
    assert "expected Parquet" in run.facts["error"]
    assert find_unfinished(registry, "train", spec_digest(spec), "x") is None


def test_errors_are_lines_of_the_log_and_the_json_that_says_why_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("claydist.cli._ray", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(pipeline, "plan_workers", lambda _: cluster.Layout(1, 1))
    monkeypatch.setattr(cluster, "living_nodes", lambda: [])
    spec = {"name": "m", "data": {"path": str(tmp_path / "absent"), "label": "y"}, "model": {"kind": "linear"}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    arguments = ["train", str(tmp_path / "spec.yaml"), "--registry", str(tmp_path / "registry"), "--json"]
    monkeypatch.setattr("sys.stderr", sys.stdout)  # as in the log of a Ray job
    for more in ([], ["--log-json"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *more])
        assert ended.value.code == 1
        *lines, last = capsys.readouterr().out.splitlines()
        assert json.loads(last)["error"]["kind"] == "DataError"
        assert any(line.startswith("error: expected Parquet") for line in lines) == (not more)
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["run", "stage", "error", "end"]
    assert (events[2]["kind"], events[2]["stage"], events[2]["problems"]) == ("DataError", "inventory", [])
    assert {event["run"] for event in events} == {list_runs(open_registry(str(tmp_path / "registry")))[-1].run_id}
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "no.yaml"), "--log-json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["event"], event["stage"]) for event in events] == [("error", None), ("end", None)]


def test_what_a_run_could_be_resumed_from_is_kept_for_two_weeks(tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "registry"))
    spec = train_spec()

    def left(state: str, days: float, **facts: Any) -> str:
        run = start_run(registry, "train", spec, spec.name, "x").update(state=state, **facts)
        run.store.join("checkpoint.json").write(b"{}")
        then = datetime.now(UTC) - timedelta(days=days)
        run.store.join("run.json").write(json.dumps({**run.facts, "updated_at": then.isoformat()}).encode())
        return run.run_id

    gone = "gone/boot/pid:[1]"
    old = {left("failed", 15), left("interrupted", 20), left("running", 15, host=gone)}
    young = {left("failed", 13), left("running", 1, host=gone), left("running", 15)}  # the last is this process
    clean_runs(registry)
    runs = {run.run_id: run for run in list_runs(registry)}
    assert set(runs) == old | young
    assert {name for name, run in runs.items() if run.store.join("checkpoint.json").exists()} == young
    assert RESUMABLE_S == 14 * 86400


def test_caches_that_killed_drivers_left_are_removed_with_the_own_one(tmp_path: Path) -> None:
    names = ["claydist-20260101T000000-a-1a2b3c", "claydist-20260102T000000-b-1a2b3c", "claydist-benchmark", "other"]
    for name in names:
        (tmp_path / name).mkdir()
    for name in (names[1], *names[2:]):
        os.utime(tmp_path / name, (0, 0))
    young = tmp_path / "claydist-20260103T000000-c-1a2b3c"
    young.mkdir()
    pipeline._remove_cache(str(tmp_path / names[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "claydist-benchmark", "other"]
