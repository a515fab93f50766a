"""The small language of `where` and `slice`: a text becomes a condition on columns, and nothing else is evaluated.

    condition  := all ("or" all)*
    all        := one ("and" one)*
    one        := "not" one | "(" condition ")" | comparison
    comparison := column ("=" | "==" | "!=" | "<" | "<=" | ">" | ">=") literal
                | column ["not"] "in" "(" literal ("," literal)* ")"
                | column ["not"] "between" literal "and" literal
                | column "is" ["not"] "null"
    column     := bare_name | "name in double quotes"
    literal    := 'text in single quotes' | number | true | false

Keywords in any case; a quote inside quotes is written twice. There are two truth values: **a comparison with a null
is false**, whatever its operator (`x != 1` and `x not in (1)` are false for a null x), and `not` turns that round
(`not x = 1` is true for a null x). NaN counts as null. A literal is read as the column's type: text as an ISO date or
time for dates and timestamps (a time without an offset is local to the column's zone), a number exactly for integers
and decimals and rounded to the column's width for floats. Text is ordered by its UTF-8 bytes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from claydist.comparisons import Literal, Operand, among, null, operand, related, valid
from claydist.errors import DataError, SpecError

KEYWORDS = frozenset({"and", "or", "not", "in", "is", "null", "between", "true", "false"})
MAX_DEPTH = 100
"""Parentheses and `not` within one another; a person writes three."""

_TOKEN = re.compile(
    r"""\s*(?: (?P<text>'(?:[^']|'')*') | (?P<name>"(?:[^"]|"")*") | (?P<op>==|!=|<=|>=|=|<|>) | (?P<mark>[(),])
             | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])) | (?P<word>[^\W\d]\w*) )""",
    re.VERBOSE,
)
_OPPOSITE = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}


@dataclass(frozen=True)
class Comparison:
    """`column op literal`."""

    column: str
    op: str
    literal: Literal


@dataclass(frozen=True)
class Membership:
    """`column in (literals)`, or `not in`."""

    column: str
    literals: tuple[Literal, ...]
    inside: bool


@dataclass(frozen=True)
class NullTest:
    """`column is null`, or `is not null`."""

    column: str
    null: bool


@dataclass(frozen=True)
class Junction:
    """All (`and`) or any (`or`) of the parts."""

    parts: tuple[Node, ...]
    every: bool


@dataclass(frozen=True)
class Negation:
    """`not part`."""

    part: Node


Node = Comparison | Membership | NullTest | Junction | Negation


@dataclass(frozen=True)
class Expression:
    """A parsed condition on the columns of a table."""

    text: str
    node: Node

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the condition looks at."""
        return frozenset(_columns(self.node))

    def check(self, columns: Iterable[str]) -> None:
        """Pass when every column of the condition is one of `columns`.

        Raises
        ------
        DataError : with each unknown column and the nearest known one.
        """
        known = list(columns)
        problems = []
        for name in sorted(self.columns - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(sorted(known))}"
            problems.append(f"column {name!r} is absent; {hint}")
        if problems:
            raise DataError(f"expression {self.text!r} names columns that the data does not have", problems)

    def mask(self, table: pa.Table) -> np.ndarray:
        """Where the condition is true: (n_rows,) bool.

        Raises
        ------
        DataError : when a column is absent, or its type cannot be compared with its literal.
        """
        self.check(table.column_names)
        operands = {name: operand(name, table.column(name), table.field(name).type) for name in self.columns}
        truth = _Builder(self.text, operands).build(self.node, negated=False)
        if isinstance(truth, pa.Scalar):
            return np.full(table.num_rows, bool(truth.as_py()))
        return np.asarray(pc.fill_null(truth, False))

    def arrow(self, schema: pa.Schema) -> pc.Expression:
        """A filter for `pyarrow.dataset` that is true wherever `mask` is, made to prune row groups.

        It is weaker than the mask in one place: where a float's null or NaN makes the condition true, it is true for
        every row. What it keeps still needs the mask.

        Parameters
        ----------
        schema : of the data; literals take its types.

        Raises
        ------
        DataError : when a column is absent, or its type cannot be compared with its literal.
        """
        self.check(schema.names)
        operands = {name: operand(name, pc.field(name), schema.field(name).type) for name in self.columns}
        return _Builder(self.text, operands).build(self.node, negated=False)


def parse(text: str) -> Expression:
    """The expression that a text spells.

    Raises
    ------
    SpecError : with the position, what was expected and what was found.
    """
    return Expression(text, _Parser(text).whole())


class _Parser:
    """Recursive descent over the tokens; the grammar is at the top of the module."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.at = 0
        self.depth = 0

    def whole(self) -> Node:
        node = self.condition()
        if self.kind != "end":
            self.fail("'and', 'or' or the end")
        return node

    def condition(self) -> Node:
        parts = [self.all()]
        while self.skip("or"):
            parts.append(self.all())
        return parts[0] if len(parts) == 1 else Junction(tuple(parts), every=False)

    def all(self) -> Node:
        parts = [self.one()]
        while self.skip("and"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else Junction(tuple(parts), every=True)

    def one(self) -> Node:
        if self.word not in ("not", "("):
            return self.comparison()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"at most {MAX_DEPTH} parentheses and 'not' within one another")
        if self.skip("not"):
            node: Node = Negation(self.one())
        else:
            self.need("(")
            node = self.condition()
            self.need(")")
        self.depth -= 1
        return node

    def comparison(self) -> Node:
        column = self.column()
        if self.kind == "op":
            op = self.take()
            return Comparison(column, "=" if op == "==" else op, self.literal())
        if self.skip("is"):
            null = not self.skip("not")
            self.need("null")
            return NullTest(column, null)
        holds = not self.skip("not")
        if self.skip("in"):
            return Membership(column, self.literals(), inside=holds)
        if self.skip("between"):
            low = self.literal()
            self.need("and")
            ops = (">=", "<=") if holds else ("<", ">")
            bounds = (Comparison(column, ops[0], low), Comparison(column, ops[1], self.literal()))
            return Junction(bounds, every=holds)
        return self.fail("a comparison (= != < <= > >=, in, between, is null)" if holds else "'in' or 'between'")

    def column(self) -> str:
        if self.kind == "name":
            return self.take()[1:-1].replace('""', '"') or self.fail("a column's name")
        if self.kind == "word" and self.word not in KEYWORDS:
            return self.take()
        hint = "; text in single quotes is a value, a column stands bare or in double quotes"
        return self.fail(f"a column{hint if self.kind == 'text' else ''}")

    def literals(self) -> tuple[Literal, ...]:
        self.need("(")
        found = [self.literal()]
        while self.skip(","):
            found.append(self.literal())
        self.need(")")
        return tuple(found)

    def literal(self) -> Literal:
        if self.word in ("true", "false"):
            value = self.word == "true"
            return Literal(self.take(), value)
        if self.word == "null":
            self.fail("a value (to look for nulls, write: column is null)")
        if self.kind not in ("text", "number"):
            self.fail("a value: text in single quotes, a number, true or false")
        number = self.number() if self.kind == "number" else None
        written = self.take()
        return Literal(written, written[1:-1].replace("''", "'") if number is None else number)

    def number(self) -> Fraction:
        """The number's exact value; exponents that no column holds would cost memory without end."""
        value = Decimal(self.tokens[self.at][1])
        if value and abs(value.adjusted()) > 400:
            self.fail("a number that a column can hold")
        return Fraction(value)

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    @property
    def word(self) -> str:
        """The token in lower case, for keywords and marks; empty for what is quoted."""
        kind, token, _ = self.tokens[self.at]
        return token.lower() if kind in ("word", "mark") else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def skip(self, word: str) -> bool:
        """Whether the next token is this one, which is then taken."""
        if self.word != word:
            return False
        self.take()
        return True

    def need(self, word: str) -> None:
        if not self.skip(word):
            self.fail(repr(word))

    def fail(self, expected: str) -> NoReturn:
        _, token, position = self.tokens[self.at]
        _fail(self.text, position, expected, repr(token) if token else "the end")


def _tokens(text: str) -> Iterable[tuple[str, str, int]]:
    """Kind, token and position of each token, then of the end."""
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            start = at + len(text[at:]) - len(text[at:].lstrip())
            quote = text[start]
            expected = f"a closing {quote}" if quote in "'\"" else "a column, a value, a comparison or a parenthesis"
            _fail(text, start, expected, "the end" if quote in "'\"" else repr(text[start : start + 10].split()[0]))
        yield match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)
        at = match.end()
    yield "end", "", end


def _fail(text: str, position: int, expected: str, found: str) -> NoReturn:
    pointed = f"  {text}\n  {' ' * position}^" if "\n" not in text else f"  {text!r}"
    raise SpecError(f"expression: expected {expected}, found {found} at position {position + 1}\n{pointed}")


def _columns(node: Node) -> Iterable[str]:
    if isinstance(node, Junction):
        for part in node.parts:
            yield from _columns(part)
    elif isinstance(node, Negation):
        yield from _columns(node.part)
    else:
        yield node.column


@dataclass(frozen=True)
class _Builder:
    """Builds the truth of a node, over arrays or over fields, with `not` pushed down to the comparisons.

    Pushed down, because `not` of Arrow keeps a null that the language calls false.
    """

    text: str
    operands: dict[str, Operand]

    def build(self, node: Node, *, negated: bool) -> Any:
        if isinstance(node, Negation):
            return self.build(node.part, negated=not negated)
        if isinstance(node, Junction):
            join = pc.and_kleene if node.every != negated else pc.or_kleene
            return reduce(join, [self.build(part, negated=negated) for part in node.parts])
        column = self.operands[node.column]
        if isinstance(node, NullTest):
            return null(column) if node.null != negated else valid(column)
        truth = self.compare(node, column, negated)
        return pc.or_kleene(truth, null(column)) if negated else truth

    def compare(self, node: Comparison | Membership, column: Operand, negated: bool) -> Any:
        """The truth for rows that are not null; false or null for the others."""
        try:
            if isinstance(node, Comparison):
                return related(column, _OPPOSITE[node.op] if negated else node.op, node.literal)
            return among(column, node.literals, node.inside != negated)
        except DataError as e:
            raise DataError(f"expression {self.text!r}: column {column.name!r} {e.message}") from e
