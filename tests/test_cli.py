"""Commands: exit codes, one JSON object on stdout, help with examples, README and schema that agree with the code."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import TypeAdapter

import claydist
from claydist import pipeline
from claydist.cli import app, main
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec
from tests.checks import run_job
from tests.tables import cut, make_table, spec_of, write_files

ROOT = Path(__file__).parent.parent
TRAIN_KEYS = {
    "model", "version", "uri", "task", "rows", "metrics", "goals", "promoted", "workers", "threads", "restarts",
    "seconds", "peak_mb",
}  # fmt: skip
COMMANDS = ("quickstart", "plan", "train", "evaluate", "score", "serve", "models", "runs", "report")
MODELS = ("list", "show", "promote", "rollback", "history", "verify")


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    children = getattr(command, "commands", None)
    if not children:
        yield path, command
        return
    for name, child in children.items():
        yield from leaves(child, (*path, name))


LEAVES = dict(leaves(typer.main.get_command(app)))


def run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    """Exit code, what stdout holds as JSON, and stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert out.count("\n") == 1, "one object on one line, nothing else"
    assert isinstance(ended.value.code, int)
    return ended.value.code, json.loads(out), err


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A good spec, trained by processes of the tests instead of Ray Train."""
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    write_files(tmp_path / "data", cut(make_table(0, 400), 2))
    return spec_of(tmp_path / "data", tmp_path / "registry", split={"test": {"fraction": 0.2}})


def write(spec: dict[str, Any], folder: Path) -> str:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, allow_unicode=True))
    return str(path)


@pytest.mark.ray
def test_train_gives_the_promised_object_and_0(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec["goals"] = [{"metric": "auc", "at_least": 0.5}, {"metric": "logloss", "at_most": 9, "slice": "km > 100"}]
    code, tree, err = run(["train", write(spec, tmp_path), "--json"], capfd)
    assert code == 0
    assert set(tree) >= TRAIN_KEYS
    assert (tree["model"], tree["version"], tree["task"], tree["promoted"]) == ("parcels", 1, "binary", True)
    assert tree["rows"]["valid"] == 0
    assert tree["rows"]["train"] + tree["rows"]["test"] == 400
    assert set(tree["metrics"]) >= {"test", "baseline"}
    assert [g["bound"] for g in tree["goals"]] == ["at_least", "at_most"]
    for goal in tree["goals"]:
        assert set(goal) == {"metric", "bound", "target", "value", "met", "slice", "on"}
        assert (goal["met"], goal["on"]) == (True, "test")
    assert Path(tree["uri"]).is_dir()
    assert tree["peak_mb"] > 0
    assert "training" in err


@pytest.mark.ray
def test_a_missed_goal_is_3_registered_and_not_promoted(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec["goals"] = [{"metric": "auc", "at_least": 0.999}]
    code, tree, _ = run(["train", write(spec, tmp_path), "--json"], capfd)
    assert code == 3
    assert (tree["version"], tree["promoted"], tree["goals"][0]["met"]) == (1, False, False)
    registry = ["--registry", spec["registry"], "--json"]
    assert run(["models", "list", *registry], capfd)[1]["models"] == [
        {"model": "parcels", "versions": [1], "champion": None}
    ]
    code, tree, _ = run(["models", "show", "parcels", *registry], capfd)
    assert code == 1
    assert "no champion" in tree["error"]["message"]


@pytest.mark.ray
def test_overrides_reach_the_model_and_no_promote_leaves_it_to_a_person(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(spec, tmp_path)
    other = str(tmp_path / "elsewhere")
    code, tree, _ = run(
        ["train", path, "--set", "model.rounds=2", "--no-promote", "--json", "--registry", other], capfd
    )
    assert (code, tree["promoted"]) == (0, False)
    assert tree["uri"].startswith(other)
    assert not Path(spec["registry"]).exists()
    _, shown, _ = run(["models", "show", "parcels:1", "--registry", other, "--json"], capfd)
    assert shown["spec"]["model"]["rounds"] == 2


@pytest.mark.ray
def test_a_version_lives_through_all_commands(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(spec, tmp_path)
    first = run(["train", path, "--json"], capfd)[1]
    second = run(["train", path, "--set", "model.rounds=1", "--json"], capfd)[1]
    assert (first["promoted"], second["promoted"]) == (True, False), "one round is worse than five"
    registry = ["--registry", spec["registry"], "--json"]
    _, judged, err = run(["evaluate", "parcels", "--data", spec["data"]["path"], "--where", "km > 50",
                          "--slice", "express = true", "--log-json", *registry], capfd)  # fmt: skip
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [e["stage"] for e in events if e["event"] == "stage"] == ["inventory", "statistics", "evaluation"]
    assert "statistics" in {e["stage"] for e in events if e["event"] == "progress"}
    assert {"model", "version", "rows", "metrics", "slices"} <= set(judged)
    assert judged["version"] == 1
    assert 0 < judged["slices"]["express = true"]["rows"] < judged["rows"] < 400
    _, move, _ = run(["models", "promote", "parcels:2", "--why", "ходить", *registry], capfd)
    assert (move["from"], move["to"], move["why"]) == (1, 2, "ходить")
    _, back, _ = run(["models", "rollback", "parcels", *registry], capfd)
    assert back["to"] == 1
    _, history, _ = run(["models", "history", "parcels", *registry], capfd)
    assert [m["to"] for m in history["history"]] == [1, 2, 1]
    assert run(["models", "verify", "parcels@champion", *registry], capfd)[1]["verified"] is True
    _, report, _ = run(["report", "parcels", *registry], capfd)
    assert Path(report["report"]).read_text().lstrip().lower().startswith("<!doctype html")
    _, runs, _ = run(["runs", "list", *registry], capfd)
    assert [r["state"] for r in runs["runs"]] == ["finished", "finished"]
    _, shown, _ = run(["runs", "show", runs["runs"][0]["id"], *registry], capfd)
    assert shown["version"] == 1


@pytest.mark.ray
def test_text_for_a_person_goes_to_stdout_and_progress_to_stderr(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", write(spec, tmp_path)])
    out, err = capfd.readouterr()
    assert ended.value.code == 0
    assert "parcels:1" in out
    assert "logloss" in out
    assert "training" not in out
    assert "training" in err


@pytest.mark.ray
def test_plan_shows_what_training_would_do_and_writes_nothing(
    spec: dict[str, Any], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, tree, _ = run(["plan", write(spec, tmp_path), "--set", "train.workers=2", "--json"], capfd)
    assert code == 0
    assert (tree["workers"], sum(tree["shards"]), tree["input"]["files"]) == (2, 400, 2)
    assert tree["features"]["city"] == "categorical"
    assert (tree["registry"], tree["champion"]) == (spec["registry"], None)
    assert tree["memory_mb_per_worker"] > 0
    assert not Path(spec["registry"]).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_of_its_own_ends_with_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: x\n")
    command = [sys.executable, "-m", "claydist", "train", "spec.yaml", "--json"]
    if not (ROOT / "claydist" / "__main__.py").exists():
        command[1:3] = [str(Path(sys.executable).parent / "claydist")]
        command = command[1:]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 2
    assert [p.partition(":")[0] for p in json.loads(done.stdout)["error"]["problems"]] == ["data", "model"]
    assert "Traceback" not in done.stderr
    assert "ray" not in done.stderr.lower(), "a spec that is wrong by itself needs no cluster"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"claydist {claydist.__version__}\n")


@pytest.mark.parametrize("given", [[], ["models"], ["runs"]])
def test_a_group_of_commands_alone_prints_its_help_and_no_error(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert "Usage" in out + err
    assert "error:" not in err


@pytest.mark.parametrize("name", ["train", "score", "evaluate"])
def test_the_example_of_a_job_is_a_command_that_a_job_takes(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "jobs" / f"{name}.py").read_text())) or ""
    line = next(part for part in text.split("\n\n") if "ray job submit" in part).replace("\\\n", " ")
    folder, command = re.fullmatch(r"\s*ray job submit --working-dir (\S+) -- python (.*)", line, re.DOTALL).groups()
    script, *arguments = command.split()
    assert script == f"{name}.py"
    assert (ROOT / folder / script).exists()
    given = typer.main.get_command(app).commands[name].make_context(name, list(arguments)).params
    assert given["registry"].startswith("s3://")
    if name != "evaluate":
        kind, keys = {"train": (TrainSpec, ("data", "path")), "score": (ScoreSpec, ("input",))}[name]
        spec = load_spec(kind, ROOT / folder / given["spec"], given["sets"])
        places = spec
        for key in keys:
            places = getattr(places, key)
        assert all(place.startswith("s3://") for place in places), "relative paths are refused in a job"
        assert spec.registry is None, "it would come before CLAYDIST_REGISTRY"


def test_every_command_of_the_design_that_exists_is_found() -> None:
    found = {path[0] for path in LEAVES}
    assert found <= set(COMMANDS)
    assert {"quickstart", "plan", "train", "evaluate", "models", "runs", "report"} <= found
    assert {path[1] for path in LEAVES if path[0] == "models"} == set(MODELS)
    assert {path[1] for path in LEAVES if path[0] == "runs"} == {"list", "show"}


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_of_every_command_has_an_example_and_json(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert ended.value.code == 0
    assert f"claydist {' '.join(path)}" in text.partition("Example")[2]
    assert "--json" in text
    names = {option for parameter in LEAVES[path].params for option in parameter.opts}
    if path != ("quickstart",):
        assert "--registry" in names
    if path[0] not in ("models", "runs", "report"):
        assert {"--address", "--verbose"} <= names


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_is_in_the_readme(path: tuple[str, ...]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"claydist {' '.join(path)}" in text


@pytest.mark.parametrize(("given", "replicas"), [([], None), (["--replicas", "3"], 3)])
def test_serve_leaves_replicas_to_its_config_unless_given(
    given: list[str], replicas: int | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    from claydist.serving import run as serving

    (tmp_path / "serve.yaml").write_text("replicas: 2\n")
    monkeypatch.setattr(serving, "serve", lambda refs, **given: {"models": refs, **given})
    code, tree, _ = run(["serve", "m", "--config", str(tmp_path / "serve.yaml"), "--json", *given], capfd)
    assert (code, tree["replicas"], tree["settings"]) == (0, replicas, {"replicas": 2})


def test_schema_describes_every_key_and_takes_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--schema"])
    assert ended.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    jobs = []
    for file in sorted((ROOT / "jobs").glob("*.yaml")):
        tree = yaml.safe_load(file.read_text())
        if "kind" in tree.get("model", {}):
            validator(schema).validate(tree)
            TypeAdapter(TrainSpec).validate_python(tree)
            jobs.append(tree["name"])
    assert len(jobs) >= 4
    bad = {"name": "x", "data": {"path": "x", "label": "y"}, "model": {"kind": "xgboost", "rouns": 3}}
    assert not validator(schema).is_valid(bad)
    parts = [schema, *schema["$defs"].values()]
    described = [key for part in parts for key, value in part.get("properties", {}).items() if value.get("description")]
    everything = [key for part in parts for key in part.get("properties", {})]
    assert len(everything) > 40
    assert described == everything


def test_the_package_has_its_doors() -> None:
    import claydist

    for name in claydist.__all__:
        assert callable(getattr(claydist, name))
        __import__("claydist.training")  # a subpackage of the same name would replace the function
        assert callable(getattr(claydist, name))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        claydist.trian  # noqa: B018
