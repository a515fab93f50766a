"""One schema for files that were written at different times by different programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.types as pat

from claydist.errors import DataError

_LISTED = 20
_UNITS = ("s", "ms", "us", "ns")
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_DECLARED = {
    "integer": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "boolean": pa.bool_(),
    "timestamp": pa.timestamp("us"),
}


def unify(schemas: Sequence[pa.Schema], files: Sequence[tuple[str, int]], skip: Iterable[str] = ()) -> pa.Schema:
    """The schema that every file's columns can be read as: names in order of appearance, types wide enough for all.

    Other widths of one kind are one kind: integers, floats, decimals, text (plain, large, dictionary), dates, and
    timestamps of the same zone. A column that a file does not have is null there.

    Parameters
    ----------
    schemas : the distinct schemas.
    files : URL of each file and the number of its schema.
    skip : columns whose value comes from the path.

    Raises
    ------
    DataError : with the files and columns that differ, the first 20.
    """
    skipped = set(skip)
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}
    problems = []
    for number, schema in enumerate(schemas):
        urls = [url for url, n in files if n == number]
        for field in schema:
            if field.name in skipped:
                continue
            known = types.get(field.name, field.type)
            wide = widest(known, field.type)
            types[field.name] = known if wide is None else wide
            first.setdefault(field.name, urls[0])
            if wide is None:
                expected = f"expected {known} as in {first[field.name]}, found {field.type}"
                problems += [f"{url}: column {field.name!r}: {expected}" for url in urls]
    if problems:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise DataError(
            "the files have columns of different types; cast them to one type, or leave these files out",
            [*problems[:_LISTED], *more],
        )
    return pa.schema(list(types.items()))


def widest(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds every value of both, when they are of one kind; else None."""
    if a.equals(b):
        return a
    if pat.is_null(a) or pat.is_null(b):
        return b if pat.is_null(a) else a
    if pat.is_dictionary(a) or pat.is_dictionary(b):
        return widest(*(t.value_type if pat.is_dictionary(t) else t for t in (a, b)))
    if pat.is_integer(a) and pat.is_integer(b):
        return _widest_integer(a, b)
    if pat.is_floating(a) and pat.is_floating(b):
        return a if a.bit_width > b.bit_width else b
    if pat.is_decimal(a) and pat.is_decimal(b):
        return _widest_decimal(a, b)
    if _is_text(a) and _is_text(b):
        return pa.string()
    if pat.is_date(a) and pat.is_date(b):
        return pa.date32()
    if pat.is_timestamp(a) and pat.is_timestamp(b) and a.tz == b.tz:
        return a if _UNITS.index(a.unit) > _UNITS.index(b.unit) else b
    return None


def key_types(values: Mapping[str, Iterable[str | None]], declared: Mapping[str, str]) -> dict[str, pa.DataType]:
    """Types of Hive keys: as declared; else int64 when every value is a canonical integer; else text.

    Parameters
    ----------
    values : by key, its values as in the paths; None is null.
    declared : `data.types`; `category` leaves the choice to the values.

    Raises
    ------
    DataError : with every value that does not fit its declared type.
    """
    types, problems = {}, []
    for name, found in values.items():
        present = sorted({value for value in found if value is not None})
        types[name] = _DECLARED.get(declared.get(name, ""), _inferred(present))
        for value in present:
            try:
                key_scalar(value, types[name])
            except pa.ArrowInvalid:
                problems.append(f"key {name!r}: expected {declared[name]}, found {value!r}")
    if problems:
        raise DataError("Hive keys do not fit data.types; correct the declaration or the folders", problems[:_LISTED])
    return types


def key_scalar(value: str | None, kind: pa.DataType) -> pa.Scalar:
    """The value of a Hive key in its type; ArrowInvalid when it does not fit."""
    return pa.scalar(None, kind) if value is None else pa.scalar(value, pa.string()).cast(kind)


def _inferred(values: Sequence[str]) -> pa.DataType:
    is_integer = all(_INTEGER.fullmatch(value) and -(2**63) <= int(value) < 2**63 for value in values)
    return pa.int64() if values and is_integer else pa.string()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pat.is_string(kind) or pat.is_large_string(kind) or pat.is_string_view(kind))


def _widest_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if pat.is_signed_integer(a) == pat.is_signed_integer(b):
        return a if a.bit_width > b.bit_width else b
    signed, unsigned = (a, b) if pat.is_signed_integer(a) else (b, a)
    bits = max(signed.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)


def _widest_decimal(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    scale = max(a.scale, b.scale)
    precision = max(a.precision - a.scale, b.precision - b.scale) + scale
    if precision > 76:
        return None
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)
