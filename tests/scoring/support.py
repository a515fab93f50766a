"""A small model in a registry, small inputs, and a cluster that is a loop: scoring without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost as xgb

from claydist.bundle import write_bundle
from claydist.display import Silent
from claydist.features import Feature, FeaturePlan
from claydist.models import XGBoostModel
from claydist.predictor import Predictor, Target
from claydist.registry import Registry, open_registry
from claydist.schema import Column, Schema
from claydist.scoring import worker
from claydist.scoring.run import ScoreSummary, score
from claydist.spec import ScoreSpec
from claydist.specfile import load_spec

NAME = "late"
CITIES = ("Brno", "København", "東京")
FIRST = date(2026, 11, 1)


class Loop:
    """Runs tasks one after another in this process; counts the units that were scored."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def share(self, files: Mapping[str, bytes]) -> Any:
        return dict(files)

    def warm(self, model: worker.ModelFiles) -> None:
        pass

    def ready(self) -> bool:
        return True

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], on_done: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        results = []
        for index, item in enumerate(items):
            if isinstance(item, worker.ScoreTask):
                self.scored += [work.unit.unit_id for work in item.works]
            results.append(function(item))
            if on_done:
                on_done(index, results[-1])
        return results


class Saying(Silent):
    """Keeps what was said, the stages and the progress."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []
        self.boards: list[dict[str, Any]] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def progress(self, board: Mapping[str, Any]) -> None:
        self.boards.append(dict(board))

    def say(self, text: str) -> None:
        self.said.append(text)


def make_rows(n_rows: int, seed: int = 0) -> pa.Table:
    """Rows with an id, a number with nulls, and a city with nulls."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n_rows)
    return pa.table({
        "id": pa.array(seed * 1_000_000 + np.arange(n_rows)),
        "x": pa.array(x, mask=rng.random(n_rows) < 0.1),
        "city": pa.array(np.array(CITIES)[rng.integers(0, 3, n_rows)], mask=rng.random(n_rows) < 0.1),
    })  # fmt: skip


def make_predictor(task: str = "binary", unseen: str = "missing", seed: int = 0) -> Predictor:
    """A boosted model of `x` and `city`."""
    features = (
        Feature("x", "x", "numeric"),
        Feature("city", "city", "categorical", vocabulary=tuple(sorted(CITIES))),
    )
    plan = FeaturePlan(Schema((Column("x", "float"), Column("city", "string"))), features, unseen)  # type: ignore[arg-type]
    rows = make_rows(2000, seed=99 + seed)
    X = plan.tree_matrix(plan.encode(rows))
    classes = {"binary": 2, "multiclass": 3}.get(task, 0)
    y = np.nan_to_num(X[:, 0]) + 0.3 * np.nan_to_num(X[:, 1], nan=2)
    labels = np.digitize(y, [0.3, 0.8][: classes - 1]) if classes else y
    params: dict[str, Any] = {"max_depth": 3, "nthread": 1, "seed": seed}
    params["objective"] = {"binary": "binary:logistic", "multiclass": "multi:softprob"}.get(task, "reg:squarederror")
    if task == "multiclass":
        params["num_class"] = 3
    matrix = xgb.DMatrix(X, labels, feature_types=["q", "c"], enable_categorical=True)
    raw = bytes(xgb.train(params, matrix, 5 + seed).save_raw("ubj"))
    names = {"binary": (False, True), "multiclass": ("lo", "mid", "hi")}.get(task, ())
    return Predictor(plan, XGBoostModel(raw, task), Target(task, "late", names))


def make_registry(folder: Path | str, predictor: Predictor | None = None, options: Any = None) -> Registry:
    """A registry with one more version, the champion."""
    registry = open_registry(str(folder), options=options)
    version = registry.reserve(NAME)
    spec = {"data": {"weight": None, "group": None, "types": {}}}
    write_bundle(
        registry.version_store(NAME, version), predictor or make_predictor(),
        manifest={"name": NAME, "version": version, "spec": spec}, extra_files={},
    )  # fmt: skip
    registry.promote(NAME, version)
    return registry


def write_days(folder: Path, n_days: int = 3, n_rows: int = 40, row_group_size: int = 15) -> dict[date, pa.Table]:
    """Rows by day, each in a Hive partition `dt=` of one file."""
    days = {}
    for number in range(n_days):
        day = FIRST + timedelta(days=number)
        days[day] = make_rows(n_rows, seed=number)
        place = folder / f"dt={day}"
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(days[day], place / "part-0.parquet", row_group_size=row_group_size)
    return days


def make_spec(folder: Path | str, **more: Any) -> ScoreSpec:
    """The spec that scores `folder/in` into `folder/out`, by `dt`."""
    tree = {
        "model": NAME, "registry": f"{folder}/registry", "input": f"{folder}/in", "output": f"{folder}/out",
        "date": "dt", "key": ["id"],
    }  # fmt: skip
    return load_spec(ScoreSpec, {**tree, **more})


def run_score(spec: ScoreSpec, registry: Registry, work: Loop | None = None, **choice: Any) -> ScoreSummary:
    """Score without Ray."""
    worker._loaded.clear()
    return score(spec, registry, choice.pop("display", Silent()), work=work or Loop(), **choice)


def statuses(summary: ScoreSummary) -> dict[str | None, str]:
    """Status by date."""
    return {one["date"]: one["status"] for one in summary.summary["dates"]}


def expected(predictor: Predictor, days: Mapping[date, pa.Table]) -> pa.Table:
    """What reading the scores of these days must give."""
    tables = []
    for day, rows in sorted(days.items()):
        table = pa.table({"id": rows.column("id")})
        for name, column in zip(predictor.target.output_columns, predictor.predict(rows).columns, strict=True):
            table = table.append_column(name, column)
        tables.append(table.append_column("dt", pa.repeat(pa.scalar(day, pa.date32()), len(rows))))
    return pa.concat_tables(tables)
