from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from claydist.errors import DataError
from claydist.schema import Column, Schema, column_of, decide_roles, type_of
from claydist.spec import DataSpec

TYPES: list[tuple[pa.DataType, str | None]] = [
    *((t, "integer") for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64(),
                               pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    *((t, "float") for t in (pa.float16(), pa.float32(), pa.float64())),
    (pa.decimal128(12, 3), "decimal"), (pa.decimal256(40, 3), "decimal"), (pa.bool_(), "boolean"),
    *((t, "string") for t in (pa.string(), pa.large_string(), pa.string_view())),
    (pa.dictionary(pa.int8(), pa.string()), "string"), (pa.dictionary(pa.int32(), pa.int64()), "integer"),
    (pa.date32(), "date"), (pa.date64(), "date"),
    *((pa.timestamp(unit, zone), "timestamp") for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC")),
    *((t, None) for t in (pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.binary(), pa.time32("s"),
                          pa.duration("s"), pa.null(), pa.map_(pa.string(), pa.int8()))),
]  # fmt: skip


@pytest.mark.parametrize(("arrow", "kind"), TYPES, ids=lambda value: str(value))
def test_type_of_every_arrow_type(arrow: pa.DataType, kind: str | None) -> None:
    assert type_of(arrow) == kind
    field = pa.field("a", arrow)
    if kind is None:
        with pytest.raises(DataError, match=r"column 'a' in x\.parquet is .*, which no model takes; drop it"):
            column_of(field, "x.parquet")
    else:
        column = column_of(field, "x.parquet")
        assert (column.name, column.type, column.zone) == ("a", kind, getattr(arrow, "tz", None))
        assert type_of(column.arrow) in (kind, "float")
        assert Schema((column,)).problems(pa.schema([field])) == []


def test_json_round_trip_and_fingerprint() -> None:
    schema = Schema((Column("é", "integer"), Column("t", "timestamp", "Europe/Prague")))
    assert Schema.from_json(schema.to_json()) == schema
    assert Schema.from_json(schema.to_json()).fingerprint() == schema.fingerprint()
    others = [Schema(schema.columns[::-1]), Schema((Column("é", "float"), schema.columns[1])), Schema(())]
    assert len({s.fingerprint() for s in [schema, *others]}) == 4


SCHEMA = Schema((Column("age", "integer"), Column("city", "string"), Column("at", "timestamp", "UTC"),
                 Column("local", "timestamp"), Column("day", "date")))  # fmt: skip
GOOD = [("age", pa.int64()), ("city", pa.string()), ("at", pa.timestamp("us", "UTC")),
        ("local", pa.timestamp("ns")), ("day", pa.date32())]  # fmt: skip


@pytest.mark.parametrize("found", [
    GOOD, GOOD[::-1], [*GOOD, ("more", pa.binary())],
    [("age", pa.float64()), *GOOD[1:]], [("age", pa.bool_()), *GOOD[1:]], [("age", pa.decimal128(5, 2)), *GOOD[1:]],
    [("age", pa.null()), ("city", pa.null()), ("at", pa.null()), ("local", pa.null()), ("day", pa.null())],
    [*GOOD[:2], ("at", pa.timestamp("s", "America/New_York")), *GOOD[3:]],
    [GOOD[0], ("city", pa.dictionary(pa.int32(), pa.large_string())), *GOOD[2:]],
])  # fmt: skip
def test_tables_that_fit(found: list[tuple[str, pa.DataType]]) -> None:
    SCHEMA.check(pa.schema(found), "the table")


@pytest.mark.parametrize(("change", "problem"), [
    ({"age": None, "Age": pa.int64()}, "column 'age' is absent; did you mean 'Age'?"),
    ({"city": None}, "column 'city' is absent; columns: age, at, day, local"),
    ({"age": pa.string()}, "column 'age': expected integer, found string"),
    ({"city": pa.int64()}, "column 'city': expected string, found int64"),
    ({"city": pa.list_(pa.string())}, "column 'city': expected string, found list<item: string>"),
    ({"at": pa.timestamp("us")}, "column 'at': expected timestamp (UTC), found timestamp[us] with no zone; localise"),
    ({"local": pa.timestamp("us", "UTC")}, "expected timestamp without a zone, found timestamp[us, tz=UTC]"),
    ({"at": pa.date32()}, "column 'at': expected timestamp (UTC), found date32[day]"),
    ({"day": pa.timestamp("s")}, "column 'day': expected date, found timestamp[s]"),
])  # fmt: skip
def test_tables_that_do_not_fit(change: dict[str, Any], problem: str) -> None:
    fields = {**dict(GOOD), **change}
    found = pa.schema([(name, arrow) for name, arrow in fields.items() if arrow is not None])
    with pytest.raises(DataError, match=r"rows\.parquet does not fit the model's schema") as caught:
        SCHEMA.check(found, "rows.parquet")
    (text,) = caught.value.problems
    assert problem in text


def test_all_problems_at_once_and_a_column_twice() -> None:
    found = pa.schema([("age", pa.string()), ("city", pa.string()), ("city", pa.string())])
    assert SCHEMA.problems(found) == [
        "column 'age': expected integer, found string", "column 'city' twice",
        "column 'at' is absent; columns: age, city, city", "column 'local' is absent; columns: age, city, city",
        "column 'day' is absent; columns: age, city, city",
    ]  # fmt: skip


TABLE = pa.schema([("a", pa.int64()), ("b", pa.string()), ("y", pa.int64()), ("w", pa.float64()), ("q", pa.string()),
                   ("l", pa.list_(pa.int64())), ("o", pa.float32())])  # fmt: skip


def data(**keys: Any) -> DataSpec:
    return DataSpec(**{"path": "x", "label": "y", **keys})


def test_roles_are_all_columns_but_the_others() -> None:
    roles = decide_roles(data(weight="w", group="q", offset="o", drop=["l"], key=["b"]), TABLE, "x")
    assert (roles.features, roles.label, roles.weight, roles.group) == (("a", "b"), "y", "w", "q")
    assert (roles.offset, roles.key) == ("o", ("b",))
    assert roles.columns == ["a", "b", "y", "w", "o", "q"]
    assert decide_roles(data(features=["b", "a"]), TABLE, "x").features == ("b", "a")
    assert "b" not in decide_roles(data(key=["b"], drop=["b", "l"]), TABLE, "x").features


def test_every_absent_column_is_named_with_the_nearest() -> None:
    spec = data(label="Y", weight="wx", drop=["zzz"], types={"aa": "integer"}, calendar={"bb": ["hour"]}, key=["k"])
    with pytest.raises(DataError, match="columns that the spec names are not in x") as caught:
        decide_roles(spec, TABLE, "x", also=["split_by"])
    assert len(caught.value.problems) == 7
    assert "column 'wx' is absent; did you mean 'w'?" in caught.value.problems


@pytest.mark.parametrize(("keys", "problem"), [
    ({}, "column 'l' in x is list<"),
    ({"weight": "b", "drop": ["l"]}, "column 'b' is to be weight or offset and holds string, not numbers"),
    ({"offset": "b", "drop": ["l"]}, "column 'b' is to be weight or offset"),
    ({"drop": ["a", "b", "w", "q", "l", "o"]}, "no column is left as a feature"),
    ({"features": []}, "no column is left as a feature"),
])  # fmt: skip
def test_columns_that_cannot_be_used(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match="cannot be used as the spec says") as caught:
        decide_roles(data(**keys), TABLE, "x")
    assert problem in caught.value.problems[0]
