"""Scoring on the session's Ray: all flights by day, tasks that die, and an S3 protocol server."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import xgboost as xgb

from claydist.display import Silent
from claydist.errors import DataError
from claydist.features import Feature, FeaturePlan
from claydist.models import XGBoostModel
from claydist.predictor import Predictor, Target
from claydist.schema import Column, Schema
from claydist.scoring.judge import evaluate_scores
from claydist.scoring.readers import read_scores
from claydist.scoring.run import score
from claydist.storage import open_store
from tests.scoring.support import (
    FIRST,
    expected,
    make_predictor,
    make_registry,
    make_spec,
    statuses,
    write_days,
)
from tests.stores import s3_options

__all__ = ["s3_options"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

FLIGHT_KEY = ["carrier", "flight", "origin"]


def flights_predictor(flights: pa.Table) -> Predictor:
    """A boosted model of four columns, trained on some flights."""
    kinds = {"distance": "float", "hour": "float", "carrier": "string", "month": "integer"}
    columns = tuple(Column(name, kind) for name, kind in kinds.items())  # type: ignore[arg-type]
    carriers = tuple(sorted(set(flights.column("carrier").to_pylist()) - {"OO"}))  # one is unseen
    features = (
        Feature("distance", "distance", "numeric"), Feature("hour", "hour", "numeric"),
        Feature("carrier", "carrier", "categorical", vocabulary=carriers), Feature("month", "month", "numeric"),
    )  # fmt: skip
    plan = FeaturePlan(Schema(columns), features)
    some = flights.take(pa.array(np.random.default_rng(0).choice(len(flights), 20_000)))
    y = np.nan_to_num(some.column("arr_delay").to_numpy(), nan=60) > 15
    matrix = xgb.DMatrix(plan.tree_matrix(plan.encode(some)), y, feature_types=plan.kinds, enable_categorical=True)
    raw = bytes(xgb.train({"objective": "binary:logistic", "max_depth": 5}, matrix, 20).save_raw("ubj"))
    return Predictor(plan, XGBoostModel(raw, "binary"), Target("binary", "arr_delay", (False, True), above=15.0))


def test_all_flights_by_day(tmp_path: Path, shared_data: Path) -> None:
    table = ds.dataset(shared_data / "flights13", partitioning="hive", format="parquet").to_table()
    registry = make_registry(tmp_path / "registry", predictor := flights_predictor(table))
    spec = make_spec(
        tmp_path, input=str(shared_data / "flights13"), date={"year": "year", "month": "month", "day": "day"},
        key=FLIGHT_KEY,
    )  # fmt: skip
    summary = score(spec, registry, Silent())
    assert len(statuses(summary)) == 365
    assert set(statuses(summary).values()) == {"published"}
    found = read_scores(str(tmp_path / "out"))
    assert found.num_rows == table.num_rows == 336_776
    days = [f"2013-{m:02}-{d:02}" for m, d in zip(table["month"].to_pylist(), table["day"].to_pylist(), strict=True)]
    wanted = {str(row["values"]): row["counts"] for row in pc.value_counts(pa.array(days)).to_pylist()}
    assert {one["date"]: one["rows"] for one in summary.summary["dates"]} == wanted
    assert len(found.group_by(["dt", *FLIGHT_KEY]).aggregate([])) == found.num_rows
    scored = table.select(FLIGHT_KEY).append_column("dt", pa.array(days).cast(pa.date32()))
    for name, column in zip(predictor.target.output_columns, predictor.predict(table).columns, strict=True):
        scored = scored.append_column(name, column)
    order = [(name, "ascending") for name in ("dt", *FLIGHT_KEY)]
    assert scored.select(found.column_names).sort_by(order).equals(found.sort_by(order))
    again = score(spec, registry, Silent())
    assert set(statuses(again).values()) == {"already"}
    judged = evaluate_scores(str(tmp_path / "out"), _labels(tmp_path, table))
    assert judged["rows"] == table.num_rows - table.column("arr_delay").null_count
    assert judged["unlabelled"] == table.column("arr_delay").null_count
    assert len(judged["dates"]) == 365


def _labels(tmp_path: Path, table: pa.Table) -> str:
    path = tmp_path / "labels.parquet"
    pq.write_table(table.select(["year", "month", "day", *FLIGHT_KEY, "arr_delay"]), path)
    return str(path)


def test_another_year_scores_with_its_new_categories_counted(tmp_path: Path, shared_data: Path) -> None:
    table = ds.dataset(shared_data / "flights13", partitioning="hive", format="parquet").to_table()
    registry = make_registry(tmp_path / "registry", flights_predictor(table))
    spec = make_spec(tmp_path, input=str(shared_data / "flights17"), date=None, key=FLIGHT_KEY)
    summary = score(spec, registry, Silent())
    assert summary.summary["dates"][0]["rows"] == ds.dataset(shared_data / "flights17").count_rows()
    manifest = open_store(tmp_path / "out" / "all" / "_manifest.json").read_json()
    assert manifest["unseen"]["carrier"] > 0


def test_another_year_with_an_unzoned_timestamp_is_refused(tmp_path: Path, shared_data: Path) -> None:
    """flights13 says its zone and flights17 does not: the same wall clock would be read hours off."""
    table = ds.dataset(shared_data / "flights13", partitioning="hive", format="parquet").to_table()
    kind = table.schema.field("time_hour").type
    column = Column("time_hour", "timestamp", zone=kind.tz)
    plan = FeaturePlan(Schema((column,)), (Feature("time_hour.hour", "time_hour", "calendar", part="hour"),))
    some = table.slice(0, 20_000)
    matrix = xgb.DMatrix(plan.tree_matrix(plan.encode(some)), np.arange(len(some)) % 2)
    raw = bytes(xgb.train({"objective": "binary:logistic"}, matrix, 2).save_raw("ubj"))
    predictor = Predictor(plan, XGBoostModel(raw, "binary"), Target("binary", "y", (False, True)))
    registry = make_registry(tmp_path / "registry", predictor)
    spec = make_spec(tmp_path, input=str(shared_data / "flights17"), date=None, key=FLIGHT_KEY)
    with pytest.raises(DataError, match="time_hour"):
        score(spec, registry, Silent())
    assert not (tmp_path / "out").exists()
    same = make_spec(tmp_path, input=str(shared_data / "flights13"), date=None, key=FLIGHT_KEY)
    assert score(same, registry, Silent()).summary["dates"][0]["rows"] == table.num_rows


def test_a_worker_that_dies_costs_its_task_only(tmp_path: Path) -> None:
    """The first task to be given a certain city kills its process, once."""
    import ray

    registry = make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=3, n_rows=500, row_group_size=100)
    marker = tmp_path / "died"

    from claydist.scoring import work, worker

    class Dies(work.RayWork):
        def map(self, function: Any, items: Any, on_done: Any = None) -> list[Any]:
            def dying(item: Any) -> Any:
                if isinstance(item, worker.ScoreTask) and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(item)

            return super().map(dying, items, on_done)

    summary = score(make_spec(tmp_path), registry, Silent(), work=Dies())
    assert marker.exists()
    assert set(statuses(summary).values()) == {"published"}
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))
    assert ray.is_initialized()


def test_the_same_on_an_s3_server(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    root = f"s3://claydist/{uuid.uuid4().hex}"
    predictor = make_predictor()
    registry = make_registry(f"{root}/registry", predictor, s3_options)
    days = write_days(tmp_path / "in", n_days=2)
    source = open_store(f"{root}/in", s3_options)
    for path in (tmp_path / "in").rglob("*.parquet"):
        source.join(str(path.relative_to(tmp_path / "in"))).write(path.read_bytes())
    # In the tasks' environment are no credentials: the spec's options have them.
    options = {**s3_options, "key": "testing", "secret": "testing"}
    spec = make_spec(root, storage_options=options)
    summary = score(spec, registry, Silent())
    assert set(statuses(summary).values()) == {"published"}
    assert read_scores(f"{root}/out", storage_options=options).equals(expected(predictor, days))
    assert set(statuses(score(spec, registry, Silent())).values()) == {"already"}
    other = make_predictor(seed=2)
    make_registry(f"{root}/registry", other, s3_options)
    assert set(statuses(score(spec, registry, Silent(), replace_stale=True)).values()) == {"published"}
    assert read_scores(f"{root}/out", FIRST, options).equals(expected(other, {FIRST: days[FIRST]}))
    listed = [f.path for f in open_store(f"{root}/out", options).files() if f.path.endswith(".parquet")]
    assert len(listed) == 2
