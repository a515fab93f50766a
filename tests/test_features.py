from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.preprocessing import OneHotEncoder

from claydist.arrays import nanoseconds, native_values, text_values
from claydist.dataset.statistics import column_sums
from claydist.errors import DataError
from claydist.features import FeaturePlan, build_plan, check_types, concat_encoded, float32_warnings
from claydist.profile import ColumnProfile
from claydist.schema import Column, Schema, column_of
from claydist.spec import DataSpec

UTC = dt.UTC
UNSEEN = ("missing", "other", "error")


def spec(**keys: Any) -> DataSpec:
    return DataSpec(**{"path": "x", "label": "y", **keys})


def profiled(
    table: pa.Table, w: np.ndarray | None = None, *, missing_indicator: bool = False, **keys: Any
) -> tuple[FeaturePlan, dict[str, ColumnProfile]]:
    """The plan that training would make from these rows, and their profiles."""
    data = spec(**keys)
    schema = Schema(tuple(column_of(field, "x") for field in table.schema))
    profiles = {c.name: column_sums(c, table.column(c.name), w, data).profile() for c in schema.columns}
    return build_plan(data, schema, profiles, missing_indicator=missing_indicator), profiles


def plan_of(table: pa.Table, w: np.ndarray | None = None, **keys: Any) -> FeaturePlan:
    return profiled(table, w, **keys)[0]


def one(values: Any, kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"a": pa.array(values, kind)})


def trees(plan: FeaturePlan, table: pa.Table) -> np.ndarray:
    return plan.tree_matrix(plan.encode(table))


def mixed(n_rows: int, seed: int = 0) -> pa.Table:
    """Rows of every kind of column, nulls in each."""
    rng = np.random.default_rng(seed)
    null = rng.random((n_rows, 8)) < 0.15
    words = np.array(["Praha", "Zürich", "東京", "são", "a", "B", ""])
    seconds = rng.integers(0, 10**9, n_rows)
    moments = pa.array(seconds, mask=null[:, 5]).cast(pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "UTC"))
    return pa.table({
        "small": pa.array(rng.integers(-100, 100, n_rows).astype(np.int8), mask=null[:, 0]),
        "large": pa.array(rng.integers(-(2**40), 2**40, n_rows), mask=null[:, 1]),
        "real": pa.array(rng.normal(3, 5, n_rows), mask=null[:, 2]),
        "city": pa.array(words[rng.integers(0, 7, n_rows)], mask=null[:, 3]),
        "code": pa.array(rng.integers(0, 12, n_rows), mask=null[:, 4]),
        "at": moments,
        "flag": pa.array(rng.random(n_rows) < 0.4, mask=null[:, 6]),
        "day": pa.array(rng.integers(0, 20_000, n_rows).astype(np.int32), mask=null[:, 7]).cast(pa.date32()),
    })  # fmt: skip


MIXED: dict[str, Any] = {"types": {"code": "category"}, "calendar": {"day": ["dayofweek", "month", "day"]}}


@pytest.mark.parametrize(("kind", "values"), [
    *((kind, [1, None, 100, 0]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(),
                                             pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    (pa.int8(), [-128, 127]), (pa.uint64(), [0, 2**63]), (pa.int64(), [-(2**62), 5]),
    (pa.float16(), [np.float16(0.5), None, np.float16(-2)]), (pa.float32(), [0.1, None, -3.5]),
    (pa.float64(), [0.1, None, float("nan"), -1e30]),
    (pa.decimal128(10, 2), [Decimal("1.25"), None, Decimal("-99999.01")]), (pa.decimal256(40, 1), [Decimal("0.5")]),
    (pa.bool_(), [True, None, False]),
])  # fmt: skip
def test_numbers_of_every_arrow_type(kind: pa.DataType, values: list[Any]) -> None:
    array = pa.array(values, kind)
    expected = np.array([np.nan if v is None else float(v) for v in array.to_pylist()])
    for table in (pa.table({"a": array}), pa.table({"a": array.dictionary_encode()})):
        plan = plan_of(table)
        np.testing.assert_array_equal(trees(plan, table)[:, 0], expected.astype(np.float32))
        (encoded,) = plan.encode(table).columns
        np.testing.assert_array_equal(encoded.astype(np.float64), expected)


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int64(), pa.large_string()), pa.dictionary(pa.uint16(), pa.string()),
])  # fmt: skip
def test_text_of_every_arrow_type(kind: pa.DataType) -> None:
    values = ["ž", None, "a", "東京", "a", ""]
    table = pa.table(
        {"a": pa.array(values).cast(kind) if not pa.types.is_string_view(kind) else pa.array(values, kind)}
    )
    plan = plan_of(table)
    assert plan.features[0].vocabulary == ("", "a", "ž", "東京")
    np.testing.assert_array_equal(trees(plan, table)[:, 0], [2, np.nan, 1, 3, 1, 0])
    # A model trained on one type of text reads the others.
    np.testing.assert_array_equal(trees(plan, one(values))[:, 0], [2, np.nan, 1, 3, 1, 0])


MOMENTS = [dt.datetime(2024, 2, 29, 23, 30, 5), None, dt.datetime(1969, 12, 31), dt.datetime(2024, 3, 1)]


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_are_exact_seconds_since_the_earliest(unit: str, zone: str | None) -> None:
    table = one(MOMENTS, pa.timestamp(unit, zone))
    (feature,) = plan_of(table).features
    first = (dt.datetime(1969, 12, 31) - dt.datetime(1970, 1, 1)).total_seconds()
    assert (feature.kind, feature.origin_ns) == ("seconds", int(first * 1e9))
    (seconds,) = plan_of(table).encode(table).columns
    assert seconds.dtype == np.float64
    np.testing.assert_array_equal(seconds, [(m - MOMENTS[2]).total_seconds() if m else np.nan for m in MOMENTS])


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_dates_are_seconds_too(kind: pa.DataType) -> None:
    table = one([dt.date(2024, 3, 1), None, dt.date(2024, 2, 28)], kind)
    (seconds,) = plan_of(table).encode(table).columns
    np.testing.assert_array_equal(seconds, [2 * 86400, np.nan, 0])


def test_timestamps_beyond_nanoseconds_are_refused() -> None:
    with pytest.raises(DataError, match="column 'a' has a time outside the years 1677 to 2262"):
        nanoseconds(one([dt.datetime(3000, 1, 1)], pa.timestamp("us")).column("a"), "a")


def test_a_column_of_nulls_can_stand_for_any_type() -> None:
    table = mixed(50)
    plan = plan_of(table, **MIXED)
    nulls = pa.table({name: pa.nulls(3) for name in table.column_names})
    plan.schema.check(nulls.schema, "x")
    assert np.isnan(trees(plan, nulls)).all()
    assert plan.bad_rows(nulls) == {}


def test_a_column_null_in_every_training_row_is_nothing() -> None:
    for kind in (pa.float64(), pa.string(), pa.timestamp("us"), pa.int8()):
        table = one([None, None], kind)
        plan = plan_of(table, missing_indicator=True)
        assert np.isnan(trees(plan, table)).all()
        encoded = plan.encode(table)
        assert np.isfinite(plan.dense(encoded)).all()
        assert (plan.onehot(encoded) < 0).all()


def test_calendar_parts_are_local_to_the_zone_of_training() -> None:
    hours = {"calendar": {"a": ["hour", "dayofweek", "day", "month"]}}
    moments = [dt.datetime(2024, 7, 1, 2, 30, tzinfo=UTC), None, dt.datetime(2024, 12, 31, 23, 30, tzinfo=UTC)]
    prague = one(moments, pa.timestamp("us", "Europe/Prague"))
    plan = plan_of(prague, **hours)
    assert plan.names == ["a.hour", "a.dayofweek", "a.day", "a.month"]
    local = pd.Series(moments).dt.tz_convert("Europe/Prague").dt
    expected = np.stack([local.hour, local.day_of_week, local.day, local.month], axis=1).astype(np.float32)
    np.testing.assert_array_equal(trees(plan, prague), expected)
    for zone in ("UTC", "Asia/Tokyo"):
        np.testing.assert_array_equal(trees(plan, one(moments, pa.timestamp("ns", zone))), expected)


def test_calendar_without_a_zone_and_of_dates() -> None:
    naive = one([dt.datetime(2024, 7, 1, 2, 30), None], pa.timestamp("ms"))
    parts = {"calendar": {"a": ["hour", "month"]}}
    np.testing.assert_array_equal(trees(plan_of(naive, **parts), naive), [[2, 7], [np.nan, np.nan]])
    dates = one([dt.date(2024, 7, 1), None], pa.date32())
    np.testing.assert_array_equal(trees(plan_of(dates, **parts), dates), [[0, 7], [np.nan, np.nan]])
    with pytest.raises(DataError, match=r"data\.calendar: column 'a' is integer, not a timestamp"):
        plan_of(one([1]), **parts)


def test_order_of_features_is_the_schemas() -> None:
    plan = plan_of(mixed(50), **MIXED)
    assert plan.names == [
        "small",
        "large",
        "real",
        "city",
        "code",
        "at",
        "flag",
        "day.dayofweek",
        "day.month",
        "day.day",
    ]
    assert "".join(plan.kinds) == "qqqccqqqqq"


@pytest.mark.parametrize("unseen", UNSEEN)
def test_category_not_seen_in_training(unseen: str) -> None:
    plan = plan_of(one(["a", "b", None]), unseen=unseen)
    rows = one(["b", "new", None, "é", "a"])
    if unseen == "error":
        with pytest.raises(DataError, match="column 'a' holds 2 values not seen in training, the first is 'new'"):
            plan.encode(rows)
        (mask,) = plan.bad_rows(rows).values()
        np.testing.assert_array_equal(mask, [False, True, False, True, False])
        return
    encoded = plan.encode(rows)
    assert encoded.unseen == {"a": 2}
    missing = 2 if unseen == "other" else np.nan
    np.testing.assert_array_equal(plan.tree_matrix(encoded)[:, 0], [1, missing, np.nan, missing, 0])
    assert plan.bad_rows(rows) == {}


@pytest.mark.parametrize("unseen", UNSEEN)
def test_vocabulary_is_capped_by_frequency_and_the_rest_is_other(unseen: str) -> None:
    table = one(["z"] * 3 + ["y"] * 2 + ["b", "a"] + [None])
    plan = plan_of(table, max_categories=3, unseen=unseen)
    assert plan.features[0].vocabulary == ("a", "y", "z")  # of equal counts the first by name
    assert plan.features[0].n_codes == 4
    encoded = plan.encode(table)
    np.testing.assert_array_equal(plan.tree_matrix(encoded)[:, 0], [2, 2, 2, 1, 1, 3, 0, np.nan])
    assert plan.coefficient_names == ["a=a", "a=y", "a=z", "a (other)"]
    assert plan.bad_rows(table) == {}


@pytest.mark.parametrize("values", [
    pa.array([3, None, 10, 3], pa.int64()), pa.array([3, None, 10, 3], pa.uint8()),
    pa.array([3.0, None, 10.0, 3.0]), pa.array([3.0, float("nan"), 10.0, 3.0]),
    pa.array([Decimal(3), None, Decimal(10), Decimal(3)], pa.decimal128(5, 0)),
    pa.array([3, None, 10, 3]).dictionary_encode(), pa.array(["3", None, "10", "3"]),
    pa.array([3, None, 10, 3], pa.float32()),
], ids=lambda array: str(array.type))  # fmt: skip
def test_integers_declared_categories_whatever_they_come_as(values: pa.Array) -> None:
    plan = plan_of(one([10, 3, 3, None]), types={"a": "category"})
    assert plan.features[0].vocabulary == ("10", "3")
    np.testing.assert_array_equal(trees(plan, pa.table({"a": values}))[:, 0], [1, np.nan, 0, 1])


def test_pandas_float_column_with_nulls_is_the_same_category() -> None:
    plan = plan_of(one([10, 3, 3, None]), types={"a": "category"})
    frame = pd.DataFrame({"a": [10, None, 3]})
    assert frame["a"].dtype == np.float64
    np.testing.assert_array_equal(trees(plan, pa.Table.from_pandas(frame))[:, 0], [0, np.nan, 1])
    with pytest.raises(DataError, match="column 'a' is a category of integers, and holds double with fractions"):
        plan.encode(one([1.5]))


def test_booleans_declared_categories() -> None:
    table = one([True, False, None])
    plan = plan_of(table, types={"a": "category"})
    assert plan.features[0].vocabulary == ("false", "true")
    np.testing.assert_array_equal(trees(plan, table)[:, 0], [1, 0, np.nan])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e39, -1e300])
def test_infinite_values_are_refused_and_shown(value: float) -> None:
    plan = plan_of(one([1.0, 2.0]))
    rows = one([0.0, value, None, 3.0])
    with pytest.raises(DataError, match="column 'a' holds 1 infinite values"):
        plan.encode(rows)
    ((reason, mask),) = plan.bad_rows(rows).items()
    assert reason == "infinite value in 'a'"
    np.testing.assert_array_equal(mask, [False, True, False, False])
    plan.encode(rows.filter(pa.array(~mask)))


def test_bad_rows_are_those_that_encode_refuses_one_by_one() -> None:
    table = mixed(120)
    plan = plan_of(table.slice(0, 40), unseen="error", **MIXED)
    real = table.column("real").to_numpy().copy()
    real[::9] = np.inf
    rows = table.set_column(2, "real", pa.array(real)).set_column(3, "city", pa.array(["a", "new", None] * 40))
    bad = np.zeros(120, bool)
    for mask in plan.bad_rows(rows).values():
        bad |= mask

    def is_refused(i: int) -> bool:
        try:
            plan.encode(rows.slice(i, 1))
        except DataError:
            return True
        return False

    np.testing.assert_array_equal(bad, [is_refused(i) for i in range(120)])
    assert 40 <= bad.sum() < 120
    plan.encode(rows.filter(pa.array(~bad)))


def slicings(table: pa.Table) -> list[tuple[np.ndarray, pa.Table]]:
    """Subsets of the rows, in many layouts of Arrow."""
    n = table.num_rows
    order = np.random.default_rng(1).permutation(n)
    chunked = pa.concat_tables([table.slice(i, 7) for i in range(0, n, 7)])
    coded = table.set_column(3, "city", table.column("city").dictionary_encode())
    # Chunks whose dictionaries differ, as files have them.
    files = pa.concat_tables([coded.slice(0, 30), table.slice(30).cast(coded.schema)])
    everything = np.arange(n)
    return [
        (everything[11:64], table.slice(11, 53)), (order, table.take(order)), (everything, chunked),
        (everything[3:50], chunked.slice(3, 47)), (everything, coded), (everything, files),
        (everything[:0], table.slice(0, 0)), (everything[:0], table.schema.empty_table()),
        *((everything[i : i + 1], table.slice(i, 1)) for i in range(0, n, 13)),
    ]  # fmt: skip


@pytest.mark.parametrize("unseen", ["missing", "other"])
def test_rows_have_the_same_bits_in_any_slice_and_chunking(unseen: str) -> None:
    table = mixed(150)
    plan = plan_of(table.slice(0, 100), unseen=unseen, max_categories=5, missing_indicator=True, **MIXED)
    whole = plan.encode(table)
    blocks = (plan.tree_matrix(whole), plan.dense(whole), plan.onehot(whole))
    for rows, part in slicings(table):
        encoded = plan.encode(part)
        got = (plan.tree_matrix(encoded), plan.dense(encoded), plan.onehot(encoded))
        for block, found in zip(blocks, got, strict=True):
            assert found.dtype == block.dtype
            assert found.tobytes() == block[rows].tobytes()


def test_concatenated_parts_are_the_whole() -> None:
    table = mixed(90)
    plan = plan_of(table.slice(0, 30), **MIXED)
    parts = [plan.encode(table.slice(i, 30)) for i in (0, 30, 60)]
    whole, joined = plan.encode(table), concat_encoded(parts)
    assert (joined.n_rows, joined.unseen) == (90, whole.unseen)
    np.testing.assert_array_equal(plan.tree_matrix(joined), plan.tree_matrix(whole))


def test_json_round_trip_gives_the_same_bits() -> None:
    table = mixed(150)
    for w in (None, np.random.default_rng(0).gamma(1, size=150)):
        plan = plan_of(table, w, missing_indicator=True, max_categories=5, **MIXED)
        again = FeaturePlan.from_json(json.loads(json.dumps(plan.to_json(), ensure_ascii=False)))
        assert again == plan
        a, b = plan.encode(table), again.encode(table)
        assert plan.dense(a).tobytes() == again.dense(b).tobytes()
        assert plan.tree_matrix(a).tobytes() == again.tree_matrix(b).tobytes()
        assert again.coefficient_names == plan.coefficient_names


@pytest.mark.parametrize("weighted", [False, True])
def test_dense_block_is_weighted_standardisation(weighted: bool) -> None:
    table = mixed(200)
    w = np.random.default_rng(2).gamma(1, size=200) if weighted else np.ones(200)
    plan = plan_of(table, w if weighted else None, missing_indicator=True, **MIXED)
    X = plan.dense(plan.encode(table))
    raw = plan.tree_matrix(plan.encode(table)).astype(np.float64)
    raw[:, 1] = [np.nan if v is None else v for v in table.column("large").to_pylist()]
    raw[:, 2] = [np.nan if v is None else v for v in table.column("real").to_pylist()]
    raw = raw[:, [j for j, kind in enumerate(plan.kinds) if kind == "q"]]
    shown = ~np.isnan(raw)
    mean = np.array([np.average(x[s], weights=w[s]) for x, s in zip(raw.T, shown.T, strict=True)])
    var = np.array([np.average((x[s] - m) ** 2, weights=w[s]) for x, s, m in zip(raw.T, shown.T, mean, strict=True)])
    expected = np.where(shown, (raw - mean) / np.sqrt(var), 0.0)
    n = raw.shape[1]
    # Seconds stand in the matrix of trees as float32.
    np.testing.assert_allclose(X[:, :n], expected, rtol=0, atol=2e-6)
    exact = [j for j, f in enumerate(plan.dense_features) if f.kind != "seconds"]
    np.testing.assert_allclose(X[:, exact], expected[:, exact], rtol=1e-11, atol=1e-11)
    with_nulls = [j for j, f in enumerate(plan.dense_features) if f.indicator]
    assert with_nulls == [j for j in range(n) if plan.dense_features[j].kind != "calendar"]
    np.testing.assert_array_equal(X[:, n:], ~shown[:, with_nulls])
    assert plan.n_dense == X.shape[1]


def test_a_constant_column_has_scale_one() -> None:
    for value in (0.1, 5.0, 1e17, -3e-9):
        table = one([value] * 7)
        (feature,) = plan_of(table, np.full(7, 0.3)).features
        assert feature.scale == 1.0, value
        np.testing.assert_allclose(plan_of(table).dense(plan_of(table).encode(table)), 0.0, atol=abs(value) * 1e-15)
    # Rows without weight do not make a constant vary.
    table, w = one([5.1] * 1000 + [6.0, 7.0]), np.r_[np.random.default_rng(0).random(1000), 0.0, 0.0]
    assert [f.scale for f in plan_of(table, w).features] == [1.0]
    days = one([dt.date(2024, 6, 3)] * 7, pa.date32())
    plan = plan_of(days, np.full(7, 0.3), calendar={"a": ["month", "day"]})
    assert [f.scale for f in plan.features] == [1.0, 1.0]


@pytest.mark.parametrize("unseen", ["missing", "other"])
def test_onehot_is_scikit_learns(unseen: str) -> None:
    table = mixed(200).select(["city", "code"])
    rows = table.set_column(0, "city", pa.array(["a", "new", "東京", None] * 50))
    plan = plan_of(table, unseen=unseen, types={"code": "category"})
    positions = plan.onehot(plan.encode(rows))
    ones = np.zeros((200, plan.n_onehot + 1))
    np.put_along_axis(ones, positions, 1.0, axis=1)
    text = rows.set_column(1, "code", rows.column("code").cast(pa.string())).to_pandas().to_numpy(object)
    text[pd.isna(text)] = None
    encoder = OneHotEncoder(
        categories=[list(f.vocabulary) for f in plan.features], handle_unknown="ignore", sparse_output=False
    )
    expected = encoder.fit(np.array([[f.vocabulary[0] for f in plan.features]], object)).transform(text)
    start = 0
    for f, column in zip(plan.features, text.T, strict=True):
        n = len(f.vocabulary)
        block = expected[:, start - sum(g.other for g in plan.features[: plan.features.index(f)]) :][:, :n]
        np.testing.assert_array_equal(ones[:, start : start + n], block)
        if f.other:
            outside = [value is not None and value not in f.vocabulary for value in column]
            np.testing.assert_array_equal(ones[:, start + n], outside)
        start += f.n_codes
    names = [name for f in plan.features for name in [*(f"{f.name}={v}" for v in f.vocabulary)]]
    assert [n for n in plan.coefficient_names if not n.endswith("(other)")] == names


def test_nothing_but_numbers_has_no_onehot_block() -> None:
    table = one([1.0, 2.0])
    plan = plan_of(table)
    assert plan.onehot(plan.encode(table)).shape == (2, 0)


@pytest.mark.parametrize(("values", "warns"), [
    ([2**24 + 1, 0], True), ([2**24, -(2**24)], False), ([2**30, 0], False), ([-(2**24) - 1], True),
    ([1.5e9 + 1], True), ([None, 3], False),
])  # fmt: skip
def test_warns_of_numbers_that_float32_cannot_hold(values: list[Any], warns: bool) -> None:
    plan, profiles = profiled(one(values))
    found = float32_warnings(plan, profiles)
    assert bool(found) == warns
    if warns:
        assert found[0].startswith("feature 'a' reaches")


def test_declared_types_must_be_possible() -> None:
    schema = Schema((Column("a", "float"), Column("b", "string"), Column("c", "integer")))
    check_types(schema, spec(types={"a": "integer", "b": "category", "c": "category"}))
    with pytest.raises(DataError, match=r"data\.types does not fit") as caught:
        check_types(schema, spec(types={"a": "category", "b": "integer", "c": "timestamp"}))
    assert len(caught.value.problems) == 3


def test_native_values_keep_the_narrow_width() -> None:
    assert native_values(one([1, 2], pa.int16()).column("a")).dtype == np.float32
    assert native_values(one([1, 2], pa.int32()).column("a")).dtype == np.float64


def test_text_values_of_a_dictionary_that_holds_null() -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1]), pa.array(["x", None]))
    sums = Counter(text_values(pa.chunked_array([array]), "a").to_pylist())
    assert sums == {"x": 1, None: 3}
    plan = plan_of(pa.table({"a": array}), unseen="error")
    np.testing.assert_array_equal(trees(plan, pa.table({"a": array}))[:, 0], [0, np.nan, np.nan, np.nan])
