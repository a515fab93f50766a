"""Clusters of `ray start` for tests and benchmarks: a head that asks for a token, and further nodes on this machine.

Every process is started in a session of its own and ended by its id: `ray stop` would end other people's clusters too.
"""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


class Cluster:
    """A head that was started here: how to reach it, and commands with its token."""

    def __init__(self, folder: Path, *, n_cpus: int = 2) -> None:
        self._folder = folder
        self.port, self.dashboard = _free_port(), _free_port()
        self.token = secrets.token_hex(32)
        token = folder / "token"
        token.write_text(self.token)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head", f"--num-cpus={n_cpus}", f"--port={self.port}", f"--dashboard-port={self.dashboard}",
            f"--temp-dir={folder / 'ray'}", f"--ray-client-server-port={_free_port()}",
        )  # fmt: skip

    @property
    def jobs_url(self) -> str:
        """Where `ray job` finds it."""
        return f"http://127.0.0.1:{self.dashboard}"

    def add_node(self, *, n_cpus: int = 1) -> None:
        """Start another raylet that joins the head."""
        self._start(f"--num-cpus={n_cpus}", f"--address=127.0.0.1:{self.port}")

    def _start(self, *arguments: str) -> None:
        # Another head on this machine may hold the agent's default port. Without --block Ray leaves its processes to
        # themselves, and then only `ray stop` finds them.
        command = [
            BIN / "ray", "start", "--block", "--num-gpus=0", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={_free_port()}", *arguments,
        ]  # fmt: skip
        self._nodes.append(
            subprocess.Popen(
                command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
        )

    def run(self, *command: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of this environment, with the cluster's token, from the project's folder."""
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]], env={**self.env, **env}, cwd=ROOT, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def submit(self, job: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a script of jobs/, waited for unless the options say otherwise."""
        environment = json.dumps({"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
        return self.run(
            "ray", "job", "submit", "--address", self.jobs_url, "--working-dir", str(ROOT / "jobs"),
            "--runtime-env-json", environment, *options, "--", sys.executable, job, *arguments, timeout=600,
        )  # fmt: skip

    def wait(self) -> None:
        """Return once the cluster takes jobs: its agent comes up seconds after its dashboard."""
        deadline = time.monotonic() + 120
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        while time.monotonic() < deadline:
            assert self._nodes[0].poll() is None, "the head ended"
            asked = Request(f"{self.jobs_url}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), headers)
            try:
                with urlopen(asked, timeout=30):
                    return
            except (URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError("the head did not come up")

    def stop(self) -> None:
        """End the processes of the nodes' sessions and no others."""
        for node in reversed(self._nodes):
            _end(node)


def _end(node: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in _session(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        try:
            node.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        if not _session(node.pid):
            return


@contextmanager
def cluster_of_jobs(*, n_cpus: int = 2) -> Iterator[Cluster]:
    """A head that takes jobs, for the length of the block."""
    # Not pytest's folder: the path of a Ray socket has at most 107 characters.
    with TemporaryDirectory(prefix="cd-", ignore_cleanup_errors=True) as folder:
        head = Cluster(Path(folder), n_cpus=n_cpus)
        try:
            head.wait()
            yield head
        finally:
            head.stop()


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
