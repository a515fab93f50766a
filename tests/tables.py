"""Tiny seeded tables, and Parquet files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CITIES = ("Brno", "København", "Łódź", "東京", "São Paulo", "🚲-town")


def make_table(seed: int = 0, n_rows: int = 600) -> pa.Table:
    """Numbers with nulls, text beyond ASCII, a timestamp, a weight; labels `late` (0, 1), `hours` and `parcels`."""
    rng = np.random.default_rng(seed)
    km, kg = rng.gamma(2.0, 90.0, n_rows), rng.lognormal(0.5, 0.9, n_rows)
    city = rng.choice(len(CITIES), n_rows)
    raw = 0.006 * km + 0.3 * np.log(kg) - 0.4 * (city == 2) + 0.5 * (city == 3) - 1.0
    start = np.datetime64("2026-03-01T00:00", "us")
    return pa.table({
        "row": pa.array(np.arange(n_rows) + 1_000_000 * seed),
        "km": pa.array(km, mask=rng.random(n_rows) < 0.05),
        "kg": pa.array(kg.astype(np.float32)),
        "city": pa.array(np.array(CITIES)[city], mask=rng.random(n_rows) < 0.03),
        "express": pa.array(rng.random(n_rows) < 0.3),
        "sent": pa.array(start + rng.integers(0, 10**6, n_rows).astype("timedelta64[s]"), pa.timestamp("us", "UTC")),
        "w": pa.array(rng.gamma(2.0, 0.5, n_rows)),
        "late": pa.array((rng.random(n_rows) < 1 / (1 + np.exp(-raw))).astype(np.int64)),
        "hours": pa.array(20 + 5 * raw + rng.normal(size=n_rows)),
        "parcels": pa.array(rng.poisson(np.exp(0.4 * raw))),
    })  # fmt: skip


def write_files(folder: Path, tables: Sequence[pa.Table], row_group_size: int | None = None) -> Path:
    """The folder, with one Parquet file for each table, named in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"part-{number:02}.parquet", row_group_size=row_group_size)
    return folder


def cut(table: pa.Table, n_files: int) -> list[pa.Table]:
    """The table in so many pieces of almost equal size."""
    bounds = np.linspace(0, table.num_rows, n_files + 1).astype(int)
    return [table.slice(a, b - a) for a, b in pairwise(bounds)]


def spec_of(path: Path | str, registry: Path | str, label: Any = "late", **more: Any) -> dict[str, Any]:
    """A training spec over such files: boosting, with the other labels, row number and weight dropped.

    `more` are keys with `__` for the dot, as in `model__kind`; a mapping or list replaces what was there.
    """
    column = label["column"] if isinstance(label, Mapping) else label
    known = ("row", "w", "late", "hours", "parcels")
    tree: dict[str, Any] = {
        "name": "parcels",
        "data": {"path": str(path), "label": label, "drop": [name for name in known if name != column]},
        "model": {"kind": "xgboost", "rounds": 5, "params": {"max_depth": 3}},
        "registry": str(registry),
    }
    for key, value in more.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
