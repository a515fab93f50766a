"""The server as a user starts it: a process with Ray, Serve and HAProxy, asked over real HTTP."""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from asking import ARROW, arrow_stream
from serving_models import boosted, flights, register

from claydist.registry import Registry, load, open_registry
from claydist.serving.settings import Limits
from claydist.values import to_plain

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KEY = f"key-of-the-end-to-end-tests-{os.getpid()}"
TABLE = flights(1000)
_SCRIPT = """
import sys
from claydist import cluster
from claydist.serving import run
from claydist.serving.ingress import choose_ingress
from claydist.serving.settings import Limits
cluster.prepare_environment()
limits = {"json_bytes": 2000000, "request_s": 5.0}
choose_ingress(Limits(**limits))
import ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
run.serve(["m"], registry=sys.argv[1], port=int(sys.argv[2]),
          settings={"poll_s": 0.2, "limits": limits})
"""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    registry: Registry

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **headers})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def replica(self) -> int:
        """The pid of the replica that answers: of all on this machine the one with our key in its environment."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                is_replica = (place / "cmdline").read_bytes().startswith(b"ray::ServeReplica:claydist")
                if is_replica and KEY.encode() in (place / "environ").read_bytes():
                    return int(place.name)
            except OSError:
                continue
        raise AssertionError("no replica runs")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    registry = open_registry(str(folder / "registry"))
    register(registry, "m", boosted(TABLE, rounds=20), TABLE)
    register(registry, "m", boosted(TABLE, rounds=30), TABLE, promote=False)
    port, log = free_port(), folder / "log"
    environment = {**os.environ, "CLAYDIST_API_KEYS": KEY, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", _SCRIPT, registry.store.url, str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    server = Server(process, port, log, registry)
    try:
        wait_for(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(server: Server, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if server.ask("GET", "/v2/health/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(server.log.read_text())


def test_haproxy_gives_a_replica_no_more_than_it_admits(server: Server) -> None:
    environment = Path(f"/proc/{server.replica()}/environ").read_bytes().decode().split("\0")
    (port,) = (line.partition("=")[2] for line in environment if line.startswith("RAY_SERVE_HAPROXY_STATS_PORT="))
    replicas: list[str] = []
    end = time.monotonic() + 60
    while not replicas and time.monotonic() < end:  # Serve's fallback answers until HAProxy knows of the replica
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats;csv", timeout=10) as answer:
            found = list(csv.DictReader(io.StringIO(answer.read().decode())))
        replicas = [row["slim"] for row in found if row["svname"].startswith("SERVE_REPLICA")]
        time.sleep(0.1)
    assert replicas == [str(Limits().queue_requests)]


def rows(server: Server, table: pa.Table) -> bytes:
    plan = load("m:1", server.registry).predictor.plan
    return json.dumps({"rows": to_plain(table, plan)}).encode()


def test_it_says_where_it_listens_and_what_is_open(server: Server) -> None:
    end = time.monotonic() + 30
    while "keys:" not in (said := server.log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    assert f"serving m at http://127.0.0.1:{server.port}" in said
    assert "ingress: haproxy" in said or "for ten times the speed" in said
    assert "keys: needed" in said


def test_all_doors_give_the_bits_of_the_bundle(server: Server) -> None:
    expected = load("m", server.registry).predict(TABLE)
    status, headers, body = server.ask("POST", "/predict/m", rows(server, TABLE))
    assert status == 200, body
    assert json.loads(body)["predictions"] == expected.to_pylist()
    assert len(headers["x-request-id"]) == 36
    status, _, body = server.ask("POST", "/predict/m", arrow_stream(TABLE), **{"Content-Type": ARROW})
    assert status == 200, body
    assert pa.ipc.open_stream(body).read_all().equals(expected)


def test_keys_are_checked_in_the_replica(server: Server) -> None:
    for wrong in ("", "Bearer nobody-knows-me", f"Basic {KEY}"):
        status, headers, body = server.ask("POST", "/predict/m", rows(server, TABLE[:1]), Authorization=wrong)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["kind"] == "unauthorized"
    assert server.ask("GET", "/v2/health/live", Authorization="")[0] == 200


def test_the_ecosystems_client_talks_to_it(server: Server) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    import numpy as np

    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m", headers=headers)
    metadata = client.get_model_metadata("m", headers=headers)
    whole = TABLE.drop_null()[:50]
    plain = to_plain(whole, load("m", server.registry).predictor.plan)
    kinds = {"FP64": np.float64, "INT64": np.int64, "BOOL": np.bool_, "BYTES": np.object_}
    for binary in (True, False):
        inputs = []
        for t in metadata["inputs"]:
            values = np.array([row[t["name"]] for row in plain], kinds[t["datatype"]])
            tensor = triton.InferInput(t["name"], list(values.shape), t["datatype"])
            tensor.set_data_from_numpy(values, binary_data=binary)
            inputs.append(tensor)
        wanted = [triton.InferRequestedOutput(o["name"], binary_data=binary) for o in metadata["outputs"]]
        answer = client.infer("m", inputs, outputs=wanted, request_id="7", headers=dict(headers))  # it adds its own
        expected = load("m", server.registry).predict(whole)
        assert answer.get_response()["id"] == "7"
        assert answer.as_numpy("probability").tolist() == expected["probability"].to_pylist()
        assert answer.as_numpy("prediction").tolist() == expected["prediction"].to_pylist()
    client.close()


def test_a_claimed_gigabyte_is_refused_at_once(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        head = (
            f"POST /predict/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000000000\r\n\r\n"
        )
        raw.sendall(head.encode() + bytes(70_000))  # HAProxy wants 64 KB before it passes a request on
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_headers_of_serve_lift_no_limit(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        head = (
            f"POST /predict/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 200000\r\n"
            "x-request-timeout-seconds: -1\r\nx-request-disconnect-disabled: ?1\r\n\r\n"
        )
        start = time.monotonic()
        raw.sendall(head.encode() + bytes(70_000))
        raw.settimeout(1)
        answer = b""
        while b"}}" not in answer and time.monotonic() - start < 15:
            raw.sendall(b"x")  # whoever goes on sending is not ended by HAProxy
            with contextlib.suppress(TimeoutError):
                answer += raw.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"kind":"timeout"' in answer  # the replica's own limit, and no other's


@pytest.mark.parametrize(
    "header",
    [
        b"x-request-id",
        b"x-request-timeout-seconds",
        b"serve_multiplexed_model_id",
        b"x-session-id",
        b"x-request-disconnect-disabled",
    ],
)
def test_a_header_that_is_no_text_breaks_nothing(server: Server, header: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n" + header + b": \xff\xfe\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


def asking(server: Server, ended: threading.Event, seen: list[tuple[int, str, Any]]) -> None:
    """Ask over one connection until the end; a connection that breaks is status 0."""
    body, connection = rows(server, TABLE[:3]), None
    while not ended.is_set():
        try:
            connection = connection or http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("POST", "/predict/m", body, {"Authorization": f"Bearer {KEY}"})
            answer = connection.getresponse()
            data = answer.read()
        except OSError:
            connection = None
            seen.append((0, "", None))
            continue
        except http.client.HTTPException:
            connection = None
            seen.append((0, "", None))
            continue
        tree = json.loads(data) if answer.status == 200 else {}
        seen.append((answer.status, tree.get("version", ""), tree.get("predictions")))


def test_no_request_fails_while_versions_move(server: Server) -> None:
    expected = {str(v): load(f"m:{v}", server.registry).predict(TABLE[:3]).to_pylist() for v in (1, 2)}
    seen: list[tuple[int, str, Any]] = []
    ended = threading.Event()
    threads = [threading.Thread(target=asking, args=(server, ended, seen)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in (2, 1, 2, 1):
        server.registry.promote("m", version)
        time.sleep(1.0)
    ended.set()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in seen} == {200}
    assert {version for _, version, _ in seen} == {"1", "2"}
    assert all(predictions == expected[version] for _, version, predictions in seen)


def test_a_killed_replica_comes_back(server: Server) -> None:
    before = server.replica()
    os.kill(before, signal.SIGKILL)
    wait_for(server)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if server.ask("POST", "/predict/m", rows(server, TABLE[:1]))[0] == 200:
            break
        time.sleep(0.1)
    assert server.replica() != before
    assert server.ask("POST", "/predict/m", rows(server, TABLE[:1]))[0] == 200
