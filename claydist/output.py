"""What commands print: one JSON object, or text for a person; and the options that all of them take."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from claydist.display import json_lines

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]
RegistryUrl = Annotated[str | None, typer.Option("--registry", help="URL of the registry.", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray's address; `local` for a new cluster; by default one that is there."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Ray's own messages too.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log one JSON object a line on stderr.")]


@dataclass(frozen=True)
class Output:
    """Where a result goes: one JSON object on stdout, or text for a person.

    Parameters
    ----------
    log_json : errors go to stderr as lines of the log, not as text.
    """

    as_json: bool
    log_json: bool = False

    def result(self, tree: Mapping[str, Any], text: Any = None) -> None:
        """Print the result: the tree as JSON, or the text (a string or something rich can draw)."""
        if self.as_json:
            print(json.dumps(tree, default=str, ensure_ascii=False), flush=True)
        elif text is not None:
            # Names, paths and expressions are text, also within a table: brackets are no markup, nor `:1:` an emoji.
            Console(soft_wrap=True, markup=False, emoji=False).print(text, highlight=False)

    def error(self, kind: str, message: str, problems: tuple[str, ...] = ()) -> None:
        """Print an error: as the last lines on stderr, then as JSON on stdout, which so ends the log of a job."""
        if self.log_json:
            json_lines().error(kind, message, problems)
            json_lines().end()
        else:
            print("\n".join([f"error: {message}", *(f"  - {p}" for p in problems)]), file=sys.stderr, flush=True)
        if self.as_json:
            tree = {"error": {"kind": kind, "message": message, "problems": list(problems)}}
            print(json.dumps(tree, ensure_ascii=False), flush=True)


def metrics_table(parts: Mapping[str, Mapping[str, Any]]) -> Table:
    """Metrics as rows, parts as columns: fits a narrow terminal."""
    names = list(dict.fromkeys(name for values in parts.values() for name in values))
    table = Table("", caption_justify="left", title_justify="left")
    for part in parts:
        table.add_column(part, justify="right")
    for name in names:
        table.add_row(name, *(show_number(values.get(name)) for values in parts.values()))
    return table


def show_number(value: Any) -> str:
    """A metric or a count as a person reads it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
