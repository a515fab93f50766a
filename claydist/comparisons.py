"""The truth of one comparison on one Arrow column, over values or, to prune row groups, over a field.

A null and NaN make every comparison false. A literal takes the column's type exactly: `lower` keeps the meaning where
the type cannot hold the value: an integer column has no 1.5, and `x > 1.5` becomes `x > 1`; it has no 2^70, and
`x < 2^70` becomes "always".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from claydist.errors import DataError
from claydist.schema import type_of

_COMPARE = {
    "=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip
_WIDE = Context(prec=400)  # the default context would round a literal of more than 28 digits
_UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ADVICE = {
    "boolean": "compare it with = or != and true or false",
    "date": "write a date such as '2013-07-04'",
    "timestamp": "write a time such as '2013-07-04 15:30:00'",
}


@dataclass(frozen=True)
class Literal:
    """A constant as written, and its value: str, Fraction (numbers, exact) or bool."""

    written: str
    value: str | Fraction | bool


@dataclass(frozen=True)
class Operand:
    """A column's values, or the field that stands for them, and the type that literals take."""

    name: str
    values: Any
    type: pa.DataType

    @property
    def is_field(self) -> bool:
        """Whether the values are not there yet."""
        return isinstance(self.values, pc.Expression)


def operand(name: str, values: Any, kind: pa.DataType) -> Operand:
    """The operand in a type that every comparison kernel takes."""
    plain = kind.value_type if pat.is_dictionary(kind) else kind
    plain = {pa.string_view(): pa.large_string(), pa.float16(): pa.float32()}.get(plain, plain)
    return Operand(name, values if plain == kind else values.cast(plain), plain)


def related(column: Operand, op: str, literal: Literal) -> Any:
    """Where `column op literal` is true; false or null elsewhere. DataError where the types do not fit."""
    never = _truth(column, False)
    if pat.is_null(column.type):
        return never
    op, value = lower(op, literal, column.type)
    if value is None:
        return valid(column) if op == "!=" else never
    truth = _COMPARE[op](column.values, pa.scalar(value, column.type))
    # NaN differs from everything, and a comparison with it is false here.
    return pc.and_kleene(truth, valid(column)) if op == "!=" and pat.is_floating(column.type) else truth


def among(column: Operand, literals: tuple[Literal, ...], inside: bool) -> Any:
    """Where the column is in (or, not null and not in) the literals. DataError where the types do not fit."""
    if pat.is_null(column.type):
        return _truth(column, False)
    values = [value for _, value in (lower("=", literal, column.type) for literal in literals) if value is not None]
    if pat.is_floating(column.type) and 0.0 in values:
        values += [0.0, -0.0]  # is_in tells them apart
    found = pc.is_in(column.values, value_set=pa.array(values, column.type))
    return found if inside else pc.and_kleene(valid(column), pc.invert(found))


def _truth(column: Operand, value: bool) -> Any:
    return pc.scalar(value) if column.is_field else pa.scalar(value)


def null(column: Operand) -> Any:
    """Where the column is null or NaN.

    For a float field it is true everywhere: Parquet statistics do not count NaN, and pyarrow (26.0, seen) would prune
    a row group that has one.
    """
    if not pat.is_floating(column.type):
        return pc.is_null(column.values)
    return _truth(column, True) if column.is_field else pc.is_null(column.values, nan_is_null=True)


def valid(column: Operand) -> Any:
    """Where the column is neither null nor NaN; for a float field NaN passes, which only keeps more row groups."""
    if column.is_field or not pat.is_floating(column.type):
        return pc.is_valid(column.values)
    return pc.invert(pc.is_null(column.values, nan_is_null=True))


def lower(op: str, literal: Literal, kind: pa.DataType) -> tuple[str, Any]:
    """`(op, value)` with the meaning of `op literal` on a column of this type; the value is None for a constant truth.

    Parameters
    ----------
    op : one of = != < <= > >=.
    literal : as parsed.
    kind : type of the column, no dictionary.

    Returns
    -------
    The operator, possibly another one, and the value that `pyarrow.scalar(value, kind)` takes; `("!=", None)` is true
    for every row that is not null, `("=", None)` for none.

    Raises
    ------
    DataError : when the type cannot be compared with the literal; the text goes on from "column 'x' ".
    """
    type_, value = type_of(kind), literal.value
    if type_ == "string" and isinstance(value, str):
        return op, value
    if type_ == "boolean" and isinstance(value, bool) and op in ("=", "!="):
        return op, value
    if type_ == "float" and isinstance(value, Fraction):
        return op, _float(value)
    if type_ in ("integer", "decimal") and isinstance(value, Fraction):
        return _on_grid(op, value, kind)
    if type_ in ("date", "timestamp") and isinstance(value, str):
        return _on_grid(op, _seconds(value, kind), kind)
    if type_ is None:
        raise DataError(f"is {kind}, which can only be tested with 'is null'")
    quoted = f"write '{literal.written}', in single quotes"
    advice = quoted if type_ == "string" else _ADVICE.get(type_, "write a number, without quotes")
    raise DataError(f"is {kind} and cannot be compared by {op} with {literal.written}; {advice}")


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _on_grid(op: str, value: Fraction, kind: pa.DataType) -> tuple[str, Any]:
    """The condition in whole units of the type."""
    per_unit, least, largest = _grid(kind)
    units = value * per_unit
    if units.denominator != 1:
        if op in ("=", "!="):
            return op, None
        units = Fraction(floor(units) if op in ("<=", ">") else ceil(units))
    if units > largest:
        return ("!=" if op in ("!=", "<", "<=") else "="), None
    if units < least:
        return ("!=" if op in ("!=", ">", ">=") else "="), None
    return op, Decimal(units.numerator).scaleb(-kind.scale, _WIDE) if pat.is_decimal(kind) else units.numerator


def _grid(kind: pa.DataType) -> tuple[Fraction, int, int]:
    """Units of the type in 1 (or in one second), and its least and largest value in units."""
    if pat.is_decimal(kind):
        largest = 10**kind.precision - 1
        return Fraction(10) ** kind.scale, -largest, largest
    if pat.is_unsigned_integer(kind):
        return Fraction(1), 0, 2**kind.bit_width - 1
    half = 2 ** (kind.bit_width - 1)
    if pat.is_timestamp(kind):
        return Fraction(_UNITS_PER_S[kind.unit]), -half, half - 1
    if pat.is_date(kind):
        return Fraction(1, 86_400) if pat.is_date32(kind) else Fraction(1000), -half, half - 1
    return Fraction(1), -half, half - 1


def _seconds(text: str, kind: pa.DataType) -> Fraction:
    """Exact seconds since 1970 of an ISO date or time."""
    zone = kind.tz if pat.is_timestamp(kind) else None
    try:
        # fromisoformat drops what is finer than a microsecond, so the fraction is read apart.
        digits = re.search(r"[.,](\d+)", text)
        moment = datetime.fromisoformat(text.replace(digits[0], "") if digits else text)
        if zone is None and moment.tzinfo is not None:
            raise ValueError("the column has no zone, so the value takes no offset")
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC if zone is None else _zone(zone))
    except (ValueError, ZoneInfoNotFoundError) as e:
        example = "'2013-07-04' or '2013-07-04 15:30:00" + ("+02:00'" if zone else "'")
        raise DataError(f"is {kind}; expected an ISO date or time such as {example}, found {text!r} ({e})") from e
    whole = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return Fraction(whole.days * 86_400 + whole.seconds) + (Fraction(f"0.{digits[1]}") if digits else 0)


def _zone(name: str) -> Any:
    """The zone of an Arrow type: a name of the IANA list, or an offset such as +02:00."""
    return datetime.strptime(name, "%z").tzinfo if name[0] in "+-" else ZoneInfo(name)
