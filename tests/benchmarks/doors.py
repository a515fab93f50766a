"""10,000 rows of real flights through every way in, compared to the last bit; by hand, with ../shared/data beside.

    uv run python -m tests.benchmarks.doors

Trains jobs/flights.yaml, spoils some rows (nulls, carriers that nobody knows, names outside Latin, columns in another
order), and compares `load(ref).predict` with `claydist score`, and with a server's JSON rows, Arrow stream, Open
Inference Protocol as JSON and as binary tensors (tritonclient).
"""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import claydist
from claydist.values import to_plain

N_ROWS, JSON_ROWS = 10_000, 1000
ROOT = Path(__file__).parents[2]
FLIGHTS = ROOT.parent / "shared" / "data" / "flights13"
ARROW = "application/vnd.apache.arrow.stream"


def make_rows() -> pa.Table:
    """Flights of which some values are null, unseen or not ASCII, with the columns in another order, and an id."""
    rng = np.random.default_rng(0)
    table = ds.dataset(FLIGHTS, partitioning="hive", format="parquet").to_table()
    table = table.take(pa.array(rng.choice(len(table), N_ROWS, replace=False)))
    spoilt = {}
    for name in rng.permutation(table.column_names).tolist():
        values = table.column(name).to_pylist()
        if pa.types.is_string(table.schema.field(name).type):
            strange = rng.choice(["ZZ", "København", "東京", ""], N_ROWS)
            values = [
                s if r < 0.06 else v for s, r, v in zip(strange.tolist(), rng.random(N_ROWS), values, strict=True)
            ]
        gone = rng.random(N_ROWS) < 0.05
        spoilt[name] = pa.array(
            [None if g else v for g, v in zip(gone, values, strict=True)], table.schema.field(name).type
        )
    return pa.table({**spoilt, "id": np.arange(N_ROWS)})


def command(*arguments: str) -> str:
    """The stdout of a claydist command that must succeed."""
    out = subprocess.run([sys.executable, "-m", "claydist", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


def scored(folder: Path, rows: pa.Table) -> pa.Table:
    """The rows' predictions by `claydist score`, in their order."""
    (folder / "in").mkdir()
    pq.write_table(rows, folder / "in" / "rows.parquet", row_group_size=3000)
    spec = {"model": "flight-delay", "input": str(folder / "in"), "output": str(folder / "out"), "key": ["id"],
            "registry": str(folder / "registry")}  # fmt: skip
    (folder / "score.yaml").write_text(json.dumps(spec))
    command("score", str(folder / "score.yaml"), "--address", "local", "--json")
    found = claydist.read_scores(str(folder / "out"))
    assert found.column("id").to_pylist() == list(range(N_ROWS))
    return found.drop_columns("id")


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """The port of `claydist serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    arguments = [
        "serve",
        "flight-delay",
        "--port",
        str(port),
        "--registry",
        str(folder / "registry"),
        "--address",
        "local",
    ]
    process = subprocess.Popen([sys.executable, "-m", "claydist", *arguments], cwd=ROOT)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                if ask(port, "GET", "/v2/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(
    port: int, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def by_rows(port: int, rows: pa.Table, plan: Any) -> list[dict[str, Any]]:
    """Answers to JSON rows."""
    found: list[dict[str, Any]] = []
    for start in range(0, N_ROWS, JSON_ROWS):
        body = json.dumps({"rows": to_plain(rows[start : start + JSON_ROWS], plan)}).encode()
        status, answer = ask(port, "POST", "/predict/flight-delay", body)
        assert status == 200, answer
        found += json.loads(answer)["predictions"]
    return found


def by_arrow(port: int, rows: pa.Table) -> pa.Table:
    """The answer to one Arrow stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    status, answer = ask(port, "POST", "/predict/flight-delay", sink.getvalue(), ARROW)
    assert status == 200, answer
    return pa.ipc.open_stream(answer).read_all()


def by_oip(port: int, rows: pa.Table, plan: Any) -> list[float]:
    """Probabilities by tensors in JSON."""
    found: list[float] = []
    metadata = json.loads(ask(port, "GET", "/v2/models/flight-delay")[1])
    for start in range(0, N_ROWS, JSON_ROWS):
        plain = to_plain(rows[start : start + JSON_ROWS], plan)
        inputs = [
            {"name": t["name"], "datatype": t["datatype"], "shape": [len(plain)], "data": [r[t["name"]] for r in plain]}
            for t in metadata["inputs"]
        ]
        status, answer = ask(port, "POST", "/v2/models/flight-delay/infer", json.dumps({"inputs": inputs}).encode())
        assert status == 200, answer
        (output,) = [o for o in json.loads(answer)["outputs"] if o["name"] == "probability"]
        found += output["data"]
    return found


def by_triton(port: int, rows: pa.Table, plan: Any) -> list[float]:
    """Probabilities by binary tensors of the ecosystem's client; missing numbers are NaN, missing text is a word."""
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    metadata, found = client.get_model_metadata("flight-delay"), []
    for start in range(0, N_ROWS, JSON_ROWS):
        plain, inputs = to_plain(rows[start : start + JSON_ROWS], plan), []
        for t in metadata["inputs"]:
            values = [row[t["name"]] for row in plain]
            if t["datatype"] == "BYTES":
                array = np.array(["(none)" if v is None else v for v in values], np.object_)
            else:
                array = np.array([np.nan if v is None else v for v in values], np.float64)
            tensor = triton.InferInput(t["name"], [len(plain)], "BYTES" if t["datatype"] == "BYTES" else "FP64")
            inputs.append(tensor.set_data_from_numpy(array, binary_data=True))
        answer = client.infer("flight-delay", inputs, parameters={"missing": "(none)"})
        found += answer.as_numpy("probability").tolist()
    client.close()
    return found


def main() -> None:
    """Compare, and print each way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = str(folder / "registry")
        command("train", "jobs/flights.yaml", "--registry", registry, "--address", "local", "--json")
        bundle, rows = claydist.load("flight-delay", registry), make_rows()
        expected = bundle.predict(rows)
        plan, probabilities = bundle.predictor.plan, expected.column("probability").to_pylist()
        distinct = len(set(probabilities))
        print(f"{N_ROWS} rows, {distinct} distinct probabilities", flush=True)
        print("claydist score:", scored(folder, rows).equals(expected), flush=True)
        with server(folder) as port:
            print("JSON rows:", by_rows(port, rows, plan) == expected.to_pylist(), flush=True)
            print("Arrow:", by_arrow(port, rows).equals(expected), flush=True)
            print("OIP, JSON:", by_oip(port, rows, plan) == probabilities, flush=True)
            print("OIP, binary (tritonclient):", by_triton(port, rows, plan) == probabilities, flush=True)


if __name__ == "__main__":
    main()
