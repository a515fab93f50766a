from __future__ import annotations

import math
import pickle
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claydist.features import Feature, FeaturePlan
from claydist.rows import RowEncoder, RowError
from claydist.schema import Column, Schema
from claydist.values import to_plain

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from serving_models import flights, plan_for

TABLE = flights(400)
PLAN = plan_for(TABLE)
ENCODER = RowEncoder(PLAN)
ROWS = to_plain(TABLE, PLAN)
GOOD = {
    **ROWS[0],
    "carrier": "AA",
    "distance": 1.5,
    "late": True,
    "hour": 3,
    "gate": 2,
    "departs": "2013-05-01T10:00:00",
}


def plan(*features: Feature, unseen: Any = "missing", **types: Any) -> FeaturePlan:
    columns = tuple(Column(name, *(kind if isinstance(kind, tuple) else (kind,))) for name, kind in types.items())
    return FeaturePlan(Schema(columns), features, unseen)


def assert_same(encoder: RowEncoder, matrix: Any, table: pa.Table) -> None:
    encoded, _ = encoder.encoded(matrix.values)
    expected = encoder.plan.encode(table)
    for f, found, wanted in zip(encoder.plan.features, encoded.columns, expected.columns, strict=True):
        assert np.array_equal(np.asarray(found, wanted.dtype), wanted, equal_nan=wanted.dtype.kind == "f"), f.name
    assert dict(matrix.unseen) == dict(expected.unseen)
    assert np.array_equal(encoder.plan.tree_matrix(encoded), encoder.plan.tree_matrix(expected), equal_nan=True)


def test_rows_give_the_bits_of_the_table() -> None:
    assert_same(ENCODER, ENCODER.from_rows(ROWS), TABLE)


def test_columns_give_the_bits_of_the_table() -> None:
    columns = {name: [row[name] for row in ROWS] for name in reversed(PLAN.schema.names)}
    assert_same(ENCODER, ENCODER.from_columns(columns), TABLE)


def test_names_come_in_any_order() -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    assert np.array_equal(ENCODER.from_rows(turned).values, ENCODER.from_rows(ROWS).values, equal_nan=True)


LARGEST = float(np.finfo(np.float32).max)
numbers = st.none() | st.floats(-LARGEST, LARGEST) | st.integers(-(2**63), 2**63 - 1)
# What nanoseconds of int64 can hold, in microseconds.
LIMITS, DAY = (datetime(1677, 9, 21, 0, 12, 43, 145225), datetime(2262, 4, 11, 23, 47, 16, 854775)), timedelta(days=1)
UNSIGNED = ("u", "v")
values: dict[str, st.SearchStrategy[Any]] = {
    "n": numbers,
    "f": st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
    "i": st.none() | st.integers(-(2**63), 2**63 - 1),
    "b": st.none() | st.booleans(),
    "c": st.none() | st.sampled_from(["a", "b", "ü", "日本"]) | st.text(max_size=5),
    "k": st.none() | st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1),
    "u": st.none() | st.integers(0, 2**64 - 1),
    "v": st.none() | st.integers(2**63 - 2, 2**63 + 2) | st.integers(0, 2**64 - 1),
    "t": st.none() | st.datetimes(*LIMITS),
    # A day less, for Arrow's local times overflow where UTC just fits.
    "z": st.none() | st.datetimes(LIMITS[0] + DAY, LIMITS[1] - DAY, timezones=st.just(UTC)),
    "d": st.none() | st.dates(date(1677, 9, 22), date(2262, 4, 11)),
}
MIXED = plan(
    Feature("n", "n", "numeric"),
    Feature("f", "f", "numeric"),
    Feature("i", "i", "numeric"),
    Feature("b", "b", "numeric"),
    Feature("c", "c", "categorical", vocabulary=("a", "b", "ü")),
    Feature("k", "k", "categorical", vocabulary=("-1", "0", "3"), other=True),
    Feature("u", "u", "numeric"),
    Feature("v", "v", "categorical", vocabulary=("9223372036854775807", "9223372036854775808", "9223372036854775809")),
    Feature("t", "t", "seconds", origin_ns=1_370_000_000_123_456_789),
    Feature("t.hour", "t", "calendar", part="hour"),
    Feature("z.hour", "z", "calendar", part="hour"),
    Feature("z", "z", "seconds", origin_ns=7),
    Feature("d", "d", "seconds", origin_ns=0),
    n="float", f="float", i="integer", b="boolean", c="string", k="integer", u="integer", v="integer",
    t="timestamp", z=("timestamp", "America/New_York"), d="date",
)  # fmt: skip


def spelled(name: str, value: Any) -> Any:
    if value is None or name not in "tzd":
        return value
    return value.isoformat().replace("+00:00", "Z")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.fixed_dictionaries(values), min_size=1, max_size=6))
def test_any_row_is_encoded_as_its_table(rows: list[dict[str, Any]]) -> None:
    types = {c.name: c.arrow for c in MIXED.schema.columns} | dict.fromkeys(UNSIGNED, pa.uint64())
    for row in rows:
        row["n"] = None if row["n"] is None else float(row["n"])
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})
    encoder = RowEncoder(MIXED)
    assert_same(encoder, encoder.from_rows([{k: spelled(k, v) for k, v in row.items()} for row in rows]), table)
    assert_same(encoder, encoder.from_rows(to_plain(table, MIXED)), table)


def test_unsigned_integers_are_encoded_as_their_table() -> None:
    some = plan(Feature("u", "u", "numeric"), Feature("v", "v", "categorical", vocabulary=(str(2**64 - 1),)),
                u="integer", v="integer")  # fmt: skip
    numbers = np.array([0, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1025, 2**64 - 1025, 2**64 - 1], np.uint64)
    table, encoder = pa.table({"u": numbers, "v": numbers}), RowEncoder(some)
    assert_same(encoder, encoder.from_rows(to_plain(table, some)), table)
    assert_same(encoder, encoder.from_columns({"u": numbers, "v": numbers}), table)
    assert_same(encoder, encoder.from_columns({name: numbers.tolist() for name in "uv"}), table)


def test_times_are_taken_as_far_as_nanoseconds_go() -> None:
    times = plan(
        Feature("t", "t", "seconds"), Feature("t.hour", "t", "calendar", part="hour"), Feature("z", "z", "seconds"),
        t="timestamp", z=("timestamp", "UTC"),
    )  # fmt: skip
    ends = pa.array([-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1, None], pa.int64())
    table = pa.table({"t": ends.cast(pa.timestamp("ns")), "z": ends.cast(pa.timestamp("ns", "UTC"))})
    encoder, rows = RowEncoder(times), to_plain(table, times)
    assert rows[5] == {"t": "2262-04-11T23:47:16.854775807", "z": "2262-04-11T23:47:16.854775807Z"}
    assert_same(encoder, encoder.from_rows(rows), table)
    # What counts is the time in UTC, whatever the day where it is said.
    moved = [{**rows[5], "z": "2262-04-12T01:47:16.854775807+02:00"}]
    assert_same(encoder, encoder.from_rows(moved), table[5:6])
    for wrong in ("2262-04-11T23:47:16.854775808Z", "2262-04-11T23:47:16-00:01", "1677-09-21T00:12:43.145224191Z"):
        with pytest.raises(RowError, match="in the years 1677 to 2262"):
            encoder.from_rows([{**rows[0], "z": wrong}])


def test_zones_and_nanoseconds() -> None:
    times = plan(Feature("z", "z", "seconds"), z=("timestamp", "Europe/Berlin"))
    texts = [
        "2013-06-30T12:00:00.123456789Z",
        "2013-06-30T14:00:00.123456789+02:00",
        "2013-06-30T09:30:00.123456789-0230",
    ]
    found = RowEncoder(times).from_rows([{"z": text} for text in texts]).values[:, 0]
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(datetime(2013, 6, 30, 12, tzinfo=UTC).timestamp() + 0.123456789)


def test_offset_is_the_last_column() -> None:
    encoder = RowEncoder(plan(Feature("x", "x", "numeric"), x="float", base="float"), offset="base")
    encoded, offset = encoder.encoded(encoder.from_rows([{"base": 2.5, "x": 1.0}, {"x": 3.0, "base": 0}]).values)
    assert offset is not None
    assert offset.tolist() == [2.5, 0.0]
    assert encoded.columns[0].tolist() == [1.0, 3.0]
    with pytest.raises(RowError, match="base: expected a number in every row, found null in row 1"):
        encoder.from_rows([{"base": 2.5, "x": 1.0}, {"x": 3.0, "base": None}])


def test_missing_and_unseen_are_counted() -> None:
    matrix = ENCODER.from_rows([{**GOOD, "carrier": None, "distance": None}, {**GOOD, "carrier": "??"}])
    assert matrix.missing == {"carrier": 1, "distance": 1}
    assert matrix.unseen == {"carrier": 1}


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"distance": "12"}, "distance", "expected a number or null, found '12'"),
        ({"distance": True}, "distance", "found true"),
        ({"late": 1}, "late", "expected true, false or null"),
        ({"carrier": 5}, "carrier", "expected text or null"),
        ({"gate": 1.5}, "gate", "an integer"),
        ({"hour": 2.0**64}, "hour", "64 bits"),
        ({"hour": -(2**63) - 1}, "hour", "64 bits"),
        ({"gate": 2**64}, "gate", "64 bits"),
        ({"hour": 2**64}, "hour", "64 bits"),
        ({"distance": 10**400}, "distance", "up to 3.4e+38"),
        ({"distance": 1e39}, "distance", "up to 3.4e+38"),
        ({"distance": math.inf}, "distance", "up to 3.4e+38"),
        ({"distance": {}}, "distance", "found an object"),
        ({"departs": "2013-02-30T00:00:00"}, "departs", "a time that exists"),
        ({"departs": "2013-05-01T00:00:00Z"}, "departs", "without a zone"),
        ({"booked": "2013-05-01T00:00:00"}, "booked", "America/New_York"),
        ({"booked": "2013-05-01T00:00:00+99:00"}, "booked", "a time that exists"),
        ({"departs": "0001-01-01"}, "departs", "1677"),
        ({"day": "2013-05-01T10:00"}, "day", "a date as text"),
        ({"day": 17}, "day", "a date as text"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(RowError, match="expected") as caught:
        ENCODER.from_rows([GOOD, {**GOOD, **change}])
    assert caught.value.field == f"rows[1].{field}"
    assert text in caught.value.message


def test_names_are_checked() -> None:
    with pytest.raises(RowError, match="'carier' is unknown, did you mean 'carrier'") as caught:
        ENCODER.from_rows([{**{k: v for k, v in GOOD.items() if k != "carrier"}, "carier": "AA"}])
    assert caught.value.field == "rows[0].carrier"
    with pytest.raises(RowError, match="'extra' is unknown"):
        ENCODER.from_rows([{**GOOD, "extra": 1}])
    for row in ([1], "text", None, 5):
        with pytest.raises(RowError, match="expected an object"):
            ENCODER.from_rows([row])
    with pytest.raises(RowError, match="one row at least"):
        ENCODER.from_rows([])


def test_columns_are_checked() -> None:
    columns = {name: [row[name] for row in ROWS] for name in PLAN.schema.names}
    with pytest.raises(RowError, match="one length"):
        ENCODER.from_columns({**columns, "hour": [1]})
    with pytest.raises(RowError, match=r"inputs.hour\[0\]"):
        ENCODER.from_columns({**columns, "hour": ["x"] * len(ROWS)})
    with pytest.raises(RowError, match="infinite"):
        ENCODER.from_columns({**columns, "distance": np.full(len(ROWS), np.inf)})


def test_a_matrix_is_for_numbers_only() -> None:
    encoder = RowEncoder(plan(Feature("a", "a", "numeric"), Feature("b", "b", "numeric"), b="float", a="float"))
    assert encoder.from_matrix(np.array([[1.0, 2.0]])).values.tolist() == [[2.0, 1.0]]
    for wrong in (np.ones((1, 3)), np.ones(2), np.ones((0, 2)), np.array([[np.inf, 1]])):
        with pytest.raises(RowError):
            encoder.from_matrix(wrong)
    with pytest.raises(RowError, match="one input per column"):
        ENCODER.from_matrix(np.ones((1, len(PLAN.schema.names))))


def test_unseen_error_is_an_error() -> None:
    strict = plan(Feature("c", "c", "categorical", vocabulary=("a",)), unseen="error", c="string")
    with pytest.raises(RowError, match="training has seen"):
        RowEncoder(strict).from_rows([{"c": "b"}])


def test_errors_survive_pickling() -> None:
    error = RowError("said", ["a"], "rows[0].x")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field) == (str(error), "rows[0].x")
