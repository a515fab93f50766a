# ruff: noqa: E402  Ray reads its environment at import
"""Speed and memory of scoring, against a bare loop and Ray Data: 28 features, 100 trees of depth 6, all cores.

    python -m tests.benchmarks.score --rows 10_000_000 --ways claydist,loop,ray_data_tasks,ray_data_actors
    python -m tests.benchmarks.score --rows 1_000_000 --ways claydist --dir /tmp/bench
    python -m tests.benchmarks.score --files 4000

The bare loop is pyarrow reading, `inplace_predict` with all threads, and a Parquet writer, in one process without Ray.
Ray Data is `read_parquet().map_batches().write_parquet()` in two forms, of which the faster one is the one to compare
with: tasks, as many at once as there are CPUs, the model cached in each process; and actors, one a CPU, each asking for
half of one. Actors that ask for whole CPUs leave none for the tasks that read, and with as many of them as there are
CPUs nothing ever starts, without an error.

Each way prints two measures, to be compared like with like:

- `rows_per_s` and `seconds`, the scoring phase: from the first read to the last write, in processes that have started,
  imported xgboost and loaded the model. claydist warms its workers in its stages `plan` and `start workers`; Ray Data
  by the same pipeline over a small file for each CPU. Its actors are new in every execution: only tasks, which were
  the faster form on two CPUs, are as warm as claydist's.
- `command_s`, the whole command: from the start of Python to its end, with imports, Ray's start, planning, workers'
  start, and publishing. Ray Data is not warmed in the run that this is measured in.

With each the peak PSS of the largest worker and of the driver, of the run that `rows_per_s` is from.
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
from collections.abc import Callable
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


_boosters: dict[Path, xgb.Booster] = {}


def score_batch(batch: pa.Table, model: Path) -> pa.Table:
    """The rows with id, prediction and probability; the model is loaded once a process."""
    if model not in _boosters:
        _boosters[model] = xgb.Booster(model_file=model)
        _boosters[model].set_param({"nthread": 1})
    X = np.column_stack([batch.column(name).to_numpy() for name in NAMES]).astype(np.float32, copy=False)
    p = _boosters[model].inplace_predict(X, validate_features=False)
    return pa.table({"id": batch.column("id"), "prediction": p >= 0.5, "probability": p})


class ScoreActor:
    """`score_batch` as Ray Data's actors take it."""

    def __call__(self, batch: pa.Table, model: Path) -> pa.Table:
        return score_batch(batch, model)


def with_ray_data(folder: Path, form: str, is_warm: bool) -> dict[str, Any]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    more: dict[str, Any] = {"batch_size": 131_072, "batch_format": "pyarrow"}
    more["fn_kwargs"] = {"model": folder / "model.ubj"}
    function: Any = score_batch
    if form == "actors":
        function = ScoreActor
        more |= {"concurrency": os.cpu_count(), "num_cpus": 0.5}

    def run(source: Path, target: Path) -> float:
        began = time.monotonic()
        ray.data.read_parquet(str(source)).map_batches(function, **more).write_parquet(str(target))
        return time.monotonic() - began

    output = folder / f"ray_data_{form}"
    if is_warm:
        warm = folder / "warm"
        if not warm.exists():
            # A file for each process, so that none is left cold.
            write_input(warm, 10_000 * (os.cpu_count() or 1), rows_per_file=10_000)
        run(warm, output / "warm")
    seconds = run(folder / "in", output / "all")
    rows = sum(pq.read_metadata(path).num_rows for path in (output / "all").glob("*.parquet"))
    ray.shutdown()
    return {"rows": rows, "seconds": seconds}


WAYS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "claydist": lambda folder, is_warm: with_claydist(folder),
    "loop": lambda folder, is_warm: bare_loop(folder),
    "ray_data_tasks": lambda folder, is_warm: with_ray_data(folder, "tasks", is_warm),
    "ray_data_actors": lambda folder, is_warm: with_ray_data(folder, "actors", is_warm),
}


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
    """One way: its scoring phase, and in a run of its own where that was warmed, its whole command."""
    result, command_s, peaks = run_process(way, folder, "--warm")
    if way.startswith("ray_data"):
        _, command_s, _ = run_process(way, folder)
    return {"way": way, **result, "rows_per_s": round(result["rows"] / result["seconds"]),
            "command_s": round(command_s, 2), "peak_mb": {k: round(v) for k, v in peaks.items()}}  # fmt: skip


def run_process(way: str, folder: Path, *more: str) -> tuple[dict[str, Any], float, dict[str, float]]:
    """What a way says in a process of its own, how long that lives in seconds, and its peaks of memory."""
    shutil.rmtree(folder / way, ignore_errors=True)
    command = [sys.executable, "-m", "tests.benchmarks.score", "--dir", str(folder), "--run", way, *more]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peaks, stop))
    watcher.start()
    said = process.communicate()[0]
    command_s = time.monotonic() - began
    stop.set()
    watcher.join()
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1]), command_s, peaks


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
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--files", type=int)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/claydist-bench-score"))
    parser.add_argument("--run", choices=WAYS)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    if args.run:
        print(json.dumps(WAYS[args.run](args.dir, args.warm)))
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
