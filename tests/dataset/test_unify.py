from __future__ import annotations

import itertools

import pyarrow as pa
import pytest

from claydist.dataset.unify import key_scalar, key_types, unify, widest
from claydist.errors import DataError


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int8(), pa.uint8(), pa.int16()),
        (pa.int64(), pa.uint32(), pa.int64()),
        (pa.int64(), pa.uint64(), None),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.decimal128(10, 2), pa.decimal128(8, 4), pa.decimal128(12, 4)),
        (pa.decimal128(38, 0), pa.decimal128(10, 10), pa.decimal256(48, 10)),
        (pa.string(), pa.large_string(), pa.string()),
        (pa.string(), pa.dictionary(pa.int8(), pa.large_string()), pa.string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.date32(), pa.date64(), pa.date32()),
        (pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ns")),
        (pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), None),
        (pa.null(), pa.string(), pa.string()),
        (pa.int64(), pa.float64(), None),
        (pa.int64(), pa.string(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.list_(pa.int8()), pa.list_(pa.int8()), pa.list_(pa.int8())),
    ],
)
def test_widths_of_one_kind_become_the_widest(a, b, expected) -> None:
    assert widest(a, b) == expected
    assert widest(b, a) == expected


def test_columns_are_the_union_in_order_of_appearance_without_the_skipped() -> None:
    one = pa.schema({"a": pa.int32(), "b": pa.string(), "k": pa.string()})
    two = pa.schema({"c": pa.bool_(), "b": pa.null(), "a": pa.int64()})
    expected = pa.schema({"a": pa.int64(), "b": pa.string(), "c": pa.bool_()})
    assert unify([one, two], [("x", 0), ("y", 1)], skip=["k"]) == expected


def test_every_file_and_column_that_differs_is_named_up_to_twenty() -> None:
    schemas = [pa.schema({"a": pa.int32(), "b": pa.int8()}), pa.schema({"a": pa.string(), "b": pa.bool_()})]
    files = [("first", 0), *((f"u{i}", 1) for i in range(15))]
    with pytest.raises(DataError, match="different types") as caught:
        unify(schemas, files)
    problems = caught.value.problems
    assert problems[0] == "u0: column 'a': expected int32 as in first, found string"
    assert len(problems) == 21
    assert problems[-1] == "... and 10 more"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "10", "-3", None], pa.int64()),
        (["0"], pa.int64()),
        (["01", "10"], pa.string()),
        (["+1"], pa.string()),
        (["-0"], pa.string()),
        (["1", ""], pa.string()),
        (["1.0"], pa.string()),
        (["9223372036854775808"], pa.string()),
        (["١"], pa.string()),
        ([None], pa.string()),
    ],
)
def test_a_key_is_an_integer_only_when_every_value_is_written_as_one(values, expected) -> None:
    assert key_types({"k": values}, {}) == {"k": expected}
    for value, back in itertools.product(values, [pa.string()]):
        assert key_scalar(value, expected).cast(back).as_py() == value


def test_a_declared_type_wins() -> None:
    values = {"m": ["01", None], "s": ["1"], "f": ["1.5"], "b": ["true"], "t": ["2013-01-02"], "c": ["1"]}
    declared = {
        "m": "integer", "s": "string", "f": "float", "b": "boolean", "t": "timestamp", "c": "category", "z": "string",
    }  # fmt: skip
    types = key_types(values, declared)
    found = {name: key_scalar(values[name][0], kind).as_py() for name, kind in types.items()}
    assert found == {"m": 1, "s": "1", "f": 1.5, "b": True, "t": found["t"], "c": 1}
    assert str(found["t"]) == "2013-01-02 00:00:00"


def test_a_value_that_does_not_fit_its_declaration_is_named() -> None:
    with pytest.raises(DataError, match="key 'm': expected integer, found 'x'") as caught:
        key_types({"m": ["1", "x"], "b": ["maybe"]}, {"m": "integer", "b": "boolean"})
    assert len(caught.value.problems) == 2
