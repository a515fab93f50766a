"""`ray job submit` of jobs/train.py to a cluster of two CPUs that asks for a token, and what that cluster refuses."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.tables import cut, make_table, spec_of, write_files

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


class Cluster:
    """A head that was started for these tests: how to reach it, and commands with its token."""

    def __init__(self, folder: Path) -> None:
        self.port, self.dashboard = _free_port(), _free_port()
        self.token = secrets.token_hex(32)
        token = folder / "token"
        token.write_text(self.token)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        # Ports that another head on this machine may hold by default.
        ports = [f"--{name}={_free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
        # Without --block Ray leaves its processes to themselves, and then only `ray stop` finds them.
        self._head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--node-ip-address=127.0.0.1",
             f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={folder / 'ray'}",
             *ports, "--disable-usage-stats"],
            env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]], env={**self.env, **env}, cwd=ROOT, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of jobs/train.py, waited for."""
        environment = json.dumps({"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
        return self.run(
            "ray", "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", "--working-dir",
            str(ROOT / "jobs"), "--runtime-env-json", environment, "--", sys.executable, "train.py", *arguments,
        )  # fmt: skip

    def wait(self) -> None:
        """Return once the cluster takes jobs: its agent comes up seconds after its dashboard."""
        deadline = time.monotonic() + 120
        url = f"http://127.0.0.1:{self.dashboard}/api/jobs/"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        while time.monotonic() < deadline:
            assert self._head.poll() is None, "the head ended"
            asked = Request(url, json.dumps({"entrypoint": "true"}).encode(), headers)
            try:
                with urlopen(asked, timeout=30):
                    return
            except (URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError("the head did not come up")

    def stop(self) -> None:
        """End the processes of this head's session and no others."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in _session(self._head.pid):
                os.kill(pid, sign)
            try:
                self._head.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue
            if not _session(self._head.pid):
                return


def _session(leader: int) -> list[int]:
    """Ids of the processes of a session that was started here."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, *_, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: the path of a Ray socket has at most 107 characters.
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True) as folder:
        head = Cluster(Path(folder))
        try:
            head.wait()
            yield head
        finally:
            head.stop()


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
    done = cluster.submit(str(spec), "--set", "train.workers=2", "--set", "train.cpus_per_worker=1", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    tree = find_json(done.stdout)
    assert (tree["version"], tree["workers"], tree["promoted"]) == (1, 2, True)
    assert (tmp_path / "registry" / "parcels" / "1" / "manifest.json").is_file()


def test_a_job_with_a_bad_spec_fails_with_our_message(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    spec.write_text(spec.read_text().replace("rounds:", "rouns:"))
    done = cluster.submit(str(spec), "--json")
    assert done.returncode == 1
    assert "failed" in done.stdout
    assert find_json(done.stdout)["error"]["problems"] == ["model.rouns: unknown key; did you mean 'rounds'?"]
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "registry").exists()


def test_a_job_refuses_relative_paths(cluster: Cluster, spec: Path, tmp_path: Path) -> None:
    done = cluster.submit(str(spec), "--set", "data.path=data", "--json")
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
