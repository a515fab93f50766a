"""`claydist quickstart`: a realistic table, both families trained, the better one promoted, the newest day scored.

The table is of parcel deliveries: some hundred thousand rows over several days as Hive partitions, with strings, nulls,
a Unicode category, a feature that drifts from day to day, and a label that depends on them.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from claydist.display import Display
from claydist.pipeline import Trained, train
from claydist.registry import open_registry
from claydist.scoring.readers import read_scores
from claydist.scoring.run import score
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec

N_DAYS = 8
ROWS_PER_DAY = 40_000
FIRST_DAY = date(2026, 11, 1)
CARRIERS = ("ACME", "Blitz", "Čápi", "Dōjō", "Express", "Фура")
CITIES = ("Århus", "Berlin", "Łódź", "Málaga", "Nantes", "Porto", "Zürich", "東京")
MODELS: dict[str, dict[str, Any]] = {
    "xgboost": {"kind": "xgboost", "rounds": 120, "early_stopping": 15, "params": {"max_depth": 6, "eta": 0.2}},
    "linear": {"kind": "linear", "l2": 1.0, "missing_indicator": True},
}


@dataclass(frozen=True)
class Result:
    """What quickstart did: the JSON-able summary, and what a person reads."""

    summary: dict[str, Any]
    text: Any


def run_quickstart(folder: Path, display: Display) -> Result:
    """Make the table, train, promote the better model, score the newest day, on the connected cluster."""
    folder = folder.resolve()
    display.stage("table")
    write_table(folder / "parcels")
    display.done()
    registry = open_registry(str(folder / "registry"))
    trained = {}
    for kind, model in MODELS.items():
        spec_path = folder / f"{kind}.yaml"
        spec_path.write_text(yaml.safe_dump(spec_of(folder, model), sort_keys=False, allow_unicode=True))
        display.say(f"training {kind} ({spec_path})")
        trained[kind] = train(load_spec(TrainSpec, spec_path), registry, display)
    champion = registry.alias_version("parcel-late")
    newest = FIRST_DAY + timedelta(days=N_DAYS - 1)
    spec_path = folder / "score.yaml"
    spec_path.write_text(yaml.safe_dump(scoring_spec_of(folder), sort_keys=False))
    display.say(f"scoring {newest} with the champion ({spec_path})")
    scored = score(load_spec(ScoreSpec, spec_path), registry, display, date=newest)
    rows = read_scores(str(folder / "scores"), newest)
    summary = {
        "dir": str(folder),
        "models": {kind: dict(t.summary) for kind, t in trained.items()},
        "champion": {"model": "parcel-late", "version": champion},
        "scores": dict(scored.summary),
    }
    shown = Group(_table(trained, champion), _first_rows(rows, newest), Text(_next_steps(folder)))
    return Result(summary, shown)


def spec_of(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The training spec of the quickstart's table; the newest day is left for scoring."""
    newest = FIRST_DAY + timedelta(days=N_DAYS - 1)
    return {
        "name": "parcel-late",
        "data": {
            "path": str(folder / "parcels"),
            "label": {"column": "hours", "above": 48},
            "drop": ["parcel_id", "day"],
            "where": f"hours is not null and day < '{newest}'",
            "types": {"day": "string"},
        },
        "split": {"valid": {"fraction": 0.1}, "test": {"fraction": 0.2}},
        "model": model,
        "goals": [{"metric": "auc", "at_least": 0.75}],
        "slices": ["carrier = 'Čápi'"],
        "registry": str(folder / "registry"),
    }


def scoring_spec_of(folder: Path) -> dict[str, Any]:
    """The scoring spec of the quickstart's table."""
    return {
        "model": "parcel-late",
        "registry": str(folder / "registry"),
        "input": str(folder / "parcels"),
        "output": str(folder / "scores"),
        "date": "day",
        "key": ["parcel_id", "carrier"],
    }


def write_table(folder: Path, rows_per_day: int = ROWS_PER_DAY, n_days: int = N_DAYS, seed: int = 0) -> None:
    """Write the deliveries, one Hive partition `day=` for each day; the same bytes of data for the same arguments."""
    for number in range(n_days):
        day = FIRST_DAY + timedelta(days=number)
        place = folder / f"day={day}"
        place.mkdir(parents=True, exist_ok=True)
        table = make_day(np.random.default_rng((seed, number)), day, number, rows_per_day)
        pq.write_table(table, place / "part-0.parquet", row_group_size=max(1, rows_per_day // 4))


def make_day(rng: np.random.Generator, day: date, number: int, n_rows: int) -> pa.Table:
    """The deliveries of one day."""
    carrier = rng.choice(len(CARRIERS), n_rows, p=(0.35, 0.25, 0.15, 0.1, 0.1, 0.05))
    origin, destination = rng.choice(len(CITIES), n_rows), rng.choice(len(CITIES), n_rows)
    distance_km = np.abs(origin - destination) * 310.0 + rng.gamma(2.0, 60.0, n_rows)
    weight_kg = rng.lognormal(0.5, 0.9, n_rows)
    # Fuel gets dearer, and carriers slower with it: a feature that drifts.
    fuel_price = 1.6 + 0.05 * number + rng.normal(0, 0.03, n_rows)
    minute = rng.integers(0, 24 * 60, n_rows)
    express = rng.random(n_rows) < 0.2
    slow = np.array((0.0, -0.2, 0.5, 0.1, -0.6, 0.9))[carrier]
    late = 0.0016 * distance_km + slow + 0.9 * (fuel_price - 1.6) - 0.9 * express + 0.35 * np.log(weight_kg)
    late += 0.5 * ((minute > 17 * 60) & (carrier < 3)) + 0.4 * (origin == 7) * (weight_kg > 3)
    hours = np.exp(3.0 + 0.55 * late + rng.normal(0, 0.35, n_rows))
    names, cities = np.array(CARRIERS), np.array(CITIES)
    start = np.datetime64(day.isoformat(), "us")
    return pa.table({
        "parcel_id": pa.array(number * n_rows + np.arange(n_rows)),
        "carrier": pa.array(names[carrier], mask=rng.random(n_rows) < 0.01),
        "origin": pa.array(cities[origin]),
        "destination": pa.array(cities[destination]),
        "distance_km": pa.array(distance_km, mask=rng.random(n_rows) < 0.04),
        "weight_kg": pa.array(weight_kg.astype(np.float32), mask=rng.random(n_rows) < 0.08),
        "fuel_price": pa.array(fuel_price),
        "express": pa.array(express),
        "sent_at": pa.array(start + minute.astype("timedelta64[m]"), pa.timestamp("us", "UTC")),
        "hours": pa.array(hours, mask=rng.random(n_rows) < 0.005),
    })  # fmt: skip


def _table(trained: dict[str, Trained], champion: int | None) -> Table:
    names = ("auc", "average_precision", "logloss", "brier", "accuracy")
    table = Table("parcel-late, on test", *(name.replace("_", " ") for name in names), "seconds")
    for kind, t in trained.items():
        metrics, seconds = t.summary["metrics"]["test"], sum(t.summary["seconds"].values())
        mark = " (champion)" if t.version == champion else ""
        table.add_row(f"{kind}:{t.version}{mark}", *(f"{metrics[n]:.4f}" for n in names), f"{seconds:.0f}")
    baseline = next(iter(trained.values())).summary["metrics"]["baseline"]
    table.add_row("constant model", *("-" if baseline[n] is None else f"{baseline[n]:.4f}" for n in names), "-")
    return table


def _first_rows(rows: pa.Table, day: date, n_rows: int = 3) -> Table:
    names = [name for name in rows.column_names if name != "day"]
    table = Table(*names, title=f"the first of {rows.num_rows:,} rows published for {day}", title_justify="left")
    for row in rows.slice(0, n_rows).to_pylist():
        table.add_row(*(f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names))
    return table


def _next_steps(folder: Path) -> str:
    registry, parcels = (shlex.quote(str(folder / name)) for name in ("registry", "parcels"))
    boosted, scoring = (shlex.quote(str(folder / name)) for name in ("xgboost.yaml", "score.yaml"))
    commands = [
        f"models list --registry {registry}",
        f"models history parcel-late --registry {registry}",
        f"report parcel-late --registry {registry}",
        f"evaluate parcel-late --data {parcels} --where 'hours > 0' --registry {registry}",
        f"plan {boosted}",
        f"train {boosted} --set model.params.max_depth=8",
        f"score {scoring} --from {FIRST_DAY}",
        f"serve parcel-late --registry {registry}",
    ]
    # `uv run` says by UV that it runs us: without it the command is on no PATH.
    claydist = "uv run claydist" if "UV" in os.environ else "claydist"
    return "\n".join(["Next:", *(f"  {claydist} {command}" for command in commands)])
