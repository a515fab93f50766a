from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from claydist.dataset.footers import take_inventory
from claydist.errors import DataError, SpecError
from claydist.scoring.choice import Choice, decide
from claydist.scoring.dates import DateRule, find_dates, from_days, parse_day, to_days
from claydist.scoring.gates import judge_gates, reasons, too_many
from claydist.scoring.lock import Lease, Owner, judge
from claydist.scoring.units import (
    State,
    UnitStats,
    plan_partition,
    runs_of,
    spec_part,
)
from claydist.sketch import Sketch
from claydist.spec import GatesSpec, ScoreSpec
from claydist.specfile import load_spec
from claydist.storage import open_store
from tests.scoring.support import FIRST, make_spec, write_days


def here(function: Any, items: Any) -> list[Any]:
    return [function(item) for item in items]


# Dates


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-11-21", date(2026, 11, 21)), ("20261121", date(2026, 11, 21)), (20261121, date(2026, 11, 21)),
        (date(2026, 11, 21), date(2026, 11, 21)), ("2026-13-01", None), ("21.11.2026", None),
        ("2026-11-21T10:00", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_a_date_is_read_from_text(text: Any, day: date | None) -> None:
    assert parse_day(text) == day


@given(st.dates())
def test_days_since_the_epoch_there_and_back(day: date) -> None:
    assert from_days(to_days(day)) == day
    assert np.datetime64(day).astype(int) == to_days(day)


@pytest.mark.parametrize("kind", ["date", "text", "dictionary", "integers", "parts"])
def test_dates_of_rows_are_found_whatever_holds_them(tmp_path: Path, kind: str) -> None:
    days = [date(2026, 11, 1 + (i * 7) % 5) for i in range(50)]
    columns = {
        "date": {"when": pa.array(days)},
        "text": {"when": pa.array([d.isoformat() for d in days])},
        "dictionary": {"when": pa.array([d.isoformat() for d in days]).dictionary_encode()},
        "integers": {"when": pa.array([int(f"{d:%Y%m%d}") for d in days])},
        "parts": {"y": pa.array([2026] * 50), "m": pa.array(["11"] * 50), "d": pa.array([float(d.day) for d in days])},
    }[kind]
    rule = DateRule("dt", ("y", "m", "d") if kind == "parts" else ("when",))
    table = pa.table(columns)
    assert [from_days(int(n)) for n in rule.of_rows(table, "here")] == days
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    inventory = take_inventory(str(tmp_path))
    rule.check(inventory.schema, "here")
    found = find_dates(inventory, rule, None, here)
    assert {day: sum(rows.n_rows for rows in where) for day, where in found.items() if day} == {
        day: days.count(day) for day in sorted(set(days))
    }
    one = find_dates(inventory, rule, {date(2026, 11, 3)}, here)
    assert one == {date(2026, 11, 3): found[date(2026, 11, 3)]}


def test_statistics_spare_reading_row_groups_of_other_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = [date(2026, 11, 1 + i // 10) for i in range(40)]
    pq.write_table(pa.table({"when": days}), tmp_path / "a.parquet", row_group_size=20)
    inventory = take_inventory(str(tmp_path))
    read: list[int] = []

    def counting(inventory: Any, pieces: Any, columns: Any) -> Any:
        read.extend(piece.row_group for piece in pieces)
        return read_pieces(inventory, pieces, columns)

    from claydist.scoring import dates

    read_pieces = dates.read_pieces
    monkeypatch.setattr(dates, "read_pieces", counting)
    found = find_dates(inventory, DateRule("when", ("when",)), {date(2026, 11, 4)}, here)
    assert read == [1]
    assert found[date(2026, 11, 4)][0].row_groups == ((1, 10),)


def test_a_key_in_the_path_that_is_no_date_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dt=soon").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "dt=soon" / "a.parquet")
    with pytest.raises(DataError, match=r"expected a date in the path of .*found \{'dt': 'soon'\}"):
        find_dates(take_inventory(str(tmp_path)), DateRule("dt", ("dt",)), None, here)


def test_only_a_range_with_both_ends_has_gaps() -> None:
    first, second, third = (date(2026, 1, n) for n in (1, 2, 3))
    found = [first, third, date(9999, 12, 31)]

    def days(*arguments: Any) -> list[date | None]:
        choice = Choice.of(*arguments)
        return choice.days(day for day in found if choice.asks_for(day))

    assert days(None, None, None) == found
    assert days(None, second, None) == [third, date(9999, 12, 31)]
    assert days(None, None, second) == [first]
    assert days(None, first, third) == [first, second, third]
    assert days(second, None, None) == [second]


# Units


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_runs_of_row_groups_are_consecutive_and_bounded(rows: list[int], most: int) -> None:
    runs = runs_of(rows, most)
    assert runs == sorted(runs)
    for run in set(runs):
        inside = [n for n, at in zip(rows, runs, strict=True) if at == run]
        assert sum(inside) <= most or sum(n > 0 for n in inside) == 1


def test_units_are_the_same_whatever_dates_are_asked_for(tmp_path: Path) -> None:
    table = pa.table({"when": [date(2026, 11, 1 + i % 3) for i in range(60)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    inventory, rule = take_inventory(str(tmp_path)), DateRule("when", ("when",))
    every, one = (find_dates(inventory, rule, wanted, here) for wanted in (None, {date(2026, 11, 2)}))
    plans = [plan_partition(inventory, rule, date(2026, 11, 2), f[date(2026, 11, 2)], "m", "s") for f in (every, one)]
    assert plans[0] == plans[1]
    assert plans[0].n_rows == 20
    assert plans[0].folder == "when=2026-11-02"
    assert not plans[0].name("u", "r").endswith(".parquet")


def test_the_state_changes_with_the_files_of_the_date_only(tmp_path: Path) -> None:
    days = write_days(tmp_path, n_days=2)

    def state(number: int) -> str:
        inventory, rule = take_inventory(str(tmp_path)), DateRule("dt", ("dt",))
        day = sorted(days)[number]
        return plan_partition(inventory, rule, day, find_dates(inventory, rule, None, here)[day], "m", "s").state.digest

    before = state(0), state(1)
    pq.write_table(days[FIRST].slice(5), tmp_path / f"dt={FIRST}" / "part-0.parquet")
    assert state(0) != before[0]
    assert state(1) == before[1]


def test_limits_are_no_part_of_what_scores_depend_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    assert spec_part(spec) == spec_part(make_spec(tmp_path, max_quarantined=5, gates={"constant": "off"}, max_cpus=1))
    assert spec_part(spec) != spec_part(make_spec(tmp_path, where="x > 0"))


def test_accounts_add_up() -> None:
    a = UnitStats(10, 2, {"bad": 1}, 7, 1, {"city": 3})
    b = UnitStats(5, 0, {"bad": 1, "worse": 1}, 3, 0, {})
    a.scores.add([0.1, 0.5])
    total = a + b
    assert total == UnitStats(15, 2, {"bad": 2, "worse": 1}, 10, 1, {"city": 3}, a.scores)
    assert UnitStats.from_json(total.to_json()) == total
    assert reasons(total) == ["2 rows: bad", "1 rows: worse"]


@pytest.mark.parametrize(
    ("published", "choice", "what"),
    [
        (None, {}, "score"), ("same", {}, "already"), ("same", {"replace": True}, "score"), ("other", {}, "stale"),
        ("other", {"replace_stale": True}, "score"), ("same", {"replace_stale": True}, "already"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_date(tmp_path: Path, published: str | None, choice: dict[str, bool], what: str) -> None:
    write_days(tmp_path, n_days=1)
    inventory, rule = take_inventory(str(tmp_path)), DateRule("dt", ("dt",))
    partition = plan_partition(inventory, rule, FIRST, find_dates(inventory, rule, None, here)[FIRST], "m", "s")
    state = partition.state if published == "same" else replace(partition.state, model="another")
    manifest = None if published is None else {"state": state.to_json()}
    assert decide(manifest, partition, Choice(**choice))[0] == what


def test_a_state_names_what_changed() -> None:
    assert State("m", "i", "s").changes({"model": "m", "inventory": "j"}) == ["inventory", "spec"]


# Gates


def _stats(scores: list[float], **more: Any) -> UnitStats:
    stats = UnitStats(n_read=len(scores), n_written=len(scores), **more)
    stats.scores.add(scores)
    return stats


@pytest.mark.parametrize(
    ("stats", "failing"),
    [
        (_stats([0.1, 0.9] * 60), []),
        (_stats([0.5] * 120), ["constant"]),
        (_stats([0.5] * 99), []),
        (_stats([0.1, 0.9] * 60, n_null=1), ["null_fraction"]),
        (_stats([float("nan")] * 120, n_null=120), ["null_fraction"]),
    ],
)
def test_gates_by_default(stats: UnitStats, failing: list[str]) -> None:
    verdicts = judge_gates(stats, GatesSpec(), None, None)
    assert [v.gate for v in verdicts if v.outcome == "fail"] == failing


def test_drift_warns_and_fails_by_its_limits() -> None:
    training = Sketch()
    training.add(np.linspace(0, 1, 1000))
    gates = GatesSpec.model_validate({"psi_training": {"warn": 0.1, "fail": 5}, "psi_last": {"fail": 0.1}})
    verdicts = {v.gate: v for v in judge_gates(_stats([0.05, 0.06] * 100), gates, training, training)}
    assert verdicts["psi_training"].outcome in ("warn", "fail")
    assert verdicts["psi_last"].outcome == "fail"
    same = {v.gate: v for v in judge_gates(_stats(np.linspace(0, 1, 500).tolist()), gates, training, training)}
    assert same["psi_training"].outcome == same["psi_last"].outcome == "pass"


@pytest.mark.parametrize(
    ("n_bad", "limit", "refused"),
    [(0, 0, False), (1, 0, True), (5, 5, False), (6, 5, True), (5, 0.05, False), (6, 0.05, True)],
)
def test_the_quarantine_limit_is_a_number_or_a_fraction(n_bad: int, limit: float, refused: bool) -> None:
    assert too_many(UnitStats(n_read=110, left_out=10, quarantined={"bad": n_bad}), limit) is refused


# Locks


@pytest.mark.parametrize(
    ("until", "host", "started", "what"),
    [
        (None, "a", "5", "free"),  # no lease: it ended well, or somebody removed it
        (99.0, "a", "5", "free"),  # the lease is over, alive or not
        (101.0, "a", "5", "held"),
        (101.0, "a", None, "free"),  # the process is gone
        (101.0, "a", "6", "free"),  # another process has its number
        (101.0, "b", None, "held"),  # another host: only the lease tells
    ],
)
def test_who_holds_a_lock(until: float | None, host: str, started: str | None, what: str) -> None:
    owner = Owner("r", host, 1, "5")
    assert judge(owner, until, "a", started, 100.0) == what


def test_a_lock_is_taken_once_and_ends_with_its_lease(tmp_path: Path) -> None:
    output = open_store(tmp_path)
    with Lease(output, Owner.me("first")) as first, Lease(output, Owner.me("second")) as second:
        assert first.try_lock("dt=2026-01-01") is None
        assert first.try_lock("dt=2026-01-01") is None, "one's own"
        holder = second.try_lock("dt=2026-01-01")
        assert holder is not None
        assert holder.run == "first"
        assert "run first, process" in holder.describe()
        assert second.try_lock("dt=2026-01-02") is None
    with Lease(output, Owner.me("third")) as third:
        assert third.try_lock("dt=2026-01-01") is None
        assert [f.path for f in output.files() if f.path.startswith("_locks/dt=2026-01-01")] == [
            "_locks/dt=2026-01-01~000002.json"
        ]


def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    output = open_store(tmp_path)
    dead = replace(Owner.me("dead"), started="1")
    lease = Lease(output, dead)
    lease.__enter__()
    assert lease.try_lock("dt=2026-01-01") is None
    with Lease(output, Owner.me("living")) as living:
        assert living.try_lock("dt=2026-01-01") is None


# Arguments and spec


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("tomorrow", None, None), "--date: expected a date such as 2026-11-21, found 'tomorrow'"),
        ((None, "2026-01-02", "2026-01-01"), "--to 2026-01-01 is before --from 2026-01-02"),
        (("2026-01-01", "2026-01-01", None), "exclude each other"),
    ],
)
def test_dates_asked_for_that_cannot_be(arguments: tuple[Any, Any, Any], match: str) -> None:
    with pytest.raises(SpecError) as caught:
        Choice.of(*arguments)
    assert match in caught.value.problems[0]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"max_quarantined": 1.5}, "expected a whole number of rows, or a fraction below 1"),
        ({"key": ["id", "id"]}, r"key names \['id'\] more than once"),
        ({"date": {"year": "y", "month": "y", "day": "d"}}, "each a column of its own"),
        ({"date": {"year": "y", "month": "m", "day": "d"}, "key": ["id", "dt"]}, "key names 'dt', which is what"),
    ],
)
def test_specs_that_are_wrong_by_themselves(more: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match="problem") as caught:
        load_spec(ScoreSpec, {"model": "m", "input": "in", "output": "out", **more})
    assert any(re.search(match, problem) for problem in caught.value.problems)
