"""A server under load while versions move, after its replica is killed, and asked four times what it can do.

    uv run python -m tests.benchmarks.serve_load [--seconds 20]

Needs `wrk`. Prints one JSON object: requests, failures and answers that do not fit the version they name while wrk asks
without a pause and the champion is moved there and back; seconds until a killed replica answers again; and for a paced
generator at four times the measured rate, with large, middling and one-row bodies, the answers by status, the longest
accepted request by the client's clock and by the server's own (its access log), the client's own lag, and memory over
time, until some seconds after the end. The generator has the same two cores: what the client's clock has above the
server's is its own lag, and the way of the connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import xgboost as xgb

from claydist.bundle import golden_rows, write_bundle
from claydist.models import XGBoostModel
from claydist.predictor import Predictor
from claydist.registry import Registry, load, open_registry
from tests.benchmarks.serve import KEY, NAMES, features, make_model, wait_for

ROWS_OF_LOAD, OVERLOAD, OVERLOAD_S, AFTER_S, WATCH_S = (500, 60, 1), 4, 20, 10, 2.0
_TICK_S = 0.02
MAX_OPEN = 4_000  # connections of the generator; without a bound it runs out of open files, and so fails by itself
_HEAD = (
    f"POST /predict/bench HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    f"Content-Type: application/json\r\nContent-Length: "
).encode()
_LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {key}"
wrk.body = [==[{body}]==]
local threads = {{}}
function setup(thread) table.insert(threads, thread) end
function init() failed = 0; mixed = 0; first = 0; second = 0 end
function response(status, headers, body)
  if status ~= 200 then failed = failed + 1; return end
  local version = tonumber(body:match('"version":"?(%d+)'))
  local p = body:match('"probability":([%d.eE+-]+)')
  if version == 1 then first = first + 1 else second = second + 1 end
  if p ~= ({{"{p1}", "{p2}"}})[version] then mixed = mixed + 1 end
end
function done(summary, latency, requests)
  local f, m, a, b = 0, 0, 0, 0
  for _, t in ipairs(threads) do
    f = f + t:get("failed"); m = m + t:get("mixed"); a = a + t:get("first"); b = b + t:get("second")
  end
  local e = summary.errors
  print(string.format("FOUND failed=%d mixed=%d first=%d second=%d socket=%d", f, m, a, b,
        e.connect + e.read + e.write + e.timeout))
end
"""


def add_version(registry: Registry) -> None:
    """A second version of the benchmark's model, of which the champion knows nothing yet."""
    first = load("bench:1", registry).predictor
    X = features(20_000)
    booster = xgb.train({"max_depth": 4, "objective": "binary:logistic"}, xgb.DMatrix(X, X[:, 3] > 0.5), 50)
    predictor = Predictor(first.plan, XGBoostModel(bytes(booster.save_raw("ubj")), "binary"), first.target)
    version = registry.reserve("bench")
    golden = golden_rows(pa.table(dict(zip(NAMES, X[:100].T, strict=True))), predictor)
    manifest = {"name": "bench", "version": version, "golden": golden}
    write_bundle(registry.version_store("bench", version), predictor, manifest=manifest, extra_files={})


def body_of(n_rows: int) -> bytes:
    """A request for so many rows."""
    X = features(n_rows)
    return orjson.dumps({"rows": [dict(zip(NAMES, row, strict=True)) for row in X.astype(float).tolist()]})


def while_versions_move(url: str, registry: Registry, folder: Path, seconds: float) -> dict[str, Any]:
    """What wrk saw while the champion went to version 2 and back."""
    table = pa.table(dict(zip(NAMES, features(1).T, strict=True)))
    shares = [
        orjson.dumps(load(f"bench:{v}", registry).predict(table)["probability"][0].as_py()).decode() for v in (1, 2)
    ]
    script = folder / "moving.lua"
    script.write_text(_LUA.format(key=KEY, body=body_of(1).decode(), p1=shares[0], p2=shares[1]))
    command = ["wrk", "-t1", "-c16", f"-d{round(seconds)}s", "-s", str(script), url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for version in (2, 1):
        time.sleep(seconds / 3)
        registry.promote("bench", version)
    said = process.communicate()[0]
    found = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", said.partition("FOUND")[2])}
    return {**found, "requests_per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])}  # type: ignore[index]


def replica() -> int:
    """The pid of the replica that has our key."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            is_replica = (place / "cmdline").read_bytes().startswith(b"ray::ServeReplica:claydist")
            if is_replica and KEY.encode() in (place / "environ").read_bytes():
                return int(place.name)
        except OSError:
            continue
    raise SystemExit("no replica runs")


def pss_mb(pid: int) -> float:
    """Proportional set size in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:"))


class Connections:
    """Connections to the server that stay open, as those of real clients do: new ones for each request would use up
    the ports of the machine in seconds.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.n_asking = 0

    async def ask(self, body: bytes) -> tuple[int, bool, float]:
        """Status (0 for a broken connection), whether Retry-After came, and seconds."""
        self.n_asking += 1
        try:
            return await self._ask(body)
        finally:
            self.n_asking -= 1

    async def _ask(self, body: bytes) -> tuple[int, bool, float]:
        began = time.monotonic()
        while self._idle and self._idle[-1][0].at_eof():  # closed by the server meanwhile
            self._idle.pop()[1].close()
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return 0, False, time.monotonic() - began
        try:
            writer.write(b"%s%d\r\n\r\n%s" % (_HEAD, len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            found = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(found[1]) if found else 0)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return 0, False, time.monotonic() - began
        if writer.transport.get_write_buffer_size() or b"\r\nconnection: close" in head:
            writer.close()  # answered before it was all sent, or the server wants no more of it
        else:
            self._idle.append((reader, writer))
        return int(head.split(b" ", 2)[1]), b"retry-after" in head, time.monotonic() - began


async def paced(
    port: int, body: bytes, rate: float, seconds: float
) -> tuple[list[tuple[int, bool, float]], float, int]:
    """Answers to requests sent at a rate, whether or not the earlier ones are answered; our own longest lag; and how
    many were not sent, for `MAX_OPEN` others waited.
    """
    tasks, began, lags, connections = [], time.monotonic(), [0.0], Connections(port)
    n_held = 0

    async def tick() -> None:
        while True:
            start = time.monotonic()
            await asyncio.sleep(_TICK_S)
            lags.append(time.monotonic() - start - _TICK_S)

    ticking = asyncio.create_task(tick())
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + i / rate - time.monotonic()))
        if connections.n_asking < MAX_OPEN:
            tasks.append(asyncio.create_task(connections.ask(body)))
        else:
            n_held += 1
    answers = list(await asyncio.gather(*tasks))
    ticking.cancel()
    return answers, max(lags), n_held


async def capacity(port: int, body: bytes, seconds: float = 5) -> float:
    """Answers a second to four askers that never pause."""
    ended, connections = time.monotonic() + seconds, Connections(port)

    async def ask() -> int:
        n_answers = 0
        while time.monotonic() < ended:
            n_answers += (await connections.ask(body))[0] == 200
        return n_answers

    return sum(await asyncio.gather(*(ask() for _ in range(4)))) / seconds


def overloaded(port: int, n_rows: int) -> dict[str, Any]:
    """Answers at four times the rate, by both clocks, and the replica's memory before, meanwhile and afterwards."""
    body, pid = body_of(n_rows), replica()
    rate = asyncio.run(capacity(port, body))
    log = Path(f"/proc/{pid}/fd/1").resolve()
    memory, ended, at = [pss_mb(pid)], threading.Event(), log.stat().st_size

    def watch() -> None:
        while not ended.wait(WATCH_S):
            memory.append(pss_mb(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answers, lag_s, n_held = asyncio.run(paced(port, body, OVERLOAD * rate, OVERLOAD_S))
    time.sleep(AFTER_S)
    ended.set()
    watcher.join()
    refused, took = [a for a in answers if a[0] == 503], accepted_ms(log, at)
    return {
        "rows_a_request": n_rows, "capacity_per_s": round(rate, 1), "asked_per_s": round(OVERLOAD * rate, 1),
        "accepted_per_s": round(sum(a[0] == 200 for a in answers) / OVERLOAD_S, 1),
        "answers": dict(Counter(str(a[0]) for a in answers)), "not_sent": n_held,
        "503_with_retry_after": sum(a[1] for a in refused),
        "longest_accepted_s": round(max((a[2] for a in answers if a[0] == 200), default=0.0), 2),
        "longest_accepted_by_the_server_s": round(max(took, default=0.0) / 1000, 2), "client_lag_s": round(lag_s, 2),
        "memory_mb": [round(mb) for mb in memory],
    }  # fmt: skip


def accepted_ms(log: Path, at: int) -> list[float]:
    """The server's own milliseconds of accepted requests, from its access log's lines after a position."""
    with log.open("rb") as file:
        file.seek(at)
        found = re.findall(rb'"status":200,[^\n]*"ms":([\d.]+)', file.read())
    return [float(ms) for ms in found]


def killed(url: str, body: bytes, process: subprocess.Popen[bytes]) -> float:
    """Seconds from the SIGKILL of the only replica until it answers again."""
    began = time.monotonic()
    os.kill(replica(), signal.SIGKILL)
    time.sleep(0.2)
    wait_for(url, body, process)
    return round(time.monotonic() - began, 1)


def main() -> None:
    """Run all three and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--port", type=int, default=18100)
    given = parser.parse_args()
    url = f"http://127.0.0.1:{given.port}/predict/bench"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "registry")
        registry = open_registry(str(folder / "registry"))
        add_version(registry)
        script = str(Path(__file__).with_name("serve.py"))
        environment = {**os.environ, "CLAYDIST_API_KEYS": KEY}
        command = [sys.executable, script, "--role", "serve", "--port", str(given.port), "--folder", name]
        process = subprocess.Popen(command, env=environment)
        try:
            wait_for(url, body_of(1), process)
            print(json.dumps({"moving": while_versions_move(url, registry, folder, given.seconds)}), flush=True)
            for n_rows in ROWS_OF_LOAD:
                print(json.dumps({"overload": overloaded(given.port, n_rows)}), flush=True)
            print(json.dumps({"killed_answers_after_s": killed(url, body_of(1), process)}), flush=True)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


if __name__ == "__main__":
    main()
