"""Training against plain xgboost and scikit-learn, in the same run on the same machine; by hand.

    uv run python tests/benchmarks/train.py --rows 10000000 --runs 3 [--kind exact|sample|linear] [--dir D]

Makes its data (28 float32 columns, 16 files), starts a local Ray cluster, then takes turns: one run of the plain
library in a process of its own, one of `claydist train` on the cluster that is up. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N_FEATURES, N_FILES, ROUNDS, DEPTH, BATCH = 28, 16, 50, 6, 131_072


def make_data(folder: Path, n_rows: int) -> Path:
    """The table of so many rows, and a small one to test on; made once."""
    place = folder / f"rows-{n_rows}"
    if (place / "done").exists():
        return place
    weights = np.random.default_rng(7).normal(size=N_FEATURES)
    for part, rows, files in (("train", n_rows, N_FILES), ("test", 50_000, 1)):
        (place / part).mkdir(parents=True, exist_ok=True)
        for i in range(files):
            rng = np.random.default_rng((n_rows, files, i))
            X = rng.standard_normal((rows // files, N_FEATURES), dtype=np.float32)
            margin = X @ weights * 0.3 + 1.5 * np.maximum(X[:, 0], X[:, 1]) + np.sin(2 * X[:, 2])
            y = (margin + rng.logistic(size=len(X)) > 0).astype(np.int8)
            table = pa.table({**{f"f{j}": X[:, j] for j in range(N_FEATURES)}, "y": y})
            pq.write_table(table, place / part / f"part-{i:02d}.parquet", row_group_size=262_144)
    (place / "done").touch()
    return place


def plain_xgboost(place: Path, kind: str, n_threads: int) -> dict[str, Any]:
    """One process: an Arrow iterator over the files, a quantile matrix, 50 rounds."""
    import xgboost as xgb

    files = sorted((place / "train").glob("*.parquet"))

    class Rows(xgb.DataIter):
        def __init__(self) -> None:
            super().__init__(release_data=True)

        def reset(self) -> None:
            self.batches = (b for f in files for b in pq.ParquetFile(f).iter_batches(batch_size=BATCH))

        def next(self, input_data: Any) -> bool:
            batch = next(self.batches, None)
            if batch is None:
                return False
            table = pa.table(batch)
            input_data(data=table.drop_columns(["y"]), label=table.column("y").to_numpy())
            return True

    began = time.monotonic()
    Xy = xgb.QuantileDMatrix(Rows(), nthread=n_threads)
    binned = time.monotonic()
    params = {"objective": "binary:logistic", "max_depth": DEPTH, "tree_method": "hist", "nthread": n_threads}
    booster = xgb.train(params, Xy, ROUNDS)
    ended = time.monotonic()
    test = pq.read_table(place / "test")
    p = booster.inplace_predict(test.drop_columns(["y"])).astype(np.float64)
    y = test.column("y").to_numpy()
    logloss = float(-np.mean(np.where(y == 1, np.log(p), np.log1p(-p))))
    return {"bin": binned - began, "boost": ended - binned, "work": ended - began, "logloss": logloss}


def plain_sklearn(place: Path, kind: str, n_threads: int) -> dict[str, Any]:
    """One process: read, standardise, newton-cholesky in float64."""
    from sklearn.linear_model import LogisticRegression

    table = pq.read_table(place / "train")
    began = time.monotonic()
    y = table.column("y").to_numpy()
    X = np.empty((len(table), N_FEATURES))
    for j in range(N_FEATURES):
        X[:, j] = table.column(f"f{j}").to_numpy()
    del table
    X -= X.mean(axis=0)
    X /= X.std(axis=0)
    prepared = time.monotonic()
    LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-8, max_iter=200).fit(X, y)
    ended = time.monotonic()
    return {"prepare": prepared - began, "fit": ended - prepared, "work": ended - began}


def in_process(function: str, place: Path, kind: str, n_threads: int) -> dict[str, Any]:
    """The result of a function of this file run in a process of its own, with its wall seconds and peak PSS."""
    began = time.monotonic()
    arguments = ["--child", function, "--dir", str(place), "--kind", kind, "--threads", str(n_threads)]
    out = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return {**json.loads(out.stdout.splitlines()[-1]), "wall": time.monotonic() - began}


def ours(place: Path, kind: str, address: str, n_threads: int) -> dict[str, Any]:
    """`claydist train` on the cluster that is up."""
    linear = {"kind": "linear", "l2": 1.0}
    boosted = {"kind": "xgboost", "rounds": ROUNDS, "params": {"max_depth": DEPTH}, "binning": kind}
    spec = {
        "name": "bench", "data": {"path": str(place / "train"), "label": "y"},
        "split": {"test": {"path": str(place / "test")}}, "model": linear if kind == "linear" else boosted,
        "train": {"workers": 1, "cpus_per_worker": n_threads},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(json.dumps(spec))
        began = time.monotonic()
        command = [sys.executable, "-m", "claydist", "train", str(path), "--json", "--address", address]
        out = subprocess.run([*command, "--registry", folder], check=True, capture_output=True, text=True)
        wall = time.monotonic() - began
        summary = json.loads(out.stdout)
        trained = json.loads((Path(summary["uri"]) / "manifest.json").read_text())["trained"]
    seconds = trained["seconds"]
    return {
        **seconds, "work": sum(seconds.values()), "wall": wall, "peak_mb": summary["peak_mb"],
        "logloss": summary["metrics"]["test"]["logloss"], "stages": summary["seconds"],
        "outside": wall - sum(summary["seconds"].values()),
    }  # fmt: skip


def child(function: str, place: Path, kind: str, n_threads: int) -> None:
    """Run one function here and print its result, with the peak PSS of this process."""
    from claydist.training.worker import PeakMemory

    with PeakMemory() as memory:
        result = globals()[function](place, kind, n_threads)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({**result, "peak_mb": memory.peak_mb, "max_rss_mb": rss}))


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kind", choices=("exact", "sample", "linear"), default="exact")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "claydist-benchmark")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.dir, args.kind, args.threads)
        return
    place = make_data(args.dir, args.rows)

    from claydist.cluster import prepare_environment

    prepare_environment()
    import ray

    ray.init("local", num_cpus=args.threads, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address = ray.get_runtime_context().gcs_address
    reference = "plain_sklearn" if args.kind == "linear" else "plain_xgboost"
    runs = []
    for _ in range(args.runs):
        plain = in_process(reference, place, args.kind, args.threads)
        runs.append((plain, ours(place, args.kind, address, args.threads)))
        print(json.dumps({"plain": plain, "claydist": runs[-1][1]}), file=sys.stderr, flush=True)
    ray.shutdown()
    for key in ("wall", "work", "fit", "peak_mb"):
        if key in runs[0][0] and key in runs[0][1]:
            a, b = (statistics.median(run[side][key] for run in runs) for side in (0, 1))
            ratio = statistics.median(run[1][key] / run[0][key] for run in runs)
            print(f"{key:8} plain {a:10.1f}   claydist {b:10.1f}   ratio {ratio:.3f}")
    if args.kind != "linear":
        print(f"logloss  plain {runs[0][0]['logloss']:.5f}   claydist {runs[0][1]['logloss']:.5f}")


if __name__ == "__main__":
    main()
