"""Small models for the tests of serving, written to a registry."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import xgboost as xgb

from claydist.arrays import nanoseconds, native_values, text_values
from claydist.bundle import golden_rows, write_bundle
from claydist.features import FeaturePlan, build_plan, is_categorical
from claydist.models import LinearModel, XGBoostModel
from claydist.predictor import Predictor, Target
from claydist.profile import ColumnProfile, category_sums, numeric_sums, time_sums
from claydist.registry import Registry
from claydist.schema import Column, Schema, column_of
from claydist.spec import DataSpec

CARRIERS = ("AA", "B6", "DL", "UA", "Ünïted", "日本")


def flights(n_rows: int, seed: int = 0) -> pa.Table:
    """Rows with every type that a column can have, and nulls in each."""
    rng = np.random.default_rng(seed)

    def nulls(values: Any) -> list[Any]:
        gone = rng.random(n_rows) < 0.1
        return [None if g else v for g, v in zip(gone, values, strict=True)]

    base = datetime(2013, 1, 1)
    times = [base + timedelta(seconds=int(s), microseconds=int(s) % 1000) for s in rng.integers(0, 3e7, n_rows)]
    return pa.table({
        "distance": pa.array(nulls((rng.random(n_rows) * 3000).tolist()), pa.float64()),
        "carrier": pa.array(nulls(rng.choice(CARRIERS, n_rows).tolist()), pa.string()),
        "hour": pa.array(nulls(rng.integers(0, 24, n_rows).tolist()), pa.int64()),
        "seats": pa.array(nulls(rng.random(n_rows).astype(np.float32).tolist()), pa.float32()),
        "gate": pa.array(nulls(rng.integers(1, 5, n_rows).tolist()), pa.int64()),
        "late": pa.array(nulls((rng.random(n_rows) < 0.5).tolist()), pa.bool_()),
        "departs": pa.array(nulls(times), pa.timestamp("us")),
        "booked": pa.array(nulls(times), pa.timestamp("us", "America/New_York")),
        "day": pa.array(nulls([t.date() for t in times]), pa.date32()),
    })  # fmt: skip


DATA = DataSpec(
    path=("x",), label={"column": "y"}, types={"gate": "category"}, max_categories=5,
    calendar={"booked": ("hour", "dayofweek"), "departs": ("month",)},
)  # fmt: skip


def plan_for(table: pa.Table, data: DataSpec = DATA) -> FeaturePlan:
    schema = Schema(tuple(column_of(f, "the test") for f in table.schema))
    return build_plan(data, schema, {c.name: _profile(table.column(c.name), c, data) for c in schema.columns})


def _profile(column: pa.ChunkedArray, c: Column, data: DataSpec) -> ColumnProfile:
    if is_categorical(c, data):
        return category_sums(text_values(column, c.name)).profile()
    if c.type in ("timestamp", "date"):
        import pyarrow.compute as pc

        functions = {"hour": pc.hour, "dayofweek": pc.day_of_week, "month": pc.month, "day": pc.day}
        parts = {p: native_values(functions[p](column)) for p in data.calendar.get(c.name, ())}
        return time_sums(nanoseconds(column, c.name), None, parts).profile()
    return numeric_sums(native_values(column), None).profile()


def boosted(
    table: pa.Table, task: str = "binary", *, data: DataSpec = DATA, rounds: int = 10, depth: int = 4
) -> Predictor:
    plan = plan_for(table, data)
    X = plan.tree_matrix(plan.encode(table))
    rng = np.random.default_rng(1)
    y = (np.nan_to_num(X[:, 0]) + rng.normal(size=len(X)) > 1000).astype(int)
    params: dict[str, Any] = {"max_depth": depth, "nthread": 1, "objective": "binary:logistic"}
    target = Target("binary", "y", (False, True), above=15)
    if task == "multiclass":
        y = y + (np.nan_to_num(X[:, 2]) > 2)
        params |= {"objective": "multi:softprob", "num_class": 3}
        target = Target("multiclass", "y", ("early", "late", "spät"))
    elif task == "regression":
        params["objective"] = "reg:squarederror"
        target = Target("regression", "y")
    matrix = xgb.DMatrix(X, y, feature_types=plan.kinds, enable_categorical=True)
    booster = xgb.train(params, matrix, rounds)
    return Predictor(plan, XGBoostModel(bytes(booster.save_raw("ubj")), task), target)


def linear(table: pa.Table, task: str = "binary") -> Predictor:
    plan = plan_for(table)
    rng = np.random.default_rng(2)
    n_outputs = 1
    coef = rng.normal(size=(n_outputs, plan.n_dense + plan.n_onehot))
    loss, target = ("logistic", Target("binary", "y", ("no", "yes")))
    if task == "regression":
        loss, target = ("squared", Target("regression", "y"))
    return Predictor(plan, LinearModel(coef, rng.normal(size=n_outputs), loss, plan.n_dense), target)


def register(registry: Registry, name: str, predictor: Predictor, table: pa.Table, *, promote: bool = True) -> int:
    version = registry.reserve(name)
    manifest: Mapping[str, Any] = {"name": name, "version": version, "golden": golden_rows(table, predictor)}
    write_bundle(registry.version_store(name, version), predictor, manifest=manifest, extra_files={})
    if promote:
        registry.promote(name, version)
    return version
