# ruff: noqa: E402  Ray reads its environment at import
"""The memory estimate against the measured peak PSS of the largest training worker, on tables of several shapes.

python -m tests.benchmarks.memory
python -m tests.benchmarks.memory --shapes 4000000x10 --kinds linear
python -m tests.benchmarks.memory --shapes 40000x100d14 --kinds xgboost     # trees 14 deep
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

from claydist.cluster import prepare_environment

prepare_environment()

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from claydist.display import Silent
from claydist.pipeline import train
from claydist.plan import make_plan
from claydist.registry import open_registry
from claydist.spec import TrainSpec
from claydist.specfile import load_spec

SHAPES = "400000x28,4000000x10,1000000x100,10000000x28,40000x100d14,8000x1000d10,5000x5000"
N_FILES = 8
MODELS = {
    "xgboost": {"kind": "xgboost", "rounds": 5, "params": {"max_depth": 6}},
    "linear": {"kind": "linear", "l2": 1.0, "max_iter": 3},
}


def write_table(folder: Path, n_rows: int, n_columns: int) -> Path:
    """Seeded float32 columns, a text column and a label; made once."""
    place = folder / f"shape-{n_rows}x{n_columns}"
    if (place / "part-0.parquet").exists():
        return place
    place.mkdir(parents=True)
    for i in reversed(range(N_FILES)):
        rng = np.random.default_rng(i)
        X = rng.standard_normal((n_rows // N_FILES, n_columns - 1), dtype=np.float32)
        names = np.array(["north", "east", "south", "west"])[rng.integers(0, 4, len(X))]
        y = (X[:, 0] + rng.logistic(size=len(X)) > 0).astype(np.int8)
        columns = {f"f{j}": X[:, j] for j in range(n_columns - 1)}
        pq.write_table(
            pa.table({**columns, "side": names, "y": y}), place / f"part-{i}.parquet", row_group_size=250_000
        )
    return place


def measure(place: Path, kind: str, n_workers: int, depth: int) -> tuple[float, float]:
    """Estimated and measured MB."""
    model = MODELS[kind] | ({"params": {"max_depth": depth}} if kind == "xgboost" else {})
    spec = load_spec(TrainSpec, {
        "name": "memory", "data": {"path": str(place), "label": "y"}, "split": {"test": {"fraction": 0.01}},
        "model": model, "train": {"workers": n_workers, "cpus_per_worker": 1},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        registry = open_registry(folder)
        trained = train(spec, registry, Silent())
        planned = make_plan(spec, registry)
    return planned["memory_mb_per_worker"], trained.summary["peak_mb"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--kinds", default="xgboost,linear")
    parser.add_argument("--workers", default="1", help="numbers of workers, such as 1,2")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "claydist-benchmark")
    args = parser.parse_args()
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for shape in args.shapes.split(","):
        size, _, depth = shape.partition("d")
        n_rows, n_columns = map(int, size.split("x"))
        place = write_table(args.dir, n_rows, n_columns)
        for kind in args.kinds.split(","):
            for n_workers in map(int, args.workers.split(",")):
                estimated, measured = measure(place, kind, n_workers, int(depth or 6))
                print(f"{shape:>12} {kind:8} {n_workers} workers: estimated {estimated:6,.0f} MB, measured "
                      f"{measured:6,.0f} MB, ratio {estimated / measured:.2f}", flush=True)  # fmt: skip
    ray.shutdown()


if __name__ == "__main__":
    main()
