"""`claydist score`: from a spec to published dates."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Sequence
from typing import Any

from claydist.bundle import Bundle, read_bundle
from claydist.dataset.footers import Inventory, take_inventory
from claydist.display import Display, RowCount
from claydist.errors import ClaydistError, DataError, Locked, SpecError
from claydist.preparation import check_paths
from claydist.registry import Registry, Resolved
from claydist.runs import clean_runs, start_run
from claydist.scoring import checks
from claydist.scoring.choice import Choice, DateRun, ScoreSummary, count_statuses, decide
from claydist.scoring.dates import DateRule, find_dates, only_files
from claydist.scoring.lock import Lease, Owner
from claydist.scoring.publish import look, settle
from claydist.scoring.publisher import Publisher
from claydist.scoring.staging import Staging, each
from claydist.scoring.units import Partition, plan_partition, spec_part, wanted_dates
from claydist.scoring.work import RayWork, Work
from claydist.scoring.worker import ModelFiles, Scored, ScoreTask, UnitWork, score_task
from claydist.sketch import Sketch
from claydist.spec import ScoreSpec
from claydist.storage import open_store, redact

WAIT_EVERY_S = 0.5


def score(
    spec: ScoreSpec,
    registry: Registry,
    display: Display,
    *,
    date: str | dt.date | None = None,
    start: str | dt.date | None = None,
    stop: str | dt.date | None = None,
    replace: bool = False,
    replace_stale: bool = False,
    wait: bool = False,
    work: Work | None = None,
) -> ScoreSummary:
    """Score and publish the dates asked for on the connected cluster; each is published whole and once, or not at all.

    Parameters
    ----------
    date, start, stop : one date, or a range with both ends (an open end is that of the input); all dates without.
    replace, replace_stale, wait : as in `Choice`.
    work : where tasks run; Ray where not given.

    Returns
    -------
    Of several dates the exit code is 1 when one failed, 4 when one is locked by another run and none failed.

    Raises
    ------
    ClaydistError : when nothing can be scored; where one date was asked for, also what went wrong with it (`Locked`,
        `GateFailed`, ...).
    """
    choice = Choice.of(date, start, stop, replace, replace_stale, wait)
    return _Scoring(spec, registry, display, choice, work or RayWork(spec.max_cpus)).execute()


class _Scoring:
    """One run of `score`, and what its steps share."""

    def __init__(self, spec: ScoreSpec, registry: Registry, display: Display, choice: Choice, work: Work) -> None:
        self.spec, self.registry, self.display, self.choice, self.work = spec, registry, display, choice, work
        self.output = open_store(spec.output, spec.storage_options)
        self.staging = Staging(self.output)
        self.rule = DateRule.of(spec)
        self.seconds: dict[str, float] = {}
        self.stage: tuple[str, float] | None = None
        self.n_scored = 0

    def execute(self) -> ScoreSummary:
        """Plan, score, publish, sum up."""
        began = time.monotonic()
        if self.rule is None and (self.choice.date or self.choice.start or self.choice.stop):
            raise SpecError("dates are asked for and the spec has no `date`; name the column that holds a row's date")
        check_paths([*self.spec.input, self.spec.output])
        found = self.registry.resolve(self.spec.model)
        self.run = start_run(self.registry, "score", self.spec, found.name)
        self.display.run(self.run.run_id)
        try:
            with self.run.kept_alive():
                self._begin("plan")
                self.bundle = self._load(found)
                self.inventory = self._open_input()
                self.run = self.run.update(inventory=self.inventory.fingerprint)
                dates = self._plan()
                self._work_on(dates)
        except BaseException as e:
            self.run.fail(e)
            raise
        self._begin("")
        return self._end(dates, time.monotonic() - began)

    def _begin(self, stage: str) -> None:
        """End the stage before with its seconds, and begin this one; "" begins none."""
        now = time.monotonic()
        if self.stage is not None:
            before, began = self.stage
            self.seconds[before] = round(now - began, 3)
        self.stage = (stage, now)
        if stage:
            self.display.stage(stage)
            self.run = self.run.update(stage=stage)
        else:
            self.display.done()

    def _load(self, found: Resolved) -> Bundle:
        bundle = read_bundle(found.store)
        files = self.work.share(bundle.predictor.to_files())
        self.model = ModelFiles(found.name, found.version, bundle.digest, files)
        self.work.warm(self.model)
        return bundle

    def _open_input(self) -> Inventory:
        schema = self.bundle.predictor.schema
        # Hive keys are text in the path: they are read as what the model was trained with.
        trained = {c.name: c.type for c in schema.columns if c.type not in ("decimal", "date")}
        types = {**trained, **self.spec.types}
        inventory = take_inventory(self.spec.input, options=self.spec.storage_options, types=types, run=self.work.map)
        checks.check_input_visible(inventory)
        checks.check_apart(self.spec, inventory, self.output)
        checks.check_output(self.output, self.rule)
        checks.check_columns(self.spec, self.rule, inventory, self.bundle.predictor)
        checks.check_output_visible(self.output)
        return inventory

    def _plan(self) -> list[DateRun]:
        """The dates asked for: with a partition, or ended where the input has nothing (complete) of them."""
        choice, spec, markers = self.choice, spec_part(self.spec), dict[str, bool]()
        found = find_dates(self.inventory, self.rule, choice.wanted, self.work.map)
        days: Sequence[dt.date | None] = [choice.date] if choice.date else list(found)
        if choice.start or choice.stop:
            days = wanted_dates(choice.start, choice.stop, (day for day in found if day))
        dates = []
        for day in days:
            one = DateRun(day, rows=found.get(day, ()))
            lacking = None
            if self.spec.require and one.rows:
                lacking = checks.missing_marker(self.inventory, one.rows, self.rule, self.spec.require, markers)
            if not one.rows:
                one.ended("empty", f"the input has no row{f' of {day}' if day else ''}")
            elif lacking:
                one.ended("empty", f"the input is not complete: no {self.spec.require} in {lacking}")
            else:
                one.partition = plan_partition(self.inventory, self.rule, day, one.rows, self.bundle.digest, spec)
            dates.append(one)
        if not dates or (len(dates) == 1 and dates[0].status == "empty"):
            reason = dates[0].reason if dates else "the input has no row"
            raise DataError(f"{reason}; nothing was published ({', '.join(map(redact, self.spec.input))})")
        return dates

    def _work_on(self, dates: Sequence[DateRun]) -> None:
        open_dates = [one for one in dates if one.partition is not None]
        for one, current in zip(open_dates, each(lambda d: look(self.output, d.folder), open_dates), strict=True):
            one.current = current
        waiting = [one for one in open_dates if not self._is_decided(one) or not one.current.is_settled]
        if not waiting:
            return
        publisher = self._publisher()
        with Lease(self.output, Owner.me(self.run.run_id)) as lease:
            held = [one for one, is_held in zip(waiting, self._take_all(lease, waiting), strict=True) if is_held]
            names = self.staging.names()
            is_open = each(lambda one: self._prepare(one, names), held)
            self._score([one for one, needed in zip(held, is_open, strict=True) if needed], names, publisher)
            publisher.end()

    def _publisher(self) -> Publisher:
        scores = None
        if "profile.json" in self.bundle.manifest["files"]:
            scores = json.loads(self.bundle.read("profile.json")).get("scores")
        data = self.bundle.manifest.get("spec", {}).get("data", {})
        return Publisher(
            self.output, self.spec, self.rule, self.model, self.bundle.predictor.target,
            {role: data.get(role) for role in ("weight", "group")}, Sketch.from_json(scores) if scores else None,
            self.run.run_id, self.display,
        )  # fmt: skip

    def _is_decided(self, one: DateRun) -> bool:
        """True when the date needs no scoring."""
        what, why = decide(one.current.manifest, one.planned, self.choice)
        if what == "score":
            one.status, one.reason = None, why
            return False
        one.ended(what, why, one.current.manifest)
        return True

    def _take_all(self, lease: Lease, dates: Sequence[DateRun]) -> list[bool]:
        if self.choice.wait:
            # One after another, in the order of dates: two runs that wait for each other's locks cannot meet.
            return [self._take(lease, one) for one in dates]
        return each(lambda one: self._take(lease, one), dates)

    def _take(self, lease: Lease, one: DateRun) -> bool:
        """True when the lock of the date is this run's."""
        said = False
        while (holder := lease.try_lock(one.folder)) is not None:
            if one.status is not None:
                return False  # only to be tidied up, which its owner does
            if not self.choice.wait:
                one.failed(Locked(
                    f"{one.folder} in {self.output} is locked by {holder.describe()}; wait for it with --wait, or "
                    f"look at `claydist runs show {holder.run}`"
                ))  # fmt: skip
                return False
            if not said:
                self.display.say(f"waiting for {holder.describe()}, which holds {one.folder}")
                said = True
            time.sleep(WAIT_EVERY_S)
        return True

    def _prepare(self, one: DateRun, names: Sequence[str]) -> bool:
        """True when units of the date are to be scored or published; with its lock held."""
        try:
            settle(self.output, one.folder)
            one.current = look(self.output, one.folder)
            if self._is_decided(one):
                return False
            if one.current.manifest is None:
                checks.check_folder(self.output, one.folder)
            checks.check_files(self.inventory, one.rows, self.bundle.predictor.schema.names, one.folder)
            one.run = self.staging.open_run(one.planned, self.run.run_id, names)
            one.staged = self.staging.find(one.planned, one.run, names)
        except ClaydistError as e:
            one.failed(e)
            return False
        return True

    def _score(self, dates: Sequence[DateRun], names: Sequence[str], publisher: Publisher) -> None:
        tasks = self._tasks(dates)
        by_folder, queue = {one.folder: one for one in dates}, list(dates)
        if n_found := sum(len(one.staged) for one in dates):
            self.display.say(f"{n_found} units were scored by an earlier run; going on with what is missing")
        rows = [sum(work.unit.n_rows for work in task.works) for task in tasks]
        count = RowCount(self.display, sum(rows), sum(len(task.works) for task in tasks), "units")

        def publish_ready() -> None:
            # In the order of dates, so that the drift from the last date is the same however tasks end.
            while queue and (queue[0].error or queue[0].is_complete):
                one = queue.pop(0)
                try:
                    if not one.error:
                        publisher.publish(one, names)
                except ClaydistError as e:
                    one.failed(e)
                seconds = time.monotonic() - began
                publisher.report(one, seconds, self.n_scored / max(seconds, 1e-9))

        def done(index: int, scored: Scored) -> None:
            for folder, staged in scored.units:
                by_folder[folder].staged[staged.unit_id] = staged
                self.n_scored += staged.stats.n_read
            if scored.error is not None:
                for work in tasks[index].works:
                    by_folder[work.partition.folder].failed(scored.error)
            count.add(rows[index], len(tasks[index].works))
            publish_ready()

        self._begin("start workers")
        if not self.work.ready():
            self.display.say("the cluster is busy: no CPU is free; waiting for one, the date's lock is held meanwhile")
        self._begin("score")
        began = time.monotonic()
        publish_ready()
        try:
            self.work.map(score_task, tasks, done)
        except ClaydistError as e:
            for one in queue:
                if not one.is_complete:
                    one.failed(e)
            publish_ready()
        self._begin("clean")

    def _tasks(self, dates: Sequence[DateRun]) -> list[ScoreTask]:
        """Each run of row groups once, with all units that are missing in it."""
        works: dict[tuple[int, int], list[UnitWork]] = {}
        for one in dates:
            travelling = Partition(one.day, one.folder, (), one.planned.state)
            for unit in one.planned.units:
                if unit.unit_id not in one.staged:
                    works.setdefault((unit.file, unit.run), []).append(UnitWork(travelling, unit, one.run))
        key = tuple(name for name in self.spec.key if self.rule is None or name != self.rule.folder_key)
        return [
            ScoreTask(
                only_files(self.inventory, [file]), tuple(sorted({g for w in found for g in w.unit.row_groups})),
                tuple(found), self.rule, key, self.spec.where, self.staging.store, self.model,
            )
            for (file, _), found in works.items()
        ]  # fmt: skip

    def _end(self, dates: Sequence[DateRun], seconds: float) -> ScoreSummary:
        scoring = self.seconds.get("score", 0.0)
        facts = {
            "model": self.model.name, "version": self.model.version, "run": self.run.run_id,
            "seconds": round(seconds, 3), "stages": self.seconds,
            "rows_per_s": round(self.n_scored / scoring, 1) if self.n_scored else 0.0,
        }  # fmt: skip
        errors = [one.error for one in dates if one.error is not None]
        self.run = self.run.update(summary=facts, dates=count_statuses(dates))
        if errors:
            self.run.fail(errors[0])
        else:
            self.run.finish()
            clean_runs(self.registry)
        if len(dates) == 1 and errors:
            raise errors[0]
        summary: dict[str, Any] = {**facts, "dates": [one.to_json(self.output) for one in dates]}
        return ScoreSummary(summary, 0 if not errors else 4 if all(isinstance(e, Locked) for e in errors) else 1)
