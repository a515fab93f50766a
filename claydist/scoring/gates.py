"""Checks between scoring and publishing: pure functions of a date's account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claydist.scoring.units import UnitStats
from claydist.sketch import Sketch, drift
from claydist.spec import Gate, GatesSpec

CONSTANT_ROWS = 100
"""Of fewer rows equal scores say nothing."""


@dataclass(frozen=True)
class Verdict:
    """What one gate says; `value` is None where there is nothing to compare with."""

    gate: str
    value: float | None
    warn: float | None
    fail: float | None

    @property
    def outcome(self) -> str:
        """One of pass, warn, fail."""
        for name, limit in (("fail", self.fail), ("warn", self.warn)):
            if self.value is not None and limit is not None and self.value > limit:
                return name
        return "pass"

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON-able mapping."""
        return {"gate": self.gate, "value": self.value, "warn": self.warn, "fail": self.fail, "outcome": self.outcome}

    def describe(self) -> str:
        """The verdict as a person reads it."""
        limit = self.fail if self.outcome == "fail" else self.warn
        return f"{self.gate} is {self.value:.4g}, above its limit {limit:g}" if limit is not None else self.gate


def judge_gates(
    stats: UnitStats, gates: GatesSpec, training: Sketch | None, last: Sketch | None
) -> tuple[Verdict, ...]:
    """All gates on one date.

    Parameters
    ----------
    training : scores on the rows that the model was evaluated on; None where the bundle has none.
    last : scores of the last published date before this one; None where there is none.
    """
    n = stats.n_written
    constant = None
    if n >= CONSTANT_ROWS and n > stats.n_null:
        constant = float(stats.scores.minimum == stats.scores.maximum)
    worst = max(stats.unseen.values(), default=0)
    return (
        _verdict("null_fraction", stats.n_null / n if n else None, gates.null_fraction),
        Verdict("constant", constant, *(0.0 if gates.constant == kind else None for kind in ("warn", "fail"))),
        _verdict("psi_training", drift(training, stats.scores) if training else None, gates.psi_training),
        _verdict("psi_last", drift(last, stats.scores) if last else None, gates.psi_last),
        _verdict("unseen_fraction", worst / n if n else None, gates.unseen_fraction),
    )


def too_many(stats: UnitStats, max_quarantined: float) -> bool:
    """True when more rows are quarantined than the spec allows: a number of rows, or below 1 a fraction of them."""
    scored = stats.n_read - stats.left_out
    allowed = max_quarantined * scored if max_quarantined < 1 else max_quarantined
    return stats.n_quarantined > allowed


def reasons(stats: UnitStats) -> Sequence[str]:
    """How many rows are quarantined for each reason, the most frequent first, as lines."""
    ordered = sorted(stats.quarantined.items(), key=lambda item: (-item[1], item[0]))
    return [f"{n} rows: {reason}" for reason, n in ordered]


def _verdict(name: str, value: float | None, gate: Gate) -> Verdict:
    return Verdict(name, value, gate.warn, gate.fail)
