"""What a person sees while a command works: one calm line on a terminal, plain lines elsewhere; all on stderr.

Under `--log-json` it is one JSON object a line instead, for machines: time, event, run, stage, and what it says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0


class Display(Protocol):
    """Where a person, or a machine that reads logs, sees what a command does."""

    def run(self, run_id: str) -> None:
        """The run is known by this name from now on."""
        ...

    def stage(self, name: str) -> None:
        """A stage begins."""
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
        self.close()
        self._name, self._began = name, time.monotonic()
        self._task = self._progress.add_task(name, total=None)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(f"  {text}", highlight=False, markup=False)

    def progress(self, board: Mapping[str, Any]) -> None:
        """Move the bar to what the slowest worker has done."""
        text, share = describe(board)
        if self._task is not None and text:
            total = 1.0 if share is not None else None
            self._progress.update(self._task, description=f"{self._name}  {text}", completed=share or 0, total=total)

    def close(self) -> None:
        """Print the stage that ends, and take its bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            took = time.monotonic() - self._began
            self._console.print(f"[green]✓[/green] {self._name} [dim]{took:.1f} s[/dim]", highlight=False)


@contextmanager
def display(*, log_json: bool = False) -> Iterator[Plain | JsonLines | Terminal]:
    """A display that fits standard error, for the length of the block."""
    console = Console(stderr=True)
    if log_json:
        yield JsonLines()
    elif not console.is_terminal:
        yield Plain()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            shown = Terminal(console, progress)
            yield shown
            shown.close()


def describe(board: Mapping[str, Any]) -> tuple[str, float | None]:
    """What the workers do in a few words, and the share done of it; by the worker that is furthest behind."""
    if "text" in board:
        return str(board["text"]), board.get("share")
    words = list(board.get("workers", {}).values())
    if not words:
        return "", None
    word = min(words, key=_order)
    n_restarts = board.get("starts", 1) - 1
    again = f"  (restarted {'once' if n_restarts == 1 else f'{n_restarts} times'})" if n_restarts > 0 else ""
    if word["stage"] == "read":
        share = word["rows"] / max(word["of"], 1)
        return f"reading {word['part']}: {word['rows']:,} of {word['of']:,} rows{again}", share
    if word["stage"] in ("boost", "fit"):
        values = ", ".join(f"{part} {value:.5g}" for part, value in word["values"].items())
        unit = "round" if word["stage"] == "boost" else "iteration"
        text = f"{unit} {word['round']} of {word['of']}  {word['metric']}: {values}  {word['rows_per_s']:,.0f} rows/s"
        if "eta_s" in word:
            text += f"  {word['eta_s']:.0f} s left"
        return text + again, word["round"] / word["of"]
    return f"starting workers{again}", None


def _order(word: Mapping[str, Any]) -> tuple[int, float]:
    stage = {"start": 0, "read": 1, "boost": 2, "fit": 2}[word["stage"]]
    return stage, float(word.get("round", word.get("rows", 0)))
