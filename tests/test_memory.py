from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from claydist import cluster
from claydist.cluster import Node
from claydist.errors import ClusterError
from claydist.memory import BASE_MB, check_memory, estimate_mb, n_nodes
from claydist.predictor import Target
from claydist.spec import TrainSpec
from claydist.specfile import load_spec


def make_spec(kind: str, model: Mapping[str, Any] | None = None, **data: Any) -> TrainSpec:
    given = {"kind": "linear"} if kind == "linear" else {"kind": "xgboost", "rounds": 10, **(model or {})}
    return load_spec(TrainSpec, {"name": "m", "data": {"path": "x", "label": "y", **data}, "model": given})


def per_row(field: pa.Field, **data: Any) -> float:
    """Bytes that a linear model needs for one more row of one column."""
    spec = make_spec("linear", **data)
    million = estimate_mb(spec, [field], 2_000_000, 1) - estimate_mb(spec, [field], 1_000_000, 1)
    return million - estimate_mb(spec, [], 2_000_000, 1) + estimate_mb(spec, [], 1_000_000, 1)


@pytest.mark.parametrize(
    ("kind", "n_bytes"),
    [(pa.float32(), 4), (pa.float64(), 8), (pa.int16(), 4), (pa.int64(), 8), (pa.string(), 4), (pa.bool_(), 4),
     (pa.dictionary(pa.int32(), pa.string()), 4), (pa.timestamp("us"), 8), (pa.decimal128(9, 2), 8)],
    ids=str,
)  # fmt: skip
def test_a_linear_model_keeps_columns_in_the_width_they_are_computed_with(kind: pa.DataType, n_bytes: int) -> None:
    assert per_row(pa.field("a", kind)) == pytest.approx(n_bytes)


def test_each_part_of_a_timestamp_counts() -> None:
    when = pa.field("t", pa.timestamp("us"))
    assert per_row(when, calendar={"t": ["hour", "month", "dayofweek"]}) == pytest.approx(24)
    assert per_row(pa.field("a", pa.int64()), types={"a": "category"}) == pytest.approx(4)


def test_workers_share_the_rows_and_not_what_each_process_needs() -> None:
    fields = [pa.field(f"f{j}", pa.float32()) for j in range(28)]
    for kind in ("xgboost", "linear"):
        one, four = (estimate_mb(make_spec(kind), fields, 40_000_000, n) for n in (1, 4))
        assert four < one < 4 * four
        assert estimate_mb(make_spec(kind), fields, 0, 1) < BASE_MB + 50


FLOATS = [pa.field(f"f{j}", pa.float64()) for j in range(30)]


def test_a_ranking_is_held_three_times_while_it_is_sorted_whatever_its_size() -> None:
    for n_rows in (1_000_000, 50_000_000):
        plain = estimate_mb(make_spec("xgboost"), FLOATS, n_rows, 1)
        ranking = estimate_mb(make_spec("xgboost", group="q"), FLOATS, n_rows, 1)
        assert ranking - plain == pytest.approx(3 * 8 * 30 * n_rows / 1e6)
    # Measured with XGBoost 3.2: 738 MB over the empty process.
    assert 738 < estimate_mb(make_spec("xgboost", group="q"), FLOATS, 1_000_000, 1) - BASE_MB < 1.3 * 738


def test_each_class_or_quantile_has_gradients_and_predictions_of_its_own() -> None:
    spec, fields = make_spec("xgboost"), FLOATS[:5]
    one, three, many = (estimate_mb(spec, fields, 1_000_000, 1, n) for n in (1, 3, 23))
    # Measured with XGBoost 3.2: 315 MB between 3 and 23 classes.
    assert many - three == pytest.approx(315, rel=0.05)
    assert many - one == pytest.approx(11 * (three - one))
    quantiles = make_spec("xgboost", {"quantiles": [0.1, 0.5, 0.9]})
    assert estimate_mb(quantiles, fields, 1_000_000, 1) == three


def test_classes_that_do_not_fit_are_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: [Node("a", "a", 4, 4, 2 * 10**9)])
    part = SimpleNamespace(inventory=SimpleNamespace(schema=pa.schema(FLOATS)), n_rows=1_000_000)

    def check(target: Target) -> None:
        prepared: Any = SimpleNamespace(
            parts={"train": part}, trained_parts=["train"], roles=SimpleNamespace(features=["f0", "f1"]), target=target
        )
        check_memory(make_spec("xgboost"), prepared, {"n_workers": 1})

    check(Target("multiclass", "y", tuple(range(50))))
    with pytest.raises(ClusterError, match=r"1 workers would need about 3,\d+ MB each"):
        check(Target("multiclass", "y", tuple(range(200))))


@pytest.mark.parametrize(("n_rows", "n_features", "depth", "measured"), [
    # Measured with XGBoost 3.2, over the empty process, three rounds of noise.
    (40_000, 100, 14, 1253), (8_000, 1_000, 10, 2965),
])  # fmt: skip
def test_the_histograms_of_deep_trees_count(n_rows: int, n_features: int, depth: int, measured: float) -> None:
    fields = [pa.field(f"f{j}", pa.float32()) for j in range(n_features)]
    spec = make_spec("xgboost", {"params": {"max_depth": depth}})
    assert estimate_mb(spec, fields, n_rows, 1) - BASE_MB == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(("params", "n_rows", "nodes"), [
    ({}, 10**6, 64), ({"max_depth": 3}, 10**6, 8), ({"max_depth": 0, "max_leaves": 31}, 10**6, 62),
    ({"max_depth": 0}, 10**7, 65_536), ({"max_depth": 0, "max_cached_hist_node": 100}, 10**7, 100),
    ({"max_depth": 20}, 1400, 100), ({"max_depth": 20, "min_child_weight": 40}, 1400, 35),
    ({"max_depth": "deep", "max_leaves": None}, 10**6, 64),
])  # fmt: skip
def test_nodes_with_a_histogram(params: dict[str, Any], n_rows: int, nodes: float) -> None:
    assert n_nodes(make_spec("xgboost", {"params": params}).model, n_rows) == nodes


def test_few_rows_of_many_columns_take_small_batches_and_an_explicit_hessian_counts() -> None:
    fields = [pa.field(f"f{j}", pa.float32()) for j in range(20_000)]
    linear = make_spec("linear")
    assert estimate_mb(linear, fields, 5_000, 1) < BASE_MB + 3 * 4 * 20_000 * 5_000 * 2 / 1e6
    newton = linear.model_copy(update={"model": linear.model.model_copy(update={"solver": "newton"})})
    hessian = 20_000**2 * 8 / 1e6
    assert estimate_mb(newton, fields, 5_000, 1) - estimate_mb(linear, fields, 5_000, 1) >= hessian
