"""Speed of `claydist serve` against a bare uvicorn and Starlette process that does the same prediction.

    python tests/benchmarks/serve.py [--seconds 8] [--repeats 3]

One row of 28 features in, 100 trees of depth 6, 16 connections, one replica; keys and validation on. Needs `wrk`.
Prints one JSON object; the bounds are those of issue 5, and the exit code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import pyarrow as pa
import xgboost as xgb

N_FEATURES, N_TREES, DEPTH, N_CONNECTIONS, BULK_ROWS = 28, 100, 6, 16, 100_000
KEY = "benchmark-key-0123456789"
BOUNDS = {"requests_ratio": 0.45, "p50_ratio": 3.0, "bulk_ratio": 0.7}
NAMES = [f"f{i:02}" for i in range(N_FEATURES)]
_LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {key}"
wrk.body = [==[{body}]==]
local bad = 0
response = function(status) if status ~= 200 then bad = bad + 1 end end
"""


def make_model(folder: Path) -> bytes:
    """Train the model, put it into a registry at `folder`, and give it as UBJSON."""
    from claydist.bundle import golden_rows, write_bundle
    from claydist.features import build_plan
    from claydist.models import XGBoostModel
    from claydist.predictor import Predictor, Target
    from claydist.profile import numeric_sums
    from claydist.registry import open_registry
    from claydist.schema import Column, Schema
    from claydist.spec import DataSpec

    X = features(20_000)
    y = (X[:, 0] * X[:, 1] + X[:, 2] > 0.3).astype(int)
    booster = xgb.train({"max_depth": DEPTH, "objective": "binary:logistic", "nthread": 2}, xgb.DMatrix(X, y), N_TREES)
    profiles = {name: numeric_sums(X[:, i], None).profile() for i, name in enumerate(NAMES)}
    schema = Schema(tuple(Column(name, "float") for name in NAMES))
    plan = build_plan(DataSpec(path=("x",), label={"column": "y"}), schema, profiles)
    raw = bytes(booster.save_raw("ubj"))
    predictor = Predictor(plan, XGBoostModel(raw, "binary"), Target("binary", "y", (False, True)))
    registry = open_registry(str(folder))
    version = registry.reserve("bench")
    golden = golden_rows(pa.table(dict(zip(NAMES, X[:100].T, strict=True))), predictor)
    manifest = {"name": "bench", "version": version, "golden": golden}
    write_bundle(registry.version_store("bench", version), predictor, manifest=manifest, extra_files={})
    registry.promote("bench", version)
    return raw


def features(n_rows: int) -> np.ndarray:
    """Rows (n_rows, 28) float32."""
    return np.random.default_rng(0).random((n_rows, N_FEATURES), np.float32)


def bare(port: int, model: Path) -> None:
    """The yardstick: uvicorn, Starlette, orjson, no names checked, no keys."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    booster = xgb.Booster(model_file=str(model))
    booster.set_param({"nthread": 1})

    async def predict(request: Request) -> Response:
        rows = orjson.loads(await request.body())["rows"]
        X = np.array([[row[name] for name in NAMES] for row in rows], np.float32)
        shares = booster.inplace_predict(X, validate_features=False).tolist()
        answer = [{"prediction": p >= 0.5, "probability": p} for p in shares]
        return Response(orjson.dumps({"predictions": answer}), media_type="application/json")

    app = Starlette(routes=[Route("/predict/bench", predict, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def serve(port: int, registry: str) -> None:
    """`claydist serve` with one replica and keys."""
    os.environ["CLAYDIST_API_KEYS"] = KEY
    from claydist.serving.run import serve as run

    run(["bench"], registry=registry, port=port, address="local")


def wrk(url: str, body: bytes, n_connections: int, seconds: float, folder: Path) -> dict[str, float]:
    """Requests a second, and latencies in milliseconds."""
    script = folder / "post.lua"
    script.write_text(_LUA.format(key=KEY, body=body.decode()))
    command = ["wrk", "-t1", f"-c{n_connections}", f"-d{max(1, round(seconds))}s", "--latency", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"requests failed:\n{said}")
    found = {"requests_per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])}  # type: ignore[index]
    for share in ("50", "99"):
        number, unit = re.search(rf"\s{share}%\s+([\d.]+)(us|ms|s)\n", said).groups()  # type: ignore[union-attr]
        found[f"p{share}_ms"] = float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]
    return found


def bulk(url: str, body: bytes, repeats: int) -> float:
    """Best rows a second of an Arrow request of BULK_ROWS rows, the way there and back included."""
    parts, best = urlsplit(url), 0.0
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    headers = {"Content-Type": "application/vnd.apache.arrow.stream", "Authorization": f"Bearer {KEY}"}
    for _ in range(repeats):
        start = time.perf_counter()
        connection.request("POST", parts.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        best = max(best, BULK_ROWS / (time.perf_counter() - start))
        if answer.status != 200 or pa.ipc.open_stream(data).read_all().num_rows != BULK_ROWS:
            raise SystemExit(f"bulk failed: {answer.status} {data[:200]!r}")
    return best


def bare_bulk(raw: bytes, X: np.ndarray, repeats: int) -> float:
    """Best rows a second of `inplace_predict` alone, one thread, on float32 in row order."""
    booster = xgb.Booster()
    booster.load_model(bytearray(raw))
    booster.set_param({"nthread": 1})
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        booster.inplace_predict(X, validate_features=False)
        best = max(best, len(X) / (time.perf_counter() - start))
    return best


def wait_for(url: str, body: bytes, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the server answers a prediction."""
    parts, end = urlsplit(url), time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=2)
            connection.request("POST", parts.path, body, {"Authorization": f"Bearer {KEY}"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise SystemExit(f"{url} does not answer")


def main() -> None:
    """Start both, measure by turns, print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--role", choices=("bare", "serve"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role == "bare":
        return bare(asked.port, asked.folder / "model.ubj")
    if asked.role == "serve":
        return serve(asked.port, str(asked.folder / "registry"))
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), asked.port, asked.seconds, asked.repeats)
    print(json.dumps(result, indent=1))
    missed = [key for key, bound in BOUNDS.items() if (result[key] > bound) == (key == "p50_ratio")]
    if missed:
        raise SystemExit(f"missed: {missed}")
    return None


def measure(folder: Path, port: int, seconds: float, repeats: int) -> dict[str, Any]:
    """All figures; both servers run at once, and only one is asked at a time."""
    raw = make_model(folder / "registry")
    (folder / "model.ubj").write_bytes(raw)
    X = features(BULK_ROWS)
    row = dict(zip(NAMES, (float(v) for v in X[0]), strict=True))
    body = orjson.dumps({"rows": [row]})
    sink = io.BytesIO()
    table = pa.table(dict(zip(NAMES, X.T, strict=True)))
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    ports = {"bare": port + 1, "serve": port}
    urls = {role: f"http://127.0.0.1:{p}/predict/bench" for role, p in ports.items()}
    found: dict[str, dict[str, list[float]]] = {role: {} for role in ports}
    processes = []
    try:
        for role, p in ports.items():
            command = [sys.executable, __file__, "--role", role, "--port", str(p), "--folder", str(folder)]
            processes.append(subprocess.Popen(command))
            wait_for(urls[role], body, processes[-1])
        for role in ports:
            wrk(urls[role], body, N_CONNECTIONS, 2, folder)
        for _ in range(repeats):
            for role in ports:
                many = wrk(urls[role], body, N_CONNECTIONS, seconds, folder)
                one = wrk(urls[role], body, 1, seconds / 2, folder)
                for key, value in {**many, "p50_alone_ms": one["p50_ms"]}.items():
                    found[role].setdefault(key, []).append(value)
        bulk_rows = bulk(urls["serve"], sink.getvalue(), 10 * repeats)
        bare_rows = bare_bulk(raw, X, 10 * repeats)
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait(60)
    medians = {role: {k: statistics.median(v) for k, v in values.items()} for role, values in found.items()}
    return {
        **medians,
        "requests_ratio": medians["serve"]["requests_per_s"] / medians["bare"]["requests_per_s"],
        "p50_ratio": medians["serve"]["p50_alone_ms"] / medians["bare"]["p50_alone_ms"],
        "bulk_rows_per_s": bulk_rows, "bare_rows_per_s": bare_rows, "bulk_ratio": bulk_rows / bare_rows,
    }  # fmt: skip


if __name__ == "__main__":
    main()
