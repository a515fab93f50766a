"""Goals judged once, and whether the new version takes the champion's place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from claydist.metrics import DEFAULT_METRIC, better, meets
from claydist.spec import Goal


def judge(
    goals: Sequence[Goal], metrics: Mapping[str, Any], slices: Mapping[str, Mapping[str, Any]], on: str
) -> list[dict[str, Any]]:
    """Each goal with its value and whether it is met, as in the JSON of `train`.

    Parameters
    ----------
    metrics : over all rows of the part that judges.
    slices : metrics by the expression of the slice.
    on : the part that judges, test or valid or train.
    """
    judged = []
    for goal in goals:
        values = metrics if goal.slice is None else slices[goal.slice]
        value = values.get(goal.metric)
        bound, target = ("at_least", goal.at_least) if goal.at_least is not None else ("at_most", goal.at_most)
        met = meets(value, goal.at_least, goal.at_most)
        judged.append({"metric": goal.metric, "bound": bound, "target": target, "value": value, "met": met,
                       "slice": goal.slice, "on": on})  # fmt: skip
    return judged


def decide_promotion(
    *, goals: Sequence[Mapping[str, Any]], metric: str, candidate: float | None, champion: float | None,
    has_champion: bool, has_test: bool, allowed: bool, objection: str = "",
) -> tuple[bool, str]:  # fmt: skip
    """Whether to promote, and why, in words (DESIGN section 7).

    Parameters
    ----------
    candidate, champion : `metric` of each on the candidate's test rows; None where it has none.
    allowed : False for `--no-promote`.
    objection : why candidate and champion cannot be compared at all; empty where they can.
    """
    missed = [g for g in goals if not g["met"]]
    if missed:
        texts = ", ".join(f"{g['metric']} {g['bound']} {g['target']:g}" for g in missed)
        return False, f"{len(missed)} of {len(goals)} goals missed: {texts}"
    if not allowed:
        return False, "promotion was left to a person (--no-promote)"
    if not has_champion:
        return True, "the first version" + (", all goals met" if goals else "")
    if objection:
        return False, objection
    if not has_test:
        return False, "without a test split only a first version is promoted"
    if candidate is None or math.isnan(candidate):
        return False, f"{metric} is not defined on these test rows"
    if champion is None or math.isnan(champion):
        return True, "the champion cannot be judged on these test rows"
    if better(metric) * (champion - candidate) > 0:
        return False, f"the champion is better: {metric} {champion:.6g} against {candidate:.6g}"
    return True, f"{metric} {candidate:.6g} against the champion's {champion:.6g} on the same test rows"


def deciding_metric(goals: Sequence[Goal], task: str) -> str:
    """The metric that candidate and champion are compared by."""
    plain = [goal.metric for goal in goals if goal.slice is None]
    return plain[0] if plain else DEFAULT_METRIC[task]
