from __future__ import annotations

import json
from typing import Any

import pytest

from claydist import display
from claydist.display import Plain, Silent, describe

READ = {"stage": "read", "part": "train", "rows": 5_000, "of": 20_000}
BOOST = {"stage": "boost", "round": 30, "of": 120, "metric": "logloss", "values": {"train": 0.41234567, "valid": 0.5},
         "rows_per_s": 123_456.7}  # fmt: skip


def board(*words: Any, starts: int = 1) -> dict[str, Any]:
    return {"workers": dict(enumerate(words)), "starts": starts}


@pytest.mark.parametrize(("given", "text", "share"), [
    ({}, "", None), ({"workers": {}, "starts": 0}, "", None),
    (board({"stage": "start"}), "starting workers", None),
    (board(READ), "reading train: 5,000 of 20,000 rows", 0.25),
    (board({**READ, "rows": 0, "of": 0}), "reading train: 0 of 0 rows", 0.0),
    (board(BOOST), "round 30 of 120  logloss: train 0.41235, valid 0.5  123,457 rows/s", 0.25),
    (board({**BOOST, "stage": "fit", "values": {"train": 3}}),
     "iteration 30 of 120  logloss: train 3  123,457 rows/s", 0.25),
    (board(BOOST, READ), "reading train: 5,000 of 20,000 rows", 0.25),
    (board(READ, {"stage": "start"}), "starting workers", None),
    (board({**BOOST, "round": 60}, BOOST), "round 30 of 120  logloss: train 0.41235, valid 0.5  123,457 rows/s", 0.25),
    (board(READ, starts=3), "reading train: 5,000 of 20,000 rows  (restarted 2 times)", 0.25),
    (board(READ, starts=2), "reading train: 5,000 of 20,000 rows  (restarted once)", 0.25),
])  # fmt: skip
def test_describes_the_worker_that_is_furthest_behind(given: dict[str, Any], text: str, share: float | None) -> None:
    assert describe(given) == (text, share)


def test_plain_lines_go_to_standard_error_and_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Plain()
    shown.stage("training")
    for _ in range(50):
        shown.progress(board(READ))
    shown.progress({})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) <= 2
    assert captured.err.splitlines()[0].endswith("s] training ...")


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Silent()
    shown.stage("training")
    shown.say("hello")
    shown.progress(board(READ))
    assert capsys.readouterr() == ("", "")


def test_json_lines_are_objects_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with display.display(log_json=True) as shown:
        shown.stage("training")
        shown.say('a "quoted" é line')
        shown.progress(board(READ, BOOST))
        shown.progress(board(READ, BOOST))
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.err.splitlines()]
    assert captured.out == ""
    assert [line["event"] for line in lines] == ["stage", "message", "progress", "progress"]
    assert [line["stage"] for line in lines] == ["training"] * 4
    assert lines[1]["message"] == 'a "quoted" é line'
    assert [(line["rank"], line["work"]) for line in lines[2:]] == [(0, READ), (1, BOOST)]
