from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from claydist import cluster, display
from claydist.dataset.statistics import run_and_show
from claydist.display import Plain, RowCount, Silent, Terminal, describe, with_restarts
from claydist.output import Output, metrics_table
from tests.scoring.support import Saying

READ = {"stage": "read", "part": "train", "rows": 5_000, "of": 20_000}
BOOST = {"stage": "boost", "round": 30, "of": 120, "metric": "logloss", "values": {"train": 0.41234567, "valid": 0.5},
         "rows_per_s": 123_456.7}  # fmt: skip


def board(*words: Any, starts: int = 1) -> dict[str, Any]:
    return {"workers": dict(enumerate(words)), "starts": starts}


@pytest.mark.parametrize(("given", "text", "share"), [
    ({}, "starting workers", None), ({"workers": {}, "starts": 0}, "starting workers", None),
    (board({"stage": "start"}), "starting workers", None),
    (board(READ), "reading train: 5,000 of 20,000 rows", 0.25),
    (board({**READ, "rows": 0, "of": 0}), "reading train: 0 of 0 rows", 0.0),
    (board(BOOST), "round 30 of 120  logloss valid 0.5, train 0.41235  123,457 rows/s", 0.25),
    (board({**BOOST, "eta_s": 34.4}),
     "round 30 of 120  34 s left  logloss valid 0.5, train 0.41235  123,457 rows/s", 0.25),
    (board({**BOOST, "eta_s": 340}),
     "round 30 of 120  6 min left  logloss valid 0.5, train 0.41235  123,457 rows/s", 0.25),
    (board({**BOOST, "stage": "fit", "values": {"train": 3}}),
     "iteration 30 of 120  logloss train 3  123,457 rows/s", 0.25),
    (board(BOOST, READ), "reading train: 5,000 of 20,000 rows", 0.25),
    (board(READ, {"stage": "start"}), "starting workers", None),
    (board({**BOOST, "round": 60}, BOOST), "round 30 of 120  logloss valid 0.5, train 0.41235  123,457 rows/s", 0.25),
    (board(READ, starts=3), "reading train: 5,000 of 20,000 rows", 0.25),
])  # fmt: skip
def test_describes_the_worker_that_is_furthest_behind(given: dict[str, Any], text: str, share: float | None) -> None:
    assert describe(given) == (text, share)


@pytest.mark.parametrize(("width", "end"), [(80, "valid 0.5, tra…"), (100, "123,457 …"), (160, "123,457 rows/s")])
def test_a_narrow_terminal_cuts_the_end_of_the_text_and_nothing_else(width: int, end: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    progress = Progress(*display._columns(), console=console)
    shown = Terminal(console, progress)
    shown.stage("training")
    shown.progress(board({**BOOST, "round": 103, "of": 300, "eta_s": 99.0, "values": {"train": 0.41235, "valid": 0.5}}))
    with console.capture() as captured:
        console.print(progress.get_renderable())
    line = captured.get().rstrip("\n")
    assert "\n" not in line
    assert re.fullmatch(
        rf"training [━╸╺ ]{{{display.BAR_WIDTH}}} 0:00:00 round 103 of 300  99 s left  logloss valid .*", line
    )
    assert line.rstrip().endswith(end)


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = metrics_table({"x in [a]": {"auc [b]": 0.5}})
    table.title, table.caption = "m:1:  /srv/[abc]/registry", "[bold]"
    Output(as_json=False).result({}, table)
    out = capsys.readouterr().out
    assert all(text in out for text in ("x in [a]", "auc [b]", "m:1:  /srv/[abc]/registry", "[bold]"))


def test_a_restart_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Plain()
    progress = with_restarts(shown)
    for starts in (0, 1, 1, 2, 2, 3, 3):
        progress(board(READ, starts=starts))
    lines = [line for line in capsys.readouterr().err.splitlines() if "started again" in line]
    assert [line.partition("(")[2] for line in lines] == ["restart 1)", "restart 2)"]


def test_what_is_said_after_a_stage_stands_below_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=80)
    shown = Terminal(console, Progress(*display._columns(), console=console))
    shown.stage("table")
    shown.done()
    shown.say("training xgboost")
    shown.stage("inventory")
    shown.done()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["table", "xgboost", "inventory"]


def test_a_pass_over_rows_is_shown_with_its_rate_and_its_end() -> None:
    shown = Saying()
    count = RowCount(shown, 40, 3, "units")
    for n_rows in (10, 20, 10):
        count.add(n_rows)
    assert re.fullmatch(r"3 of 3 units  0 s left  [\d,]+ rows/s", shown.boards[-1]["text"])
    assert shown.boards[-1]["share"] == 1.0


def test_tasks_are_counted_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_tasks(function: Any, items: Any, shared: Any, on_done: Any) -> list[Any]:
        results = [function(item, shared) for item in items]
        for index in (1, 0):
            on_done(index, results[index])
        return results

    monkeypatch.setattr(cluster, "run_tasks", run_tasks)
    monkeypatch.setattr(display, "COUNT_EVERY_S", 0.0)
    shown = Saying()
    run = run_and_show(shown, [[3, 4], [13]], "tasks of test")
    assert run(lambda item, shared: (item, shared), [((0, (0, 1)),), ((1, (0,)),)], "plan") == [
        (((0, (0, 1)),), "plan"), (((1, (0,)),), "plan")
    ]  # fmt: skip
    assert [board["share"] for board in shown.boards] == [0.65, 1.0]
    assert shown.boards[0]["text"].startswith("1 of 2 tasks of test  ")


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
    assert [line["event"] for line in lines] == ["stage", "message", "progress", "progress", "end"]
    assert [line["stage"] for line in lines] == ["training"] * 5
    assert lines[1]["message"] == 'a "quoted" é line'
    assert [(line["rank"], line["work"]) for line in lines[2:4]] == [(0, READ), (1, BOOST)]
