from __future__ import annotations

from typing import Any

import pytest

from claydist.metrics import DEFAULT_METRIC
from claydist.spec import Goal
from claydist.training.goals import decide_promotion, deciding_metric, judge


def decide(**keys: Any) -> tuple[bool, str]:
    given = {"goals": [], "metric": "auc", "candidate": 0.8, "champion": None, "has_champion": False,
             "has_test": True, "allowed": True}  # fmt: skip
    return decide_promotion(**{**given, **keys})


MISSED = {"metric": "auc", "bound": "at_least", "target": 0.9, "value": 0.8, "met": False}
MET = {**MISSED, "target": 0.7, "met": True}


def test_goals_are_judged_on_rows_or_slices() -> None:
    goals = [
        Goal(metric="auc", at_least=0.75), Goal(metric="rmse", at_most=2),
        Goal(metric="auc", at_least=0.7, slice="a = 1"),
        Goal(metric="auc", at_least=0.8), Goal(metric="rmse", at_most=1.9), Goal(metric="logloss", at_most=1),
    ]  # fmt: skip
    found = judge(goals, {"auc": 0.75, "rmse": 2.0, "logloss": None}, {"a = 1": {"auc": 0.69}}, "test")
    assert [g["met"] for g in found] == [True, True, False, False, False, False]
    assert found[2] == {"metric": "auc", "bound": "at_least", "target": 0.7, "value": 0.69, "met": False,
                        "slice": "a = 1", "on": "test"}  # fmt: skip
    assert found[1]["bound"] == "at_most"
    assert found[5]["value"] is None


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("bound", [{"at_least": -1e9}, {"at_most": 1e9}])
def test_a_metric_without_a_value_meets_no_goal(value: float | None, bound: dict[str, float]) -> None:
    (found,) = judge([Goal(metric="auc", **bound)], {"auc": value}, {}, "test")
    assert not found["met"]


@pytest.mark.parametrize(("keys", "promoted", "why"), [
    ({}, True, "the first version"), ({"goals": [MET]}, True, "the first version, all goals met"),
    ({"goals": [MET, MISSED]}, False, "1 of 2 goals missed: auc at_least 0.9"),
    ({"allowed": False}, False, "left to a person (--no-promote)"),
    ({"goals": [MISSED], "allowed": False}, False, "1 of 1 goals missed"),
    ({"has_test": False}, True, "the first version"),
    ({"has_champion": True, "champion": 0.7, "has_test": False}, False, "without a test split only a first"),
    ({"has_champion": True, "champion": 0.7}, True, "auc 0.8 against the champion's 0.7"),
    ({"has_champion": True, "champion": 0.8}, True, "auc 0.8 against the champion's 0.8"),
    ({"has_champion": True, "champion": 0.81}, False, "the champion is better: auc 0.81 against 0.8"),
    ({"has_champion": True, "champion": 0.7, "metric": "rmse"}, False, "the champion is better: rmse 0.7 against 0.8"),
    ({"has_champion": True, "champion": 0.9, "metric": "rmse"}, True, "rmse 0.8 against the champion's 0.9"),
    ({"has_champion": True, "champion": None}, True, "the champion cannot be judged"),
    ({"has_champion": True, "champion": None, "candidate": None}, False, "auc is not defined"),
    ({"has_champion": True, "champion": float("nan")}, True, "the champion cannot be judged"),
    ({"has_champion": True, "champion": 0.7, "candidate": None}, False, "auc is not defined"),
    ({"has_champion": True, "champion": 0.7, "candidate": float("nan")}, False, "auc is not defined"),
    ({"has_champion": True, "champion": 0.7, "metric": "ndcg@5"}, True, "ndcg@5"),
    ({"has_champion": True, "champion": 0.7, "objection": "another label"}, False, "another label"),
    ({"objection": "another label"}, True, "the first version"),
])  # fmt: skip
def test_promotion_by_table(keys: dict[str, Any], promoted: bool, why: str) -> None:
    found, text = decide(**keys)
    assert (found, why in text) == (promoted, True), text


def test_the_first_plain_goal_decides() -> None:
    goals = [
        Goal(metric="f1", at_least=0.1, slice="a = 1"),
        Goal(metric="brier", at_most=1),
        Goal(metric="auc", at_least=0),
    ]
    assert deciding_metric(goals, "binary") == "brier"
    assert deciding_metric(goals[:1], "binary") == DEFAULT_METRIC["binary"] == "logloss"
    assert DEFAULT_METRIC["regression"] == "rmse"
    assert DEFAULT_METRIC["multiclass"] == "logloss"
    assert DEFAULT_METRIC["ranking"].startswith("ndcg")
