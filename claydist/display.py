"""What a person sees while a command works: one calm line on a terminal, plain lines elsewhere; all on stderr.

Under `--log-json` it is one JSON object a line instead, for machines: time, event, run, stage, and what it says. The
events are run, stage, message, progress, error and, after all others, end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

PLAIN_EVERY_S = 10.0
COUNT_EVERY_S = 0.2
BAR_WIDTH = 10


class Display(Protocol):
    """Where a person, or a machine that reads logs, sees what a command does."""

    def run(self, run_id: str) -> None:
        """The run is known by this name from now on."""
        ...

    def stage(self, name: str) -> None:
        """A stage begins; the one before has ended."""
        ...

    def done(self) -> None:
        """The stage has ended, and what follows belongs to none."""
        ...

    def say(self, text: str) -> None:
        """Something that a person should know."""
        ...

    def progress(self, board: Mapping[str, Any]) -> None:
        """How far it is: what the workers do (`training.progress.Board.read`), or {text, share}."""
        ...


class Silent:
    """Shows nothing; for use from Python."""

    def run(self, run_id: str) -> None:
        """Ignore the run."""

    def stage(self, name: str) -> None:
        """Ignore the stage."""

    def done(self) -> None:
        """Ignore its end."""

    def say(self, text: str) -> None:
        """Ignore the text."""

    def progress(self, board: Mapping[str, Any]) -> None:
        """Ignore the progress."""


class Plain:
    """One line for each stage and, at most every PLAIN_EVERY_S seconds, for progress; for logs."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last = 0.0

    def run(self, run_id: str) -> None:
        """Print the run's name."""
        self.say(f"run {run_id}")

    def stage(self, name: str) -> None:
        """Print that the stage begins."""
        self.say(f"{name} ...")

    def done(self) -> None:
        """Print nothing: the next line tells."""

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:6.1f}s] {text}", file=sys.stderr, flush=True)

    def progress(self, board: Mapping[str, Any]) -> None:
        """Print what the slowest worker does, now and then."""
        text, _ = describe(board)
        if text and time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            self.say(text)


class JsonLines:
    """One JSON object a line on stderr; progress at most every PLAIN_EVERY_S seconds, one line a worker."""

    def __init__(self) -> None:
        self._run: str | None = None
        self._stage: str | None = None
        self._last = 0.0

    def run(self, run_id: str) -> None:
        """Write that the run begins; all later lines carry its id."""
        self._run = run_id
        self._write("run")

    def stage(self, name: str) -> None:
        """Write that the stage begins."""
        self._stage = name
        self._write("stage")

    def done(self) -> None:
        """Later lines are of no stage."""
        self._stage = None

    def say(self, text: str) -> None:
        """Write the text."""
        self._write("message", message=text)

    def progress(self, board: Mapping[str, Any]) -> None:
        """Write what each worker does, now and then."""
        if time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            if "text" in board:
                self._write("progress", message=board["text"], share=board.get("share"))
            for rank, word in sorted(board.get("workers", {}).items()):
                self._write("progress", rank=rank, starts=board.get("starts", 1), work=dict(word))

    def error(self, kind: str, message: str, problems: Sequence[str] = ()) -> None:
        """Write what ends the command, with the run and stage it happened in."""
        self._write("error", kind=kind, message=message, problems=list(problems))

    def end(self) -> None:
        """Write that nothing follows."""
        self._write("end")

    def _write(self, event: str, **more: Any) -> None:
        now = datetime.now(UTC).isoformat()
        line = {"time": now, "event": event, "run": self._run, "stage": self._stage, **more}
        print(json.dumps(line, default=str, ensure_ascii=False), file=sys.stderr, flush=True)


class Terminal:
    """A bar that follows the work, with the stages done above it."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task: TaskID | None = None
        self._name = ""
        self._began = 0.0

    def run(self, run_id: str) -> None:
        """Print the run's name."""
        self._console.print(f"[dim]run {run_id}[/dim]", highlight=False)

    def stage(self, name: str) -> None:
        """Close the stage before with its seconds, and begin this one."""
        self.done()
        self._name, self._began = name, time.monotonic()
        self._task = self._progress.add_task(name, total=None, text="")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(f"  {text}", highlight=False, markup=False)

    def progress(self, board: Mapping[str, Any]) -> None:
        """Move the bar to what the slowest worker has done."""
        text, share = describe(board)
        if self._task is not None and text:
            total = 1.0 if share is not None else None
            self._progress.update(self._task, text=text, completed=share or 0, total=total)

    def done(self) -> None:
        """Print the stage that ends, and take its bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            took = time.monotonic() - self._began
            self._console.print(f"[green]✓[/green] {self._name} [dim]{took:.1f} s[/dim]", highlight=False)


@cache
def json_lines() -> JsonLines:
    """The log of this process: what ends a command is written with the run and stage that the command had come to."""
    return JsonLines()


@contextmanager
def display(*, log_json: bool = False) -> Iterator[Plain | JsonLines | Terminal]:
    """A display that fits standard error, for the length of the block."""
    console = Console(stderr=True)
    if log_json:
        lines = json_lines()
        yield lines
        lines.end()
    elif not console.is_terminal:
        yield Plain()
    else:
        with Progress(*_columns(), console=console, transient=True) as progress:
            shown = Terminal(console, progress)
            yield shown
            shown.done()


def _columns() -> tuple[ProgressColumn, ...]:
    """What does not grow comes first: a narrow terminal cuts the end of the text, and nothing else."""
    # Of a table too wide rich narrows the columns that may wrap before all others.
    name, bar, elapsed = (Column(no_wrap=True) for _ in range(3))
    return (
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=BAR_WIDTH, table_column=bar),
        TimeElapsedColumn(table_column=elapsed),
        _TextToTheEdge(),
    )


class _TextToTheEdge(ProgressColumn):
    """The task's text on one line, as much of it as there is room for."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


def with_restarts(display: Display) -> Callable[[Mapping[str, Any]], None]:
    """`display.progress` of a board of workers, which also says each restart once."""
    said = 1

    def progress(board: Mapping[str, Any]) -> None:
        nonlocal said
        if (starts := board.get("starts", 1)) > said:
            said = starts
            display.say(f"workers failed and were started again (restart {said - 1})")
        display.progress(board)

    return progress


class RowCount:
    """How far a pass over rows has come, for the display: pieces of work done, time left, rows a second.

    Parameters
    ----------
    n_rows, n_pieces : all that there is to do.
    noun : what a piece is called, in the plural.
    """

    def __init__(self, display: Display, n_rows: int, n_pieces: int, noun: str) -> None:
        self.display, self.n_rows, self.n_pieces, self.noun = display, n_rows, n_pieces, noun
        self.rows = self.pieces = 0
        self.began = time.monotonic()
        self.shown = 0.0

    def add(self, n_rows: int, n_pieces: int = 1) -> None:
        """Count what is done, and show it now and then."""
        self.rows += n_rows
        self.pieces += n_pieces
        now = time.monotonic()
        if now - self.shown < COUNT_EVERY_S and self.pieces < self.n_pieces:
            return
        self.shown = now
        speed = self.rows / max(now - self.began, 1e-9)
        left = time_left((self.n_rows - self.rows) / max(speed, 1e-9))
        text = f"{self.pieces:,} of {self.n_pieces:,} {self.noun}  {left}  {speed:,.0f} rows/s"
        self.display.progress({"text": text, "share": self.rows / max(self.n_rows, 1)})


def describe(board: Mapping[str, Any]) -> tuple[str, float | None]:
    """What the workers do in a few words, and the share done of it; by the worker that is furthest behind."""
    if "text" in board:
        return str(board["text"]), board.get("share")
    words = list(board.get("workers", {}).values())
    if not words:
        return "starting workers", None
    word = min(words, key=_order)
    if word["stage"] == "read":
        share = word["rows"] / max(word["of"], 1)
        return f"reading {word['part']}: {word['rows']:,} of {word['of']:,} rows", share
    if word["stage"] in ("boost", "fit"):
        unit = "round" if word["stage"] == "boost" else "iteration"
        # The part that stops the training comes first.
        values = [f"{part} {word['values'][part]:.5g}" for part in ("valid", "train") if part in word["values"]]
        return "  ".join([
            f"{unit} {word['round']} of {word['of']}", *([time_left(word["eta_s"])] if "eta_s" in word else ()),
            f"{word['metric']} {', '.join(values)}", f"{word['rows_per_s']:,.0f} rows/s",
        ]), word["round"] / word["of"]  # fmt: skip
    return "starting workers", None


def time_left(seconds: float) -> str:
    """An estimate of the time that is left, as a person reads it."""
    return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"


def _order(word: Mapping[str, Any]) -> tuple[int, float]:
    stage = {"start": 0, "read": 1, "boost": 2, "fit": 2}[word["stage"]]
    return stage, float(word.get("round", word.get("rows", 0)))
