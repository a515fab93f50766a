from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from claydist.cli import app
from claydist.errors import ClusterError, SpecError
from claydist.registry import Registry
from claydist.serving import run
from claydist.serving.ingress import Ingress
from claydist.serving.settings import ServeSpec
from claydist.specfile import load_spec

ROOT = Path(__file__).parents[2]


def settings(registry: Registry, host: str = "127.0.0.1", **given: object) -> ServeSpec:
    asked: dict[str, object] = {"registry": registry.store.url, "replicas": 1, "keys_file": None, **given}
    return run.checked(["trees"], host=host, **asked)  # type: ignore[arg-type]


def test_without_keys_only_loopback_is_taken(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CLAYDIST_API_KEYS", raising=False)
    for host in run.LOOPBACK:
        assert not settings(registry, host).require_keys
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(SpecError, match="reachable from elsewhere"):
            settings(registry, host)
    (tmp_path / "keys").write_text("a-long-enough-key\n")
    monkeypatch.chdir(tmp_path)
    spec = settings(registry, "0.0.0.0", keys_file="keys")
    assert spec.require_keys
    assert spec.keys_file == str(tmp_path / "keys")
    monkeypatch.setenv("CLAYDIST_API_KEYS", "another-key-01")
    assert settings(registry, "0.0.0.0").require_keys


def test_settings_of_the_command_and_the_file_meet(registry: Registry) -> None:
    spec = settings(registry, settings={"limits": {"rows": 7}}, replicas=3)
    assert (spec.limits.rows, spec.replicas, spec.registry) == (7, 3, registry.store.url)
    with pytest.raises(SpecError) as caught:
        settings(registry, settings={"limit": {}, "poll_s": 0})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("settings", [{"keys_file": 12345}, {"registry": 5}, {"limits": 3}])
def test_settings_of_a_wrong_type_are_problems_of_the_spec(registry: Registry, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as wrong:
        run.checked(["trees"], registry=None, host="127.0.0.1", replicas=None, keys_file=None, settings=settings)
    assert next(iter(settings)) in str(wrong.value.problems)


def test_replicas_of_the_file_hold_until_the_command_gives_some(registry: Registry) -> None:
    file = {"replicas": 4}
    assert settings(registry, settings=file, replicas=None).replicas == 4
    assert settings(registry, settings=file, replicas=2).replicas == 2
    assert settings(registry, replicas=None).replicas == 1


def http_options(host: str | None = "127.0.0.1") -> Any:
    from ray.serve.config import HTTPOptions

    return HTTPOptions(host=host, port=8000)


def app_of(name: str, status: str = "RUNNING", route: str = "/") -> dict[str, Any]:
    return {name: {"status": status, "route_prefix": route}}


@pytest.mark.parametrize(("host", "has_keys", "applications", "said"), [
    ("127.0.0.1", False, {}, None), ("0.0.0.0", True, {}, None), ("::1", False, app_of("other", route="/other"), None),
    ("127.0.0.1", False, app_of("claydist", "DEPLOY_FAILED"), None),
    ("127.0.0.1", False, app_of("claydist", "DELETING"), None),
    ("0.0.0.0", False, {}, "listens on 0.0.0.0, whatever --host says"), ("192.0.2.1", False, {}, "no keys"),
    (None, True, {}, "does not listen"),
    ("127.0.0.1", True, app_of("claydist", route="/elsewhere"), "has application 'claydist' at route /elsewhere"),
    ("127.0.0.1", True, app_of("claydist", "DEPLOYING"), "would replace"),
    ("127.0.0.1", True, app_of("other"), "has application 'other' at route /"),
])  # fmt: skip
def test_a_serve_that_runs_is_joined_only_where_it_is_safe(
    host: str | None, has_keys: bool, applications: dict[str, Any], said: str | None
) -> None:
    spec = ServeSpec(models=("trees",), require_keys=has_keys)
    if said is None:
        run._check_running(spec, http_options(host), applications)
    else:
        with pytest.raises((ClusterError, SpecError), match=said):
            run._check_running(spec, http_options(host), applications)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Serve that does nothing; whether one ran `before`, its applications, and what was `done` to it."""
    from ray import serve
    from ray.serve import context

    its = SimpleNamespace(before=None, started=None, applications={}, done=[])

    def start(http_options: Any) -> None:
        its.started = its.before or http_options

    def client(raise_if_no_controller_running: bool = True) -> Any:
        config = its.started or its.before
        details = {"applications": its.applications}
        return config and SimpleNamespace(http_config=config, get_serve_details=lambda: details)

    monkeypatch.setattr(context, "_get_global_client", client)
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(serve, "run", lambda *_, name, **__: its.applications.update(app_of(name)))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=its.applications))
    monkeypatch.setattr(run, "_end_serve", lambda: its.done.append("shutdown"))
    monkeypatch.setattr(serve, "delete", its.done.append)
    return its


@pytest.mark.parametrize(("ran_before", "others", "is_ours", "done"), [
    (False, {}, False, ["shutdown"]), (False, app_of("other", route="/other"), False, ["claydist"]),
    (True, {}, False, ["claydist"]), (False, {}, True, []),
])  # fmt: skip
def test_a_joined_cluster_is_left_as_it_was_found(
    calls: SimpleNamespace, ran_before: bool, others: dict[str, Any], is_ours: bool, done: list[str]
) -> None:
    calls.before = http_options("0.0.0.0") if ran_before else None
    spec = ServeSpec(models=("trees",), require_keys=True)
    with run._application(spec, "127.0.0.1", 9000, {}, is_ours=is_ours) as http:
        calls.applications.update(others)
        assert (http.host, http.port) == (("0.0.0.0", 8000) if ran_before else ("127.0.0.1", 9000))
    assert calls.done == done


def test_an_application_that_was_refused_or_failed_leaves_nothing(
    calls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    def fail(*_: Any, **__: Any) -> None:
        raise RayServeException("a line\nthe last line\n")

    calls.before = http_options("0.0.0.0")
    with pytest.raises(SpecError, match="whatever --host says"):
        run._application(ServeSpec(models=("trees",)), "127.0.0.1", 8000, {}, is_ours=False).__enter__()
    assert (calls.done, calls.applications) == ([], {})
    calls.before = None
    monkeypatch.setattr(serve, "run", fail)
    with pytest.raises(ClusterError, match="Serve does not start: the last line"):
        run._application(ServeSpec(models=("trees",)), "127.0.0.1", 8000, {}, is_ours=False).__enter__()
    assert calls.done == ["shutdown"]


def test_where_it_listens_is_said_as_it_is() -> None:
    spec = ServeSpec(models=("trees",), require_keys=True)
    asked = list(run._announcement(spec, "http://127.0.0.1:8000", Ingress("python"), stays=False))
    other = list(run._announcement(spec, "http://0.0.0.0:8000", Ingress("python"), stays=True))
    assert not any("ran before" in line for line in asked)
    assert "not what was asked for" in other[-1]


def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{port}"):
            run._check_port("127.0.0.1", port)


def test_a_model_that_is_not_there_stops_it_before_ray(registry: Registry) -> None:
    from claydist.errors import RegistryError

    with pytest.raises(RegistryError, match="no model 'absent'"):
        run.serve(["absent"], registry=registry.store.url, stop=threading.Event())


def test_the_deployed_config_is_one_that_is_taken() -> None:
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config = ServeDeploySchema.model_validate(tree)
    (application,) = config.applications
    assert application.import_path == "claydist.serving:app"
    load_spec(ServeSpec, application.args)


def test_importing_the_package_imports_neither_ray_nor_a_model() -> None:
    code = "import sys, claydist.serving; print([m for m in ('ray', 'xgboost', 'pandas') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_the_builder_gives_an_application(registry: Registry) -> None:
    from claydist.serving import app as serving_app

    built = serving_app({"models": "trees", "registry": registry.store.url, "autoscaling": {"max_replicas": 3}})
    assert type(built).__name__ == "Application"
    with pytest.raises(SpecError, match="1 problem"):
        serving_app({"model": "trees", "models": "trees"})


def test_a_certificate_and_its_key_go_together(tmp_path: Path) -> None:
    cert, key, other = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "other.pem"
    assert run.tls_options(None, None) == {}
    for given in ((cert, None), (None, key)):
        with pytest.raises(SpecError, match="go together"):
            run.tls_options(*given)
    with pytest.raises(SpecError, match=r"cert\.pem.*expected a certificate"):
        run.tls_options(cert, key)
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    for to in (other, key):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", to]
        subprocess.run([*command, "-out", cert], check=True, capture_output=True)
    assert run.tls_options(cert, key) == {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    with pytest.raises(SpecError, match="expected a certificate"):
        run.tls_options(cert, other)
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:secret", "-in", key, "-out", other]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SpecError, match="not encrypted"):
        run.tls_options(cert, other)


def test_the_command_hands_on_its_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(run, "serve", lambda refs, **options: asked.update(options) or {})
    monkeypatch.setattr(run, "tls_options", lambda cert, key: {"ssl_certfile": str(cert), "ssl_keyfile": str(key)})
    command = ["serve", "m", "--tls-cert", str(tmp_path / "c"), "--tls-key", str(tmp_path / "k"), "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert asked["tls"] == {"ssl_certfile": str(tmp_path / "c"), "ssl_keyfile": str(tmp_path / "k")}
