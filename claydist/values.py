"""Single values as JSON has them, to float64: one strict parser for each type of column; and tables back to plain rows.

Missing is NaN, for a category -1; a category not seen in training is -2 until the encoder has counted it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from claydist.features import Feature, FeaturePlan
from claydist.profile import LARGEST
from claydist.schema import Column

MISSING_CODE, UNSEEN_CODE = -1.0, -2.0

_INT64, _UINT64 = 2**63, 2**64
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[Tt ](\d\d:\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?\s?(Z|z|[+-]\d\d:?\d\d)?)?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1)
Parse = Callable[[Any], Any]


class Wrong(Exception):
    """What was expected of a value; the caller knows where it stands."""


def parser_of(column: Column, category: Feature | None, unseen: str) -> Parse:
    """The parser of a column's values; it raises Wrong for what it does not take.

    Numbers come out as float64, categories as their code, times as whole nanoseconds since the epoch or None.
    """
    if category is not None:
        return _category_parser(column, category, strict=unseen == "error" and not category.other)
    if column.type in ("timestamp", "date"):
        return _time_parser(column)
    return {"integer": parse_integer, "boolean": _boolean}.get(column.type, parse_number)


def parse_number(value: Any) -> float:
    """An integer or a float that float32 does not make infinite, NaN for None and NaN."""
    kind = value.__class__
    if kind is float or kind is int:
        if -LARGEST <= value <= LARGEST or value != value:
            return float(value)
        raise Wrong(f"a number up to {LARGEST:.1e}")
    if value is None:
        return math.nan
    raise Wrong("a number or null")


def parse_integer(value: Any) -> float:
    """A number within 64 bits, NaN for None and NaN; a fraction passes, as it does in a table."""
    # JSON parsers hand over integers beyond 64 bits as floats; Arrow has no such integers. It has unsigned ones.
    if value.__class__ in (int, float) and not -_INT64 <= value < _UINT64 and value == value:
        raise Wrong("an integer of 64 bits")
    return parse_number(value)


def _boolean(value: Any) -> float:
    if value is True:
        return 1.0
    if value is False:
        return 0.0
    if value is None or value != value:
        return math.nan
    raise Wrong("true, false or null")


def _category_parser(column: Column, category: Feature, *, strict: bool) -> Parse:
    codes = {text: float(code) for code, text in enumerate(category.vocabulary)}
    spell = {"string": _spell_text, "boolean": _spell_boolean}.get(column.type, _spell_integer)

    def parse(value: Any) -> float:
        if value is None or value != value:
            return MISSING_CODE
        code = codes.get(spell(value), UNSEEN_CODE)
        if strict and code < 0:
            raise Wrong("a category that training has seen (data.unseen is 'error')")
        return code

    return parse


def _spell_text(value: Any) -> str:
    if value.__class__ is str:
        return value
    raise Wrong("text or null")


def _spell_boolean(value: Any) -> str:
    if value is True or value is False:
        return "true" if value else "false"
    raise Wrong("true, false or null")


def _spell_integer(value: Any) -> str:
    kind = value.__class__
    # A table's floats become categories by way of int64, its unsigned integers as they are.
    if (kind is int and -_INT64 <= value < _UINT64) or (
        kind is float and value.is_integer() and -_INT64 <= value < _INT64
    ):
        return str(int(value))
    raise Wrong("an integer of 64 bits or null")


def _time_parser(column: Column) -> Callable[[Any], Any]:
    example = "2013-06-30" if column.type == "date" else f"2013-06-30T17:45:00{'Z' if column.zone else ''}"

    def parse(value: Any) -> int | None:
        if value is None:
            return None
        match = _TIME.fullmatch(value) if isinstance(value, str) and len(value) < 50 else None
        if match is None or (column.type == "date" and match[2]) or bool(match[5]) != bool(column.zone):
            raise Wrong(f"a {column.describe()} as text like {example!r}, or null")
        try:
            return _nanoseconds(match)
        except (ValueError, OverflowError):
            raise Wrong(f"a time that exists, in the years 1677 to 2262, like {example!r}") from None

    return parse


def _nanoseconds(match: re.Match[str]) -> int:
    """Nanoseconds since the epoch (UTC where there is an offset); ValueError where int64 cannot hold them."""
    moment = datetime.fromisoformat(f"{match[1]}T{match[2] or '00:00'}:{match[3] or '00'}")
    ns = round((moment - _EPOCH) / timedelta(seconds=1)) * 1_000_000_000 + int((match[4] or "0").ljust(9, "0"))
    zone = match[5]
    if zone and zone not in "Zz":
        hours, minutes = int(zone[1:3]), int(zone[-2:])
        if hours > 23 or minutes > 59:
            raise ValueError
        ns -= (hours * 3600 + minutes * 60) * 1_000_000_000 * (-1 if zone[0] == "-" else 1)
    if not -_INT64 <= ns < _INT64:
        raise ValueError
    return ns


def time_array(column: Column, ns: Sequence[int | None]) -> pa.Array:
    """Nanoseconds since the epoch as an Arrow array of the column's type and zone."""
    stamps = pa.array(ns, pa.int64()).cast(pa.timestamp("ns", column.zone))
    return stamps.cast(pa.date32()) if column.type == "date" else stamps


def to_plain(table: pa.Table, plan: FeaturePlan) -> list[dict[str, Any]]:
    """Rows of a table as mappings that `RowEncoder.from_rows` reads back to the same values: the form of JSON."""
    columns = [_plain_values(c, table.column(c.name)) for c in plan.schema.columns]
    return [dict(zip(plan.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain_values(column: Column, values: pa.ChunkedArray) -> list[Any]:
    if column.type == "timestamp" and not pa.types.is_null(values.type):
        # Python's datetime has no nanoseconds.
        ns = values.cast(pa.timestamp("ns", values.type.tz)).cast(pa.int64()).to_pylist()
        return [None if n is None else _time_text(n, column.zone) for n in ns]
    if column.type == "date":
        return [None if day is None else day.isoformat() for day in values.to_pylist()]
    plain = [float(v) if isinstance(v, Decimal) else v for v in values.to_pylist()]
    return [None if v != v else v for v in plain]


def _time_text(ns: int, zone: str | None) -> str:
    # Not by datetime64 of nanoseconds, for which the least int64 is no time at all.
    seconds, rest = divmod(ns, 1_000_000_000)
    fraction = f".{rest:09}".rstrip("0") if rest else ""
    return f"{np.datetime64(seconds, 's')}{fraction}{'Z' if zone else ''}"


def shown(value: Any) -> str:
    """A value of somebody else's, short enough for a message."""
    if isinstance(value, (dict, list, tuple)):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value) if not isinstance(value, str) else repr(value[:40])
    return {"True": "true", "False": "false", "None": "null"}.get(text, text[:60])
