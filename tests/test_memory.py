from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from claydist.memory import BASE_MB, estimate_mb
from claydist.spec import TrainSpec
from claydist.specfile import load_spec


def make_spec(kind: str, **data: Any) -> TrainSpec:
    model = {"kind": "linear"} if kind == "linear" else {"kind": "xgboost", "rounds": 10}
    return load_spec(TrainSpec, {"name": "m", "data": {"path": "x", "label": "y", **data}, "model": model})


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
