"""How far scoring has come, for the display."""

from __future__ import annotations

import time
from collections.abc import Sequence

from claydist.display import Display
from claydist.scoring.worker import ScoreTask

PROGRESS_EVERY_S = 0.2


class Board:
    """Progress of the scoring, shown now and then."""

    def __init__(self, display: Display, tasks: Sequence[ScoreTask]) -> None:
        self.display = display
        self.n_rows = sum(work.unit.n_rows for task in tasks for work in task.works)
        self.n_units = sum(len(task.works) for task in tasks)
        self.rows = self.units = 0
        self.began = time.monotonic()
        self.shown = 0.0

    def advance(self, task: ScoreTask) -> None:
        """Count a task that has ended."""
        self.rows += sum(work.unit.n_rows for work in task.works)
        self.units += len(task.works)
        now = time.monotonic()
        if now - self.shown < PROGRESS_EVERY_S and self.units < self.n_units:
            return
        self.shown = now
        speed = self.rows / max(now - self.began, 1e-9)
        left = (self.n_rows - self.rows) / max(speed, 1e-9)
        text = f"{self.units:,} of {self.n_units:,} units  {speed:,.0f} rows/s  {left:.0f} s left"
        self.display.progress({"text": text, "share": self.rows / max(self.n_rows, 1)})
