"""Columns, their types and their roles; and the check of a table against them.

claydist knows seven types, whatever width Arrow gives them: integer, float, decimal, boolean, string, date and
timestamp. Nested and binary columns have none and cannot be used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.types as pat

from claydist.errors import DataError
from claydist.spec import DataSpec

Type = Literal["integer", "float", "decimal", "boolean", "string", "date", "timestamp"]
NUMERIC: tuple[str, ...] = ("integer", "float", "decimal", "boolean")

# What a column may hold when the model was trained on the type at the left: pandas turns integers with nulls
# into floats and booleans with nulls into objects, so numbers stand for one another; text never does.
READABLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(NUMERIC, NUMERIC),
    "string": ("string",),
    "date": ("date",),
    "timestamp": ("timestamp",),
}

_ARROW: dict[str, pa.DataType] = {
    "integer": pa.int64(),
    "float": pa.float64(),
    "decimal": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
    "date": pa.date32(),
}


@dataclass(frozen=True)
class Column:
    """One column: its name, its type, and for a timestamp its zone (None where there is none)."""

    name: str
    type: Type
    zone: str | None = None

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow type that rows without one of their own (JSON, Hive keys) are read as."""
        return pa.timestamp("us", self.zone) if self.type == "timestamp" else _ARROW[self.type]

    def describe(self) -> str:
        """The type as a person reads it, e.g. `timestamp (UTC)`."""
        if self.type != "timestamp":
            return self.type
        return f"timestamp ({self.zone})" if self.zone else "timestamp without a zone"


@dataclass(frozen=True)
class Schema:
    """The columns that a model takes, in the order it was trained with."""

    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """Names of the columns, in order."""
        return [column.name for column in self.columns]

    def to_json(self) -> list[dict[str, Any]]:
        """Columns as JSON-able mappings."""
        return [asdict(column) for column in self.columns]

    @classmethod
    def from_json(cls, columns: Iterable[dict[str, Any]]) -> Schema:
        """The schema that `to_json` gave."""
        return cls(tuple(Column(**column) for column in columns))

    def fingerprint(self) -> str:
        """SHA-256 of names, order and types, as hexadecimal text."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def problems(self, found: pa.Schema) -> list[str]:
        """Everything in which `found` cannot be read as this schema; empty when it can."""
        problems = []
        for column in self.columns:
            n_found = len(found.get_all_field_indices(column.name))
            if n_found != 1:
                problems.append(_absent(column.name, found.names) if not n_found else f"column {column.name!r} twice")
                continue
            problems += _mismatch(column, found.field(column.name).type)
        return problems

    def check(self, found: pa.Schema, where: str) -> None:
        """Pass when `found` can be read as this schema.

        Raises
        ------
        DataError : with every column that is absent, or of a type that cannot be read as the trained one.
        """
        if problems := self.problems(found):
            raise DataError(f"{where} does not fit the model's schema; cast the columns or retrain", problems)


def type_of(arrow: pa.DataType) -> Type | None:
    """claydist's type of an Arrow type; None for nested, binary and other types that no model takes."""
    if pat.is_dictionary(arrow):
        return type_of(arrow.value_type)
    if pat.is_integer(arrow):
        return "integer"
    if pat.is_floating(arrow):
        return "float"
    if pat.is_decimal(arrow):
        return "decimal"
    if pat.is_boolean(arrow):
        return "boolean"
    if pat.is_string(arrow) or pat.is_large_string(arrow) or pat.is_string_view(arrow):
        return "string"
    if pat.is_date(arrow):
        return "date"
    return "timestamp" if pat.is_timestamp(arrow) else None


def column_of(field: pa.Field, where: str) -> Column:
    """The column of an Arrow field.

    Raises
    ------
    DataError : when the type is nested, binary or another that no model takes.
    """
    kind = type_of(field.type)
    if kind is None:
        raise DataError(
            f"column {field.name!r} in {where} is {field.type}, which no model takes; "
            f"drop it (data.drop), or flatten it into columns of numbers and text"
        )
    return Column(field.name, kind, field.type.tz if pat.is_timestamp(field.type) else None)


@dataclass(frozen=True)
class Roles:
    """Which column does what: features in the order of training, and the single columns by role."""

    features: tuple[str, ...]
    label: str
    weight: str | None
    offset: str | None
    group: str | None
    key: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """Every column that training reads, once, features first."""
        others = (self.label, self.weight, self.offset, self.group)
        return list(dict.fromkeys([*self.features, *(name for name in others if name)]))


def decide_roles(data: DataSpec, table: pa.Schema, where: str, also: Iterable[str] = ()) -> Roles:
    """Roles of the table's columns by the spec (DESIGN section 3).

    Parameters
    ----------
    data : the spec's part on columns.
    table : the unified schema of the input, Hive keys included.
    where : the input, for messages.
    also : further columns that must be there (of the splits).

    Raises
    ------
    DataError : with every column that is named and absent, and every feature of a type that no model takes.
    """
    single = [c for c in (data.label.column, data.weight, data.offset, data.group) if c]
    named = [*single, *(data.features or ()), *data.drop, *data.key, *data.calendar, *data.types, *also]
    absent = [_absent(name, table.names) for name in dict.fromkeys(named) if name not in table.names]
    if absent:
        raise DataError(f"columns that the spec names are not in {where}", absent)
    others = [n for n in table.names if n not in single and n not in data.drop]
    features = others if data.features is None else data.features
    problems = []
    for name in features:
        try:
            column_of(table.field(name), where)
        except DataError as e:
            problems.append(e.message)
    problems += [f"column {n!r} is to be weight or offset and holds {table.field(n).type}, not numbers"
                 for n in (data.weight, data.offset) if n and type_of(table.field(n).type) not in NUMERIC]  # fmt: skip
    if not features:
        problems.append("no column is left as a feature; look at data.features and data.drop")
    if problems:
        raise DataError(f"{where} cannot be used as the spec says", problems)
    return Roles(tuple(features), data.label.column, data.weight, data.offset, data.group, data.key)


def _absent(name: str, names: Sequence[str]) -> str:
    near = [n for n in names if n.casefold() == name.casefold()] or difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(sorted(names))}"
    return f"column {name!r} is absent; {hint}"


def _mismatch(column: Column, arrow: pa.DataType) -> list[str]:
    """Why a column of this Arrow type cannot be read as `column`; empty when it can (all nulls always can)."""
    if pat.is_null(arrow):
        return []
    kind = type_of(arrow)
    if kind not in READABLE[column.type]:
        return [f"column {column.name!r}: expected {column.describe()}, found {arrow}"]
    if kind == "timestamp" and (arrow.tz is None) != (column.zone is None):
        found = f"a zone ({arrow.tz})" if arrow.tz else "no zone"
        return [f"column {column.name!r}: expected {column.describe()}, found {arrow} with {found}; localise it first"]
    return []
