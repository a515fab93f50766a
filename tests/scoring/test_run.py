from __future__ import annotations

import json
import math
import shutil
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import claydist.storage
from claydist.errors import (
    BundleError,
    DataError,
    GateFailed,
    InputChanged,
    Locked,
    RegistryError,
    SpecError,
    StorageError,
)
from claydist.scoring import publish, publisher, worker
from claydist.scoring.lock import Lease, Owner
from claydist.scoring.readers import read_scores
from claydist.storage import open_store
from tests.scoring.support import (
    FIRST,
    NAME,
    Loop,
    Saying,
    expected,
    make_predictor,
    make_registry,
    make_rows,
    make_spec,
    run_score,
    statuses,
    write_days,
)

DAYS = [(FIRST + timedelta(days=n)).isoformat() for n in range(3)]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No grace for readers that there are none of."""
    monkeypatch.setattr(publish, "GRACE_S", 0.0)


def files_of(output: Path, day: str) -> list[Path]:
    return sorted((output / f"dt={day}").glob("*.parquet"))


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_every_date_is_published_with_the_bits_of_predict(tmp_path: Path, task: str) -> None:
    predictor = make_predictor(task)
    registry, days = make_registry(tmp_path / "registry", predictor), write_days(tmp_path / "in")
    summary = run_score(make_spec(tmp_path), registry)
    assert summary.exit_code == 0
    assert statuses(summary) == dict.fromkeys(DAYS, "published")
    assert [one["rows"] for one in summary.summary["dates"]] == [40, 40, 40]
    assert read_scores(str(tmp_path / "out")).equals(expected(predictor, days))
    one = read_scores(str(tmp_path / "out"), DAYS[1])
    assert one.equals(expected(predictor, {FIRST + timedelta(days=1): days[FIRST + timedelta(days=1)]}))


def test_plain_readers_see_the_same_rows(tmp_path: Path) -> None:
    predictor = make_predictor()
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in")
    run_score(make_spec(tmp_path), registry)
    wanted = expected(predictor, days).drop_columns("dt")
    plain = ds.dataset(tmp_path / "out", partitioning="hive", format="parquet").to_table()
    assert plain.drop_columns("dt").equals(wanted)
    assert sorted(set(plain.column("dt").to_pylist())) == DAYS
    assert pd.read_parquet(tmp_path / "out").drop(columns="dt").equals(wanted.to_pandas())
    globbed = sorted((tmp_path / "out").glob("**/*.parquet"))
    assert pa.concat_tables([pq.read_table(path, partitioning=None) for path in globbed]).equals(wanted)


def test_files_say_where_they_come_from(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    summary = run_score(make_spec(tmp_path), registry)
    (path,) = files_of(tmp_path / "out", DAYS[0])
    facts = pq.read_metadata(path).metadata
    manifest = json.loads((path.parent / "_manifest.json").read_text())
    assert facts[b"claydist.model"] == NAME.encode()
    assert facts[b"claydist.version"] == b"1"
    assert facts[b"claydist.digest"].decode() == registry_digest(registry)
    assert facts[b"claydist.run"].decode() == summary.summary["run"] == manifest["run"]
    assert path.name == f"part-{facts[b'claydist.unit'].decode()}-{manifest['run']}.parquet"
    assert manifest["files"][0]["sha256"] == claydist.storage.sha256(path.read_bytes())
    assert not list((tmp_path / "out" / "_staging").iterdir())


def registry_digest(registry: Any) -> str:
    return claydist.storage.sha256(registry.version_store(NAME, 1).join("manifest.json").read())


def test_a_published_date_is_not_scored_again(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    run_score(make_spec(tmp_path), registry)
    before = files_of(tmp_path / "out", DAYS[0])
    work = Loop()
    summary = run_score(make_spec(tmp_path), registry, work)
    assert statuses(summary) == dict.fromkeys(DAYS, "already")
    assert summary.exit_code == 0
    assert not work.scored
    assert files_of(tmp_path / "out", DAYS[0]) == before
    assert [one["rows"] for one in summary.summary["dates"]] == [40, 40, 40]


@pytest.mark.parametrize("changed", ["model", "inventory", "spec"])
def test_a_date_is_stale_when_what_it_depends_on_has_changed(tmp_path: Path, changed: str) -> None:
    registry = make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=2)
    run_score(make_spec(tmp_path), registry)
    spec = make_spec(tmp_path, key=["id", "x"]) if changed == "spec" else make_spec(tmp_path)
    if changed == "model":
        make_registry(tmp_path / "registry", make_predictor(seed=3))
    if changed == "inventory":
        pq.write_table(days[FIRST].slice(0, 30), tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
    summary = run_score(spec, registry)
    others = "already" if changed == "inventory" else "stale"
    assert statuses(summary) == {DAYS[0]: "stale", DAYS[1]: others}
    assert f"{changed} changed" in summary.summary["dates"][0]["reason"]
    assert summary.exit_code == 0
    again = run_score(spec, registry, replace_stale=True)
    assert statuses(again) == {DAYS[0]: "published", DAYS[1]: others if others == "already" else "published"}
    assert set(statuses(run_score(spec, registry)).values()) == {"already"}


def test_replace_scores_anew_and_leaves_only_the_new_files(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    run_score(make_spec(tmp_path), registry)
    before = files_of(tmp_path / "out", DAYS[0]), files_of(tmp_path / "out", DAYS[1])
    summary = run_score(make_spec(tmp_path), registry, date=DAYS[0], replace=True)
    assert statuses(summary) == {DAYS[0]: "published"}
    after = files_of(tmp_path / "out", DAYS[0]), files_of(tmp_path / "out", DAYS[1])
    assert not set(before[0]) & set(after[0])
    assert len(after[0]) == 1
    assert after[1] == before[1]
    assert not (tmp_path / ".out.publishing").exists()


def test_a_range_skips_dates_without_input_and_says_so(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / f"dt={DAYS[1]}")
    summary = run_score(make_spec(tmp_path), registry, start="2026-10-31", stop=DAYS[2])
    assert statuses(summary) == {"2026-10-31": "empty", DAYS[0]: "published", DAYS[1]: "empty", DAYS[2]: "published"}
    assert "no row of 2026-10-31" in summary.summary["dates"][0]["reason"]
    assert summary.exit_code == 0
    open_end = run_score(make_spec(tmp_path), registry, start=DAYS[1])
    assert statuses(open_end) == {DAYS[2]: "already"}, "an open range has no gaps"


def test_a_date_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in")
    bad = days[FIRST + timedelta(days=1)].set_column(1, "x", pa.array([math.inf] * 40))
    pq.write_table(bad, tmp_path / "in" / f"dt={DAYS[1]}" / "part-0.parquet")
    summary = run_score(make_spec(tmp_path), registry)
    assert statuses(summary) == {DAYS[0]: "published", DAYS[1]: "failed", DAYS[2]: "published"}
    assert summary.exit_code == 1
    assert "40 of 40 rows break the model's contract" in summary.summary["dates"][1]["reason"]
    assert "failed" in summary.describe()


def test_dates_inside_files_are_split_in_the_order_of_the_input(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    rows = make_rows(300)
    number = np.random.default_rng(3).integers(0, 3, 300)
    when = [FIRST + timedelta(days=int(n)) for n in number]
    table = rows.append_column("when", pa.array(when)).append_column("y", pa.array([d.year for d in when], pa.int32()))
    table = table.append_column("m", pa.array([f"{d.month:02}" for d in when]))
    table = table.append_column("d", pa.array([float(d.day) for d in when]))
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 180), tmp_path / "in" / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(180), tmp_path / "in" / "b.parquet", row_group_size=50)
    wanted = expected(predictor, {
        FIRST + timedelta(days=n): rows.filter(pa.array(number == n)) for n in range(3)
    })  # fmt: skip
    for rule, folder in (({"year": "y", "month": "m", "day": "d"}, "dt"), ("when", "when")):
        work = Loop()
        spec = make_spec(tmp_path, date=rule, output=str(tmp_path / folder))
        assert set(statuses(run_score(spec, registry, work)).values()) == {"published"}
        found = read_scores(str(tmp_path / folder)).rename_columns(wanted.column_names)
        assert found.equals(wanted)
        assert len(work.scored) == 6


def test_an_undated_input_is_one_run(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in")
    spec = make_spec(tmp_path, date=None)
    summary = run_score(spec, registry)
    assert statuses(summary) == {None: "published"}
    assert read_scores(str(tmp_path / "out")).equals(expected(predictor, days).drop_columns("dt"))
    assert statuses(run_score(spec, registry)) == {None: "already"}
    with pytest.raises(SpecError, match="the spec has no `date`"):
        run_score(spec, registry, date=DAYS[0])


def test_where_leaves_rows_out_and_accounts_for_them(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in")
    summary = run_score(make_spec(tmp_path, where="city = 'Brno'"), registry)
    kept = {day: rows.filter(pa.compute.equal(rows["city"], "Brno")) for day, rows in days.items()}
    assert read_scores(str(tmp_path / "out")).equals(expected(predictor, kept))
    assert [one["rows"] for one in summary.summary["dates"]] == [len(rows) for rows in kept.values()]
    nothing = run_score(make_spec(tmp_path, where="x > 100", output=str(tmp_path / "other")), registry)
    assert set(statuses(nothing).values()) == {"empty"}


@pytest.mark.parametrize("way", ["gone", "gone, by name", "where"])
def test_a_published_date_whose_rows_are_withdrawn_is_stale_and_stays(tmp_path: Path, way: str) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    run_score(make_spec(tmp_path), registry)
    before = read_scores(str(tmp_path / "out"))
    staging = tmp_path / "out" / "_staging"
    (staging / f"dt={DAYS[1]}~0123456789ab~run").write_text("{}")
    (staging / f"dt={DAYS[0]}~0123456789ab~run").write_text("{}")
    spec = make_spec(tmp_path, where="x > 100" if way == "where" else None)
    if way != "where":
        shutil.rmtree(tmp_path / "in" / f"dt={DAYS[1]}")
    asked = {"date": DAYS[1]} if way == "gone, by name" else {"start": DAYS[0], "stop": DAYS[2]}
    summary = run_score(spec, registry, replace_stale=True, **asked)
    one = next(found for found in summary.summary["dates"] if found["date"] == DAYS[1])
    assert {name: one[name] for name in ("status", "rows", "uri")} == {
        "status": "stale", "rows": 40, "uri": str(tmp_path / "out" / f"dt={DAYS[1]}"),
    }  # fmt: skip
    assert "any more; the published rows stay" in one["reason"]
    assert summary.exit_code == 0
    assert read_scores(str(tmp_path / "out")).equals(before)
    left = [] if way == "where" else [f"dt={DAYS[0]}~0123456789ab~run"]
    assert [path.name for path in staging.iterdir()] == left, "of the withdrawn date nothing is left"
    if way == "gone":
        assert statuses(summary) == {DAYS[0]: "already", DAYS[1]: "stale", DAYS[2]: "empty"}
        assert statuses(run_score(spec, registry)) == {DAYS[0]: "already"}, "of all dates those of the input are meant"


def test_staged_files_of_a_withdrawn_date_that_another_run_holds_stay(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    run_score(make_spec(tmp_path), registry)
    place = tmp_path / "out" / "_staging" / f"dt={DAYS[1]}~0123456789ab~run"
    place.write_text("{}")
    shutil.rmtree(tmp_path / "in" / f"dt={DAYS[1]}")
    with Lease(open_store(tmp_path / "out"), Owner.me("somebody")) as lease:
        assert lease.try_lock(f"dt={DAYS[1]}") is None
        assert statuses(run_score(make_spec(tmp_path), registry, date=DAYS[1])) == {DAYS[1]: "stale"}
    assert place.exists()


def test_a_date_waits_for_the_marker_of_its_input(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    (tmp_path / "in" / f"dt={DAYS[0]}" / "_SUCCESS").touch()
    spec = make_spec(tmp_path, require="_SUCCESS")
    assert statuses(run_score(spec, registry)) == {DAYS[0]: "published", DAYS[1]: "empty", DAYS[2]: "empty"}
    with pytest.raises(DataError, match="not complete: no _SUCCESS"):
        run_score(spec, registry, date=DAYS[1])


def test_a_marker_vouches_only_for_files_that_were_there_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from claydist.scoring import input as scoring_input

    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    (tmp_path / "in" / f"dt={DAYS[1]}" / "_SUCCESS").touch()
    find_files = scoring_input.find_files

    def upstream_ends_meanwhile(*arguments: Any) -> Any:
        found = find_files(*arguments)
        for day in (DAYS[0], DAYS[2]):
            place = tmp_path / "in" / f"dt={day}"
            place.mkdir(exist_ok=True)
            pq.write_table(make_rows(25, seed=77), place / "part-1.parquet")
            (place / "_SUCCESS").touch()
        return found

    spec = make_spec(tmp_path, require="_SUCCESS")
    with monkeypatch.context() as patch:
        patch.setattr(scoring_input, "find_files", upstream_ends_meanwhile)
        summary = run_score(spec, registry)
    rows = {one["date"]: one["rows"] for one in summary.summary["dates"] if one["status"] == "published"}
    assert rows[DAYS[1]] == 40
    assert rows.get(DAYS[0], 65) == 65, "whole, or not at all"
    assert statuses(summary)[DAYS[2]] == "empty", "its folder came in between"
    again = run_score(spec, registry)
    assert {one["date"]: one["rows"] for one in again.summary["dates"]} == {DAYS[0]: 65, DAYS[1]: 40, DAYS[2]: 25}


def test_files_of_a_date_that_is_not_complete_are_not_opened(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    (tmp_path / "in" / f"dt={DAYS[0]}" / "_SUCCESS").touch()
    spoil(tmp_path / "in" / f"dt={DAYS[1]}" / "part-0.parquet")
    summary = run_score(make_spec(tmp_path, require="_SUCCESS"), registry)
    assert statuses(summary) == {DAYS[0]: "published", DAYS[1]: "empty"}
    assert summary.exit_code == 0


def test_a_date_that_nobody_means_does_not_fill_an_open_range(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    sentinel = tmp_path / "in" / "dt=9999-12-31"
    sentinel.mkdir()
    pq.write_table(make_rows(5), sentinel / "a.parquet")
    summary = run_score(make_spec(tmp_path), registry, start=DAYS[0])
    assert statuses(summary) == dict.fromkeys([*DAYS[:2], "9999-12-31"], "published")
    with pytest.raises(DataError, match="no row up to 2025-01-01; nothing was published"):
        run_score(make_spec(tmp_path), registry, stop="2025-01-01")


@pytest.mark.parametrize("pattern", ["*/dt=*/*.parquet", "*", "*/*", "**", "out*/dt=2026-11-01/part-*"])
def test_an_input_that_would_find_the_output_is_refused_the_first_time(tmp_path: Path, pattern: str) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "d" / "out-in", n_days=1)
    spec = make_spec(tmp_path, input=f"{tmp_path}/d/{pattern}", output=f"{tmp_path}/d/out")
    with pytest.raises(SpecError, match="would find what is published"):
        run_score(spec, registry)
    assert not (tmp_path / "d" / "out").exists()


def test_an_output_that_no_listing_finds_is_apart(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "d" / "in", n_days=1)
    spec = make_spec(tmp_path, input=f"{tmp_path}/d/*/dt=*/*.parquet", output=f"{tmp_path}/d/_scores")
    assert set(statuses(run_score(spec, registry)).values()) == {"published"}
    assert set(statuses(run_score(spec, registry)).values()) == {"already"}


def test_bad_rows_go_to_quarantine_with_their_reason(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    x = days[FIRST].column("x").to_pylist()
    x[3] = x[30] = math.inf
    table = days[FIRST].set_column(1, "x", pa.array(x))
    pq.write_table(table, tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet", row_group_size=15)
    with pytest.raises(DataError, match="2 of 40 rows break the model's contract") as caught:
        run_score(make_spec(tmp_path), registry)
    assert caught.value.problems == ("2 rows: infinite value in 'x'",)
    assert not files_of(tmp_path / "out", DAYS[0])
    work = Loop()
    summary = run_score(make_spec(tmp_path, max_quarantined=0.05), registry, work)
    assert not work.scored, "the limit is no reason to score again"
    assert summary.summary["dates"][0] | {"uri": "", "report": ""} == {
        "date": DAYS[0], "status": "published", "rows": 38, "quarantined": 2, "uri": "", "report": "",
    }  # fmt: skip
    assert "infinite value" in Path(summary.summary["dates"][0]["report"]).read_text()
    good = table.filter(pa.array([i not in (3, 30) for i in range(40)]))
    assert read_scores(str(tmp_path / "out")).equals(expected(predictor, {FIRST: good}))
    (path,) = (tmp_path / "out" / "_quarantine" / f"dt={FIRST}").iterdir()
    with pa.ipc.open_file(path) as file:
        bad = file.read_all()
    assert bad.column("id").to_pylist() == [3, 30]
    assert set(bad.column(worker.REASON).to_pylist()) == {"infinite value in 'x'"}
    run_score(make_spec(tmp_path, max_quarantined=2), registry, replace=True)
    assert len(list(path.parent.iterdir())) == 1


def test_a_failed_gate_publishes_nothing_and_keeps_what_is_scored(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    rows = make_rows(150).set_column(2, "city", pa.array(["Atlantis"] * 150))
    pq.write_table(rows, tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
    strict = make_spec(tmp_path, gates={"unseen_fraction": {"fail": 0.5}})
    with pytest.raises(GateFailed, match="gates failed") as caught:
        run_score(strict, registry)
    assert caught.value.exit_code == 5
    assert caught.value.problems == ("unseen_fraction is 1, above its limit 0.5",)
    assert not files_of(tmp_path / "out", DAYS[0])
    said, work = Saying(), Loop()
    summary = run_score(make_spec(tmp_path), registry, work, display=said)
    assert statuses(summary) == {DAYS[0]: "published"}
    assert not work.scored
    assert any("unseen_fraction is 1" in text for text in said.said)
    manifest = json.loads((tmp_path / "out" / f"dt={FIRST}" / "_manifest.json").read_text())
    assert manifest["unseen"] == {"city": 150}


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1, n_rows=30)
    for n in range(4):
        source = tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet"
        pq.write_table(make_rows(10, seed=10 + n), source.with_name(f"part-{n + 1}.parquet"))

    class Stops(Loop):
        def map(self, function: Any, items: Any, on_done: Any = None) -> list[Any]:
            def stopping(item: Any) -> Any:
                if len(self.scored) == 4:
                    raise KeyboardInterrupt
                return function(item)

            return super().map(stopping, items, on_done)

    with pytest.raises(KeyboardInterrupt):
        run_score(make_spec(tmp_path), registry, Stops())
    said, work = Saying(), Loop()
    run_score(make_spec(tmp_path), registry, work, display=said)
    assert len(work.scored) == 2
    assert any("3 units were scored by an earlier run" in text for text in said.said)
    assert read_scores(str(tmp_path / "out")).num_rows == 70


def test_another_model_does_not_resume_what_the_first_has_staged(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    strict = make_spec(tmp_path, gates={"psi_training": {"fail": 0.5}})
    with pytest.raises(GateFailed, match="gates failed") as caught:
        run_score(strict, registry_with_profile(registry))
    assert "psi_training" in caught.value.problems[0]
    assert list((tmp_path / "out" / "_staging").iterdir())
    other = make_predictor(seed=5)
    make_registry(tmp_path / "registry", other)
    run_score(make_spec(tmp_path), registry)
    assert read_scores(str(tmp_path / "out")).equals(expected(other, days))
    assert not list((tmp_path / "out" / "_staging").iterdir())


def registry_with_profile(registry: Any) -> Any:
    """The registry with a champion whose training scores are all elsewhere."""
    from claydist.bundle import write_bundle
    from claydist.sketch import Sketch

    scores = Sketch()
    scores.add(np.linspace(0.9, 0.999, 1000))
    version = registry.reserve(NAME)
    write_bundle(registry.version_store(NAME, version), make_predictor(), manifest={"name": NAME, "version": version},
                 extra_files={"profile.json": json.dumps({"scores": scores.to_json()}).encode()})  # fmt: skip
    registry.promote(NAME, version)
    return registry


# Locks


def test_a_locked_date_is_given_up_or_waited_for(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    output = open_store(tmp_path / "out")
    with Lease(output, Owner.me("somebody")) as lease:
        assert lease.try_lock(f"dt={DAYS[0]}") is None
        with pytest.raises(Locked, match="locked by run somebody") as caught:
            run_score(make_spec(tmp_path), registry, date=DAYS[0])
        assert caught.value.exit_code == 4
        summary = run_score(make_spec(tmp_path), registry)
        assert statuses(summary) == {DAYS[0]: "locked", DAYS[1]: "published"}
        assert summary.exit_code == 4
        waiting = threading.Thread(target=run_score, args=(make_spec(tmp_path), registry), kwargs={"wait": True})
        waiting.start()
        time.sleep(0.3)
        assert not files_of(tmp_path / "out", DAYS[0])
    waiting.join(20)
    assert len(files_of(tmp_path / "out", DAYS[0])) == 1


def test_a_run_that_lost_its_lock_cannot_publish(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)

    class Overtaken(Loop):
        def map(self, function: Any, items: Any, on_done: Any = None) -> list[Any]:
            if items and isinstance(items[0], worker.ScoreTask):
                for lease in (tmp_path / "out" / "_locks").glob("*.lease"):
                    lease.unlink()
                run_score(make_spec(tmp_path), registry)
            return super().map(function, items, on_done)

    with pytest.raises(Locked, match="published by another run"):
        run_score(make_spec(tmp_path), registry, Overtaken())
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))
    assert len(files_of(tmp_path / "out", DAYS[0])) == 1


# Bad input: each a clear error, nothing published


def test_no_champion(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    shutil.rmtree(tmp_path / "registry" / NAME / "_aliases")
    write_days(tmp_path / "in")
    with pytest.raises(RegistryError, match="has no champion"):
        run_score(make_spec(tmp_path), registry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [("x", None, "column 'x' is absent"), ("x", ["text"] * 40, "column 'x': expected float, found string")],
)
def test_a_column_that_the_model_cannot_read(tmp_path: Path, column: str, values: Any, match: str) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=1)
    table = days[FIRST].drop_columns(column)
    table = table if values is None else table.append_column(column, pa.array(values))
    pq.write_table(table, tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
    with pytest.raises(DataError, match=match):
        run_score(make_spec(tmp_path), registry)
    assert not (tmp_path / "out").exists()


def test_a_date_whose_files_all_lack_a_column_fails_alone(tmp_path: Path) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=2)
    pq.write_table(days[FIRST].drop_columns("city"), tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
    summary = run_score(make_spec(tmp_path), registry)
    assert statuses(summary) == {DAYS[0]: "failed", DAYS[1]: "published"}
    reason = summary.summary["dates"][0]["reason"]
    assert f"first file is {tmp_path}/in/dt={FIRST}/part-0.parquet" in reason
    assert "column 'city' is absent" in reason


def test_dates_inside_files_whose_files_lack_a_column_fail_alone(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    (tmp_path / "in").mkdir()
    for number in range(2):
        table = make_rows(10, seed=number).append_column("when", pa.array([FIRST + timedelta(days=number)] * 10))
        table = table if number else table.drop_columns("city")
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    summary = run_score(make_spec(tmp_path, date="when"), registry)
    assert statuses(summary) == {DAYS[0]: "failed", DAYS[1]: "published"}
    assert "columns ['city'], which the model needs, are in none" in summary.summary["dates"][0]["reason"]


# A file is the trouble of its own date only


def spoil(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:500])


def test_a_half_written_file_fails_its_date_only(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in")
    spoil(tmp_path / "in" / f"dt={DAYS[1]}" / "part-0.parquet")
    summary = run_score(make_spec(tmp_path), registry)
    assert statuses(summary) == {DAYS[0]: "published", DAYS[1]: "failed", DAYS[2]: "published"}
    assert summary.exit_code == 1
    bad = summary.summary["dates"][1]
    assert f"dt={DAYS[1]}/part-0.parquet: cannot be read as Parquet" in bad["reason"]
    assert (bad["rows"], bad["uri"]) == (0, None)
    del days[FIRST + timedelta(days=1)]
    assert read_scores(str(tmp_path / "out")).equals(expected(predictor, days))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        run_score(make_spec(tmp_path), registry, date=DAYS[1])
    shutil.rmtree(tmp_path / "in" / f"dt={DAYS[1]}")
    write_days(tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere" / f"dt={DAYS[1]}", tmp_path / "in")
    mended = run_score(make_spec(tmp_path), registry)
    assert statuses(mended) == {DAYS[0]: "already", DAYS[1]: "published", DAYS[2]: "already"}


def test_only_footers_of_the_dates_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from claydist.dataset import footers

    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    read: list[str] = []
    read_footer = footers._read_footer
    monkeypatch.setattr(footers, "_read_footer", lambda f, shared: read.append(f.path) or read_footer(f, shared))
    run_score(make_spec(tmp_path), registry, date=DAYS[1])
    assert read == [f"dt={DAYS[1]}/part-0.parquet"]
    read.clear()
    run_score(make_spec(tmp_path), registry, start=DAYS[1])
    assert read == [f"dt={day}/part-0.parquet" for day in DAYS[1:]]


def test_each_date_has_its_own_types(tmp_path: Path) -> None:
    predictor, registry = make_predictor(), make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=2, n_rows=12)
    days[FIRST] = days[FIRST].set_column(1, "x", pa.array(range(12))).set_column(0, "id", pa.array(np.arange(12.0)))
    pq.write_table(days[FIRST], tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
    assert set(statuses(run_score(make_spec(tmp_path), registry)).values()) == {"published"}
    for day, rows in days.items():
        assert read_scores(str(tmp_path / "out"), day).equals(expected(predictor, {day: rows}))
    both = read_scores(str(tmp_path / "out"))
    assert both.column("id").type == pa.float64()
    assert both.num_rows == 24
    pq.write_table(make_rows(5), tmp_path / "in" / f"dt={FIRST}" / "part-1.parquet")
    with pytest.raises(DataError, match="columns of different types"):
        run_score(make_spec(tmp_path), registry, date=FIRST)
    assert statuses(run_score(make_spec(tmp_path), registry)) == {DAYS[0]: "failed", DAYS[1]: "already"}


def test_keys_of_the_path_have_one_type_whatever_dates_are_asked_for(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    for day, region in zip(DAYS, ("1", "eu", "2"), strict=True):
        place = tmp_path / "in" / f"dt={day}" / f"region={region}"
        place.mkdir(parents=True)
        pq.write_table(make_rows(5), place / "a.parquet")
    run_score(make_spec(tmp_path, key=["id", "region"]), registry, date=DAYS[2])
    assert read_scores(str(tmp_path / "out")).column("region").to_pylist() == ["2"] * 5


@pytest.mark.parametrize(
    ("more", "choice", "error", "match"),
    [
        ({"key": ["ident"]}, {}, DataError, r"key columns \['ident'\] are not in"),
        ({"where": "nothing > 1"}, {}, DataError, "nothing"),
        ({"date": "when"}, {}, DataError, "column 'when' is absent"),
        ({"date": "x"}, {}, DataError, "expected a date, or text such as"),
        ({"date": "city"}, {}, DataError, "expected a date such as|is null in"),
        ({}, {"date": "2027-01-01"}, DataError, "no row of 2027-01-01; nothing was published"),
        ({}, {"date": "soon"}, SpecError, "wrong"),
        ({}, {"start": DAYS[1], "stop": DAYS[0]}, SpecError, "wrong"),
        ({}, {"date": DAYS[1], "stop": DAYS[0]}, SpecError, "wrong"),
        ({"input": "{folder}/nowhere"}, {}, DataError, "no such file or directory"),
        ({"model": "late:7"}, {}, RegistryError, "no version 7"),
        ({"output": "{folder}/in/scores"}, {}, SpecError, "the output is in the input"),
        ({"output": "{folder}/in"}, {}, SpecError, "overlap"),
        ({"input": "{folder}/*/*/*.parquet"}, {}, SpecError, "would find what is published"),
    ],
)  # fmt: skip
def test_what_is_asked_and_cannot_be(
    tmp_path: Path, more: dict[str, Any], choice: dict[str, Any], error: type[Exception], match: str
) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in")
    more = {k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in more.items()}
    with pytest.raises(error, match=match):
        run_score(make_spec(tmp_path, **more), registry, **choice)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "in").rglob("part-0*-late-*"))


def test_an_output_that_holds_foreign_files(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(DataError, match="holds what this spec does not publish") as caught:
        run_score(make_spec(tmp_path), registry)
    assert caught.value.problems == ("notes.txt",)
    (tmp_path / "out" / "notes.txt").unlink()
    foreign = tmp_path / "out" / f"dt={DAYS[0]}" / "theirs.parquet"
    foreign.parent.mkdir()
    foreign.touch()
    summary = run_score(make_spec(tmp_path), registry)
    assert statuses(summary) == {DAYS[0]: "failed", DAYS[1]: "published"}
    assert foreign.exists()
    with pytest.raises(DataError, match="holds what this spec does not publish"):
        run_score(make_spec(tmp_path, date=None), registry)


def test_a_manifest_of_a_newer_protocol(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    run_score(make_spec(tmp_path), registry)
    place = tmp_path / "out" / f"dt={FIRST}" / "_manifest.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "protocol": 2}))
    with pytest.raises(DataError, match="newer claydist, or damaged: expected protocol 1, found 2"):
        run_score(make_spec(tmp_path), registry, replace=True)
    with pytest.raises(DataError, match="newer claydist"):
        read_scores(str(tmp_path / "out"))
    bundle = registry.version_store(NAME, 1).join("manifest.json")
    bundle.write(bundle.read().replace(b'"protocol": 1', b'"protocol": 9'))
    with pytest.raises(BundleError, match="newer claydist"):
        run_score(make_spec(tmp_path), registry)


def test_an_input_that_changes_while_it_is_scored(tmp_path: Path) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=1)

    class Changes(Loop):
        def ready(self) -> bool:
            pq.write_table(days[FIRST].slice(1), tmp_path / "in" / f"dt={FIRST}" / "part-0.parquet")
            return True

    with pytest.raises(InputChanged, match="changed while it was in use"):
        run_score(make_spec(tmp_path), registry, Changes())
    assert not files_of(tmp_path / "out", DAYS[0])


def test_a_full_disk_publishes_nothing_and_the_next_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in")
    real = claydist.storage.replace_local

    def full(path: str, data: bytes) -> None:
        if path.endswith(".unit") and DAYS[1] in path:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(claydist.storage, "replace_local", full)
    summary = run_score(make_spec(tmp_path), registry)
    assert statuses(summary) == {DAYS[0]: "published", DAYS[1]: "failed", DAYS[2]: "published"}
    assert "No space left on device; free some space" in summary.summary["dates"][1]["reason"]
    with pytest.raises(StorageError, match="No space left"):
        run_score(make_spec(tmp_path), registry, date=DAYS[1])
    monkeypatch.undo()
    run_score(make_spec(tmp_path), registry)
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))


class HalfWritten(MemoryFileSystem):
    """Memory that keeps half of a file and raises, at as many writes as `fails` says, after `passes` more."""

    protocol = ("half",)
    passes = fails = 0

    def _half(self) -> bool:
        kind = type(self)
        kind.passes -= 1
        if kind.passes >= 0 or kind.fails == 0:
            return False
        kind.fails -= 1
        return True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        half = path.endswith((".unit", ".parquet")) and self._half()
        super().pipe_file(path, value[: len(value) // 2] if half else value, mode=mode, **kwargs)
        if half:
            raise OSError(5, "Input/output error")

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        value = self.cat_file(path1)
        half = self._half()
        super().pipe_file(path2, value[: len(value) // 2] if half else value)
        if half:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize("passes", [0, 1, 2, 3])
def test_a_remote_write_that_fails_half_way_publishes_nothing(tmp_path: Path, passes: int) -> None:
    fsspec.register_implementation("half", HalfWritten, clobber=True)
    registry, days = make_registry(tmp_path / "registry"), write_days(tmp_path / "in", n_days=1)
    second = days[FIRST].slice(0, 20)
    pq.write_table(second, tmp_path / "in" / f"dt={FIRST}" / "part-1.parquet")
    spec = make_spec(tmp_path, output=f"half://{tmp_path.name}/out")
    HalfWritten.passes, HalfWritten.fails = passes, 1
    with pytest.raises(StorageError, match="Input/output error"):
        run_score(spec, registry)
    assert HalfWritten.fails == 0
    with pytest.raises(DataError, match="nothing is published"):
        read_scores(spec.output)
    assert set(statuses(run_score(spec, registry)).values()) == {"published"}
    both = pa.concat_tables([days[FIRST], second])
    assert read_scores(spec.output).equals(expected(make_predictor(), {FIRST: both}))


def test_a_row_without_a_date(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    (tmp_path / "in").mkdir()
    when = pa.array([date(2026, 11, 1)] * 9 + [None])
    pq.write_table(make_rows(10).append_column("when", when), tmp_path / "in" / "a.parquet")
    with pytest.raises(DataError, match="'when' is null in 1 rows"):
        run_score(make_spec(tmp_path, date="when"), registry)


def test_reading_scores_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is published"):
        read_scores(str(tmp_path / "out"))
    with pytest.raises(SpecError, match="expected a date"):
        read_scores(str(tmp_path / "out"), "tomorrow")


def test_every_date_has_its_page_right_after_it_is_published(tmp_path: Path) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=9)
    pages: list[list[str]] = []

    class Looks(Loop):
        def map(self, function: Any, items: Any, on_done: Any = None) -> list[Any]:
            def done(index: int, result: Any) -> None:
                on_done(index, result)
                pages.append(sorted(path.name for path in (tmp_path / "out" / "_reports").iterdir()))

            return super().map(function, items, done if on_done else None)

    summary = run_score(make_spec(tmp_path), registry, Looks())
    days = [(FIRST + timedelta(days=n)).isoformat() for n in range(9)]
    assert pages == [[f"dt={day}.html" for day in days[: n + 1]] for n in range(9)]
    page = Path(summary.summary["dates"][8]["report"]).read_text()
    assert "seconds since scoring began" in page
    assert "rows a second until then" in page


def test_a_page_that_cannot_be_drawn_is_no_reason_for_a_date_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ValueError("broken")

    monkeypatch.setattr(publisher, "write_report", broken)
    write_days(tmp_path / "in", n_days=2)
    said = Saying()
    summary = run_score(make_spec(tmp_path), make_registry(tmp_path / "registry"), display=said)
    assert statuses(summary) == {DAYS[0]: "published", DAYS[1]: "published"}
    assert f"dt={DAYS[0]}: its report could not be written: ValueError: broken" in said.said
