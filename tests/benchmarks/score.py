# ruff: noqa: E402  Ray reads its environment at import
"""Speed and memory of scoring, against a bare loop and Ray Data: 28 features, 100 trees of depth 6, all cores.

    python -m tests.benchmarks.score --rows 10_000_000 --ways claydist,loop,ray_data --dir /tmp/bench
    python -m tests.benchmarks.score --rows 1_000_000 --ways claydist
    python -m tests.benchmarks.score --files 4000

The bare loop is pyarrow reading, `inplace_predict` with all threads, and a Parquet writer, in one process without Ray.
Each way prints rows a second of its scoring phase, and the peak PSS of its largest process (USS where there is none).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

from claydist.cluster import prepare_environment

prepare_environment()

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost as xgb

N_FEATURES, N_TREES, DEPTH = 28, 100, 6
ROWS_PER_FILE, ROWS_PER_GROUP = 1_000_000, 125_000
NAMES = [f"f{j}" for j in range(N_FEATURES)]


def write_input(folder: Path, n_rows: int, rows_per_file: int = ROWS_PER_FILE) -> None:
    """Seeded float32 features and an id."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, n_rows, rows_per_file)):
        n = min(rows_per_file, n_rows - start)
        X = np.random.default_rng(number).normal(size=(n, N_FEATURES)).astype(np.float32)
        table = pa.table({"id": np.arange(start, start + n), **{name: X[:, j] for j, name in enumerate(NAMES)}})
        pq.write_table(table, folder / f"part-{number:05}.parquet", row_group_size=ROWS_PER_GROUP)


def write_model(folder: Path) -> None:
    """The model in a registry, and as a plain file for the others."""
    from claydist.bundle import write_bundle
    from claydist.features import Feature, FeaturePlan
    from claydist.models import XGBoostModel
    from claydist.predictor import Predictor, Target
    from claydist.registry import open_registry
    from claydist.schema import Column, Schema

    rng = np.random.default_rng(1)
    X = rng.normal(size=(200_000, N_FEATURES)).astype(np.float32)
    y = (X @ rng.normal(size=N_FEATURES) + rng.normal(size=len(X)) + X[:, 0] * X[:, 1] > 0).astype(np.float32)
    params = {"objective": "binary:logistic", "max_depth": DEPTH, "tree_method": "hist"}
    booster = xgb.train(params, xgb.QuantileDMatrix(X, y), N_TREES)
    booster.save_model(folder / "model.ubj")
    plan = FeaturePlan(
        Schema(tuple(Column(name, "float") for name in NAMES)), tuple(Feature(n, n, "numeric") for n in NAMES)
    )
    model = XGBoostModel(bytes(booster.save_raw("ubj")), "binary")
    registry = open_registry(str(folder / "registry"))
    store = registry.version_store("bench", registry.reserve("bench"))
    write_bundle(store, Predictor(plan, model, Target("binary", "y", (False, True))), manifest={}, extra_files={})
    registry.promote("bench", 1)


def bare_loop(folder: Path) -> dict[str, Any]:
    booster = xgb.Booster(model_file=folder / "model.ubj")
    booster.set_param({"nthread": os.cpu_count()})
    output = folder / "loop"
    output.mkdir()
    began, n_rows = time.monotonic(), 0
    for source in sorted((folder / "in").iterdir()):
        writer = None
        for batch in pq.ParquetFile(source).iter_batches(131_072):
            X = np.empty((batch.num_rows, N_FEATURES), np.float32)
            for j, name in enumerate(NAMES):
                X[:, j] = batch.column(name)
            p = booster.inplace_predict(X, validate_features=False)
            table = pa.table({"id": batch.column("id"), "prediction": p >= 0.5, "probability": p})
            writer = writer or pq.ParquetWriter(output / source.name, table.schema)
            writer.write_table(table)
            n_rows += batch.num_rows
        writer.close()
    return {"rows": n_rows, "seconds": time.monotonic() - began}


def with_claydist(folder: Path) -> dict[str, Any]:
    import ray

    from claydist.display import Silent
    from claydist.registry import open_registry
    from claydist.scoring.run import score
    from claydist.spec import ScoreSpec
    from claydist.specfile import load_spec

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    spec = load_spec(ScoreSpec, {
        "model": "bench", "registry": str(folder / "registry"), "input": str(folder / "in"),
        "output": str(folder / "claydist"), "key": ["id"],
    })  # fmt: skip
    summary = score(spec, open_registry(None, spec.registry), Silent()).summary
    ray.shutdown()
    return {"rows": summary["dates"][0]["rows"], "seconds": summary["stages"]["score"], "stages": summary["stages"]}


def with_ray_data(folder: Path) -> dict[str, Any]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False

    class Score:
        def __init__(self) -> None:
            self.booster = xgb.Booster(model_file=folder / "model.ubj")
            self.booster.set_param({"nthread": 1})

        def __call__(self, batch: pa.Table) -> pa.Table:
            X = np.column_stack([batch.column(name).to_numpy() for name in NAMES]).astype(np.float32, copy=False)
            p = self.booster.inplace_predict(X, validate_features=False)
            return pa.table({"id": batch.column("id"), "prediction": p >= 0.5, "probability": p})

    began = time.monotonic()
    # One actor: with as many as there are CPUs no read task ever starts.
    dataset = ray.data.read_parquet(str(folder / "in"))
    dataset = dataset.map_batches(Score, batch_size=131_072, batch_format="pyarrow", concurrency=1)
    dataset.write_parquet(str(folder / "ray_data"))
    seconds = time.monotonic() - began
    rows = sum(pq.read_metadata(path).num_rows for path in (folder / "ray_data").glob("*.parquet"))
    ray.shutdown()
    return {"rows": rows, "seconds": seconds}


WAYS = {"claydist": with_claydist, "loop": bare_loop, "ray_data": with_ray_data}


def watch(pid: int, peaks: dict[str, float], stop: threading.Event) -> None:
    """Peak memory (PSS, MB) of the largest worker and of the driver."""
    from tests.benchmarks.score_kill import descendants

    # Looking costs the machine's cores too, and more so the more processes there are.
    while not stop.wait(1.0):
        for found, line in {pid: "driver", **descendants(pid)}.items():
            kind = "driver" if found == pid else "worker" if line.startswith("ray::") else None
            try:
                text = Path(f"/proc/{found}/smaps_rollup").read_text() if kind else ""
            except OSError:
                continue
            pss = sum(int(row.split()[1]) for row in text.splitlines() if row.startswith("Pss:")) / 1024
            if kind:
                peaks[kind] = max(peaks.get(kind, 0.0), pss)


def run_way(way: str, folder: Path) -> dict[str, Any]:
    """One way in a process of its own."""
    shutil.rmtree(folder / way, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.score", "--dir", str(folder), "--run", way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peaks, stop))
    watcher.start()
    said = process.communicate()[0]
    stop.set()
    watcher.join()
    assert process.returncode == 0, said
    result = json.loads(said.splitlines()[-1])
    return {"way": way, **result, "rows_per_s": round(result["rows"] / result["seconds"]),
            "peak_mb": {k: round(v) for k, v in peaks.items()}}  # fmt: skip


def plan_many(folder: Path, n_files: int) -> None:
    """Seconds to plan the scoring of many small files by day."""
    from claydist.scoring import units
    from claydist.scoring.choice import Choice
    from claydist.scoring.dates import DateRule
    from claydist.scoring.input import find_input
    from claydist.spec import ScoreSpec
    from claydist.specfile import load_spec
    from claydist.storage import open_store

    source = folder / "many"
    if not source.exists():
        for number in range(n_files):
            place = source / f"dt=2026-{1 + number % 12:02}-{1 + number // 12 % 28:02}" / f"part-{number}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"id": [number], **{name: [0.5] for name in NAMES}}), place)
    began = time.monotonic()
    spec = load_spec(ScoreSpec, {"model": "m", "input": str(source), "output": str(folder / "planned"), "date": "dt"})
    rule, choice, output = DateRule.of(spec), Choice.of(None, None, None), open_store(spec.output)
    found = find_input(spec, rule, choice, output, {}, lambda f, items: [f(item) for item in items])
    planned = [units.plan_partition(has.inventory, rule, day, has.rows, "m", "s") for day, has in found.items()]
    n_units = sum(len(p.units) for p in planned)
    print(json.dumps({"files": n_files, "units": n_units, "plan_s": round(time.monotonic() - began, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--ways", default="claydist,loop,ray_data")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--files", type=int)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/claydist-bench-score"))
    parser.add_argument("--run")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(WAYS[args.run](args.dir)))
        return
    if args.files:
        plan_many(args.dir, args.files)
        return
    folder = args.dir / str(args.rows)
    if not (folder / "model.ubj").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_input(folder / "in", args.rows)
        write_model(folder)
    for _ in range(args.repeat):
        for way in args.ways.split(","):
            print(json.dumps(run_way(way, folder)), flush=True)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
