from __future__ import annotations

import datetime as dt
import operator
import pickle
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claydist.errors import DataError, SpecError
from claydist.expressions import parse

NAN = float("nan")
TABLE = pa.table(
    {
        "i": pa.array([1, 2, 3, None], pa.int32()),
        "f": pa.array([0.5, NAN, -0.0, None], pa.float64()),
        "s": ["JFK", "it's", None, "é"],
        "b": [True, False, None, True],
        "n": pa.nulls(4),
        "default.payment.next.month": [0, 1, 0, 1],
    }
)


def rows(text: str, table: pa.Table = TABLE) -> list[int]:
    return np.flatnonzero(parse(text).mask(table)).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i = 2", [1]),
        ("i == 2", [1]),
        ("i != 2", [0, 2]),
        ("NOT i = 2", [0, 2, 3]),
        ("not i != 2", [1, 3]),
        ("i >= 2 and not i > 2", [1]),
        ("i < 2 or i > 2 and b = true", [0]),
        ("(i < 2 or i > 2) and f <= 0", [2]),
        ("i in (1, 3, 2.5)", [0, 2]),
        ("i not in (1, 3)", [1]),
        ("not i in (1, 3)", [1, 3]),
        ("i Between 2 AND 3", [1, 2]),
        ("i not between 2 and 3", [0]),
        ("not (i between 2 and 3)", [0, 3]),
        ("i is null", [3]),
        ("i is not null", [0, 1, 2]),
        ("f is null", [1, 3]),
        ("f is not null", [0, 2]),
        ("f != 0.5", [2]),
        ("not f = 0.5", [1, 2, 3]),
        ("f in (0)", [2]),
        ("f not in (0)", [0]),
        ("s = 'it''s'", [1]),
        ("s > 'a'", [1, 3]),
        ("s in ('é', 'JFK')", [0, 3]),
        ("b = false", [1]),
        ("b in (true)", [0, 3]),
        ("not b = TRUE", [1, 2]),
        ("n = 1", []),
        ("n in (1)", []),
        ("not n = 1", [0, 1, 2, 3]),
        ("n is null", [0, 1, 2, 3]),
        ('"default.payment.next.month" = 1', [1, 3]),
        ("i>-1", [0, 1, 2]),
        ("i > 1.5", [1, 2]),
        ("i <= 1.5", [0]),
        ("i = 1.5", []),
        ("i != 1.5", [0, 1, 2]),
        ("i < 1e30", [0, 1, 2]),
        ("i > 1e30", []),
        ("i != -1e30", [0, 1, 2]),
        ("f > 1e400", []),
    ],
)
def test_a_condition_selects_its_rows(text: str, expected: list[int]) -> None:
    assert rows(text) == expected


def test_a_quote_in_a_name_is_written_twice() -> None:
    assert rows('"a""b" = 1', pa.table({'a"b': [1, 2]})) == [0]


TIMES = [dt.datetime(2013, 7, 4, 12), dt.datetime(2013, 7, 4, 15, 30, 0, 1), None]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_times_are_read_in_the_columns_zone_and_unit(unit: str) -> None:
    naive = pa.table({"t": pa.array(TIMES).cast(pa.timestamp(unit), safe=False)})
    assert rows("t >= '2013-07-04 15:30:00'", naive) == [1]
    assert rows("t between '2013-07-04' and '2013-07-04 12:00'", naive) == [0]
    assert rows("t > '2013-07-04 15:30:00.0000005'", naive) == ([] if unit == "ms" else [1])
    paris = pa.table({"t": pa.array(TIMES).cast(pa.timestamp(unit, "Europe/Paris"), safe=False)})
    assert rows("t = '2013-07-04 14:00'", paris) == [0]
    assert rows("t = '2013-07-04T12:00:00Z'", paris) == [0]
    assert rows("t = '2013-07-04 13:00'", paris.cast(pa.schema({"t": pa.timestamp(unit, "+01:00")}))) == [0]


def test_dates_and_decimals_and_dictionaries_are_compared_exactly() -> None:
    table = pa.table(
        {
            "d": pa.array([dt.date(2013, 1, 31), dt.date(2013, 2, 1), None]),
            "m": pa.array([Decimal("0.10"), Decimal("12345678901234567890123456789012345.67"), None]),
            "c": pa.array(["a", "b", None]).dictionary_encode(),
            "u": pa.array([0, 2**64 - 1, None], pa.uint64()),
            "w": pa.array([0.1, 16777217.0, None], pa.float32()),
        }
    )
    assert rows("d < '2013-02-01'", table) == [0]
    assert rows("d > '2013-01-31 12:00'", table) == [1]
    assert rows("m = 0.1", table) == [0]
    assert rows("m >= 0.101", table) == [1]
    assert rows("m = 12345678901234567890123456789012345.67", table) == [1]
    assert rows("m < 1e60", table) == [0, 1]
    assert rows("c != 'a'", table) == [1]
    assert rows("u = 18446744073709551615", table) == [1]
    assert rows("u >= -1", table) == [0, 1]
    assert rows("w = 0.1", table) == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a column, found the end at position 1"),
        ("i", "expected a comparison .*, found the end"),
        ("i >", "expected a value"),
        ("s = JFK", "expected a value: text in single quotes, .* found 'JFK' at position 5"),
        ("'s' = 1", "a column stands bare or in double quotes"),
        ("1 < i", "expected a column"),
        ("i = null", "column is null"),
        ("i in ()", "expected a value"),
        ("i in (1", r"expected '\)', found the end"),
        ("i between 1 or 2", "expected 'and', found 'or'"),
        ("i not 1", "expected 'in' or 'between'"),
        ("(i = 1", r"expected '\)'"),
        ("i = 1)", "expected 'and', 'or' or the end"),
        ("s = 'a", "expected a closing '"),
        ('"s = 1', 'expected a closing "'),
        ("i = 1; drop", "found ';'"),
        ("i = 1.2.3", "found '1.2.3'"),
        ("__import__('os')", "expected a comparison"),
        ("and = 1", "expected a column, found 'and'"),
        ('"" = 1', "expected a column's name"),
        ("i = 1e999", "number that a column can hold"),
        ("(" * 2000 + "i = 1" + ")" * 2000, "at most 100"),
        ("not " * 2000 + "i = 1", "at most 100"),
    ],
)
def test_what_is_not_an_expression_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_an_error_points_at_the_place() -> None:
    with pytest.raises(SpecError) as caught:
        parse("i = 1 and s = JFK")
    *_, line, caret = str(caught.value).splitlines()
    assert line[caret.index("^") :] == "JFK"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s = 5", "column 's' is string .* write '5', in single quotes"),
        ("i = '5'", "column 'i' is int32 .* without quotes"),
        ("f = true", "column 'f' is double"),
        ("b = 1", "true or false"),
        ("b > false", "compare it with = or !="),
        ("i = 1 and orgin = 'JFK'", "column 'orgin' is absent"),
        ("t > 'yesterday'", "expected an ISO date or time .* found 'yesterday'"),
        ("t > '2013-01-01T00:00:00Z'", "no zone"),
        ("t > 5", "write a time"),
        ("l = 5", "only be tested with 'is null'"),
    ],
)
def test_a_literal_that_the_column_cannot_hold_is_refused_by_column_and_type(text: str, message: str) -> None:
    table = TABLE.append_column("t", pa.array([None] * 4, pa.timestamp("us"))).append_column(
        "l", [[[1], None, [2], []]]
    )
    with pytest.raises(DataError, match=message):
        parse(text).mask(table)
    with pytest.raises(DataError, match=message):
        parse(text).arrow(table.schema)
    assert rows("l is null", table) == [1]


def test_check_names_the_nearest_column() -> None:
    with pytest.raises(DataError, match="column 'orgin' is absent; did you mean 'origin'"):
        parse("orgin = 'JFK' or month = 1").check(["origin", "month"])


def test_an_expression_knows_its_columns_and_survives_pickling() -> None:
    expression = parse('not (a = 1 or "b c" in (2)) and d between 1 and 2 or e is null')
    assert expression.columns == {"a", "b c", "d", "e"}
    assert pickle.loads(pickle.dumps(expression)) == expression


def test_no_rows_and_chunks() -> None:
    assert parse("i = 1 or n = 1").mask(TABLE.slice(0, 0)).shape == (0,)
    assert parse("n = 1").mask(TABLE.slice(0, 0)).shape == (0,)
    assert rows("i = 2", pa.concat_tables([TABLE, TABLE])) == [1, 5]


OPS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
number = st.one_of(st.integers(-3, 3), st.sampled_from([-1.5, 0.5, 2.5, 1e30, -1e30]))


def conditions() -> st.SearchStrategy:
    """Texts, each with its truth for a row as plain Python says it."""

    def present(v: float | None) -> bool:
        return v is not None and v == v

    column = st.sampled_from(["i", "f"])
    compared = st.tuples(column, st.sampled_from(sorted(OPS)), number).map(
        lambda t: (f"{t[0]} {t[1]} {t[2]}", lambda row: present(row[t[0]]) and OPS[t[1]](row[t[0]], t[2]))
    )
    inside = st.tuples(column, st.lists(number, min_size=1, max_size=3)).map(
        lambda t: (
            f"{t[0]} in ({', '.join(map(str, t[1]))})",
            lambda row: present(row[t[0]]) and row[t[0]] in t[1],
        )
    )
    null = column.map(lambda c: (f"{c} is null", lambda row: not present(row[c])))
    return st.recursive(
        st.one_of(compared, inside, null),
        lambda part: st.one_of(
            part.map(lambda p: (f"not ({p[0]})", lambda row: not p[1](row))),
            st.tuples(part, part).map(lambda p: (f"({p[0][0]} and {p[1][0]})", lambda r: p[0][1](r) and p[1][1](r))),
            st.tuples(part, part).map(lambda p: (f"({p[0][0]} or {p[1][0]})", lambda r: p[0][1](r) or p[1][1](r))),
        ),
        max_leaves=6,
    )


values_i = st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=1, max_size=8)
values_f = st.one_of(st.none(), st.just(NAN), st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.5, 1e30]))


@settings(max_examples=150, deadline=None)
@given(condition=conditions(), ints=values_i, data=st.data())
def test_mask_is_what_python_says_and_pruning_loses_no_row(condition, ints, data, tmp_path_factory) -> None:
    text, truth = condition
    floats = data.draw(st.lists(values_f, min_size=len(ints), max_size=len(ints)))
    table = pa.table({"i": pa.array(ints, pa.int32()), "f": pa.array(floats, pa.float64())})
    expected = [bool(truth(row)) for row in table.to_pylist()]
    assert parse(text).mask(table).tolist() == expected

    path = tmp_path_factory.mktemp("prune") / "t.parquet"
    pq.write_table(table, path, row_group_size=2)
    fragment = ds.ParquetFileFormat().make_fragment(str(path), pafs.LocalFileSystem())
    kept = {group.id for group in fragment.subset(parse(text).arrow(table.schema), schema=table.schema).row_groups}
    assert {row // 2 for row, true in enumerate(expected) if true} <= kept


def test_pruning_skips_row_groups(tmp_path) -> None:
    pq.write_table(pa.table({"i": range(10)}), tmp_path / "t.parquet", row_group_size=5)
    fragment = ds.ParquetFileFormat().make_fragment(str(tmp_path / "t.parquet"), pafs.LocalFileSystem())
    expression = parse("i between 6 and 7.5").arrow(fragment.physical_schema)
    assert [group.id for group in fragment.subset(expression, schema=fragment.physical_schema).row_groups] == [1]
