"""`claydist score`: from a spec to published dates."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from claydist.bundle import Bundle, read_bundle
from claydist.dataset.footers import Inventory
from claydist.display import Display, RowCount
from claydist.errors import ClaydistError, DataError, Locked, SpecError
from claydist.places import check_paths
from claydist.registry import Registry, Resolved
from claydist.runs import clean_runs, start_run
from claydist.scoring import checks
from claydist.scoring.choice import Choice, DateRun, ScoreSummary, count_statuses, decide
from claydist.scoring.dates import DateRule, folder_of, only_files
from claydist.scoring.input import DateInput, find_input
from claydist.scoring.lock import Lease, Owner
from claydist.scoring.publish import check_place, look, settle
from claydist.scoring.publisher import Publisher
from claydist.scoring.records import COMMITS
from claydist.scoring.staging import Staging, each
from claydist.scoring.units import Partition, State, inputs_digest, plan_partition, spec_part
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
    date, start, stop : one date, or a range with both ends (with an open one the dates found in it); all without.
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
    return _Scoring(spec, registry, display, choice, work or RayWork(spec.max_cpus, display.say)).execute()


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
                dates = self._plan()
                planned = (one.partition for one in dates if one.partition is not None)
                self.run = self.run.update(inventory=inputs_digest(planned))
                self._work_on(dates)
                self._clean_withdrawn(dates)
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

    def _plan(self) -> list[DateRun]:
        """The dates asked for: with a partition, or ended where the input has nothing (complete, readable) of them."""
        checks.check_output(self.output, self.rule)
        schema = self.bundle.predictor.schema
        # Hive keys are text in the path: they are read as what the model was trained with.
        trained = {c.name: c.type for c in schema.columns if c.type not in ("decimal", "date")}
        types = {**trained, **self.spec.types}
        found = find_input(self.spec, self.rule, self.choice, self.output, types, self.work.map)
        dates = [self._date(day, found.get(day, DateInput())) for day in self.choice.days(found)]
        self._look_for_withdrawn([one for one in dates if one.day not in found])
        where = ", ".join(map(redact, self.spec.input))
        if not dates or (len(dates) == 1 and dates[0].status == "empty"):
            reason = dates[0].reason if dates else f"the input has no row{self.choice.describe()}"
            raise DataError(f"{reason}; nothing was published ({where})")
        _raise_common([one.error for one in dates if one.partition is not None or one.error is not None])
        self._warn_of_keys(dates)
        checks.check_output_visible(self.output)
        return dates

    def _date(self, day: dt.date | None, has: DateInput) -> DateRun:
        one = DateRun(day, folder_of(self.rule, day), inventory=has.inventory, rows=has.rows)
        if has.error is not None:
            one.failed(has.error)
        elif has.lacking is not None:
            one.ended("empty", f"the input is not complete: no {self.spec.require} in {has.lacking}")
        elif has.inventory is None:
            one.ended("empty", f"the input has no row{f' of {day}' if day else ''}")
        else:
            spec = spec_part(self.spec)
            one.partition = plan_partition(has.inventory, self.rule, day, has.rows, self.bundle.digest, spec)
            try:
                checks.check_columns(self.spec, self.rule, has.inventory, self.bundle.predictor)
            except ClaydistError as e:
                one.problem = e
        return one

    def _warn_of_keys(self, dates: Sequence[DateRun]) -> None:
        """Say where dates have keys of types that no one table could hold: each date is whole, all of them are not."""
        for name in self.spec.key:
            found: dict[pa.DataType, str] = {}
            for one in dates:
                if one.inventory is not None and name in one.inventory.schema.names:
                    found.setdefault(one.inventory.schema.field(name).type, one.folder)
            try:
                pa.unify_schemas([pa.schema([(name, kind)]) for kind in found], promote_options="default")
            except pa.ArrowException:
                said = ", ".join(f"{kind} in {folder}" for kind, folder in found.items())
                self.display.say(f"key {name!r} is {said}: read_scores can read these dates one by one only; cast it")

    def _look_for_withdrawn(self, dates: Sequence[DateRun]) -> None:
        """Of dates that the input has no row of, say which are published all the same."""
        names = {*self.output.list(), *self.output.join(COMMITS).list()} if dates else ()

        def look_at(one: DateRun) -> None:
            try:
                one.current = look(self.output, one.folder)
            except ClaydistError as e:
                one.failed(e)
            else:
                one.withdrawn(f"the input has no row{f' of {one.day}' if one.day else ''} any more")

        each(look_at, [one for one in dates if one.folder in names])

    def _clean_withdrawn(self, dates: Sequence[DateRun]) -> None:
        """Remove what is staged of published dates that the input has no row of, as far as no other run is at them."""
        gone = [one for one in dates if one.partition is None and one.status == "stale"]
        names = self.staging.names() if gone else []
        left = [Partition(one.day, one.folder, (), State("", "", "")) for one in gone]
        left = [partition for partition in left if any(name.startswith(partition.any_prefix) for name in names)]
        if not left:
            return
        with Lease(self.output, Owner.me(self.run.run_id)) as lease:
            for partition in left:
                with suppress(ClaydistError):  # the dates of this run are published; it is tidied up another time
                    if lease.try_lock(partition.folder) is None:
                        self.staging.clean(partition, (), self.run.run_id, names)

    def _work_on(self, dates: Sequence[DateRun]) -> None:
        open_dates = [one for one in dates if one.partition is not None]
        each(self._look, open_dates)
        found = [one for one in open_dates if not one.error]
        waiting = [one for one in found if not self._is_decided(one) or not one.current.is_settled]
        _raise_common([one.problem if one.error else None for one in open_dates])
        if not waiting:
            return
        check_place(self.output)
        publisher = self._publisher()
        with Lease(self.output, Owner.me(self.run.run_id)) as lease:
            held = [one for one, is_held in zip(waiting, self._take_all(lease, waiting), strict=True) if is_held]
            names = self.staging.names()
            is_open = each(lambda one: self._prepare(one, names), held)
            self._score([one for one, needed in zip(held, is_open, strict=True) if needed], names, publisher)
            publisher.end()

    def _look(self, one: DateRun) -> None:
        try:
            one.current = look(self.output, one.folder)
        except ClaydistError as e:
            one.failed(e)

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
        if one.current.damage:
            what, why = "score", one.current.damage
        if what == "score" and one.problem is not None:
            where = f"{one.folder}, whose first file is {one.files.files[one.rows[0].file].url}"
            one.failed(DataError(f"{where}: {one.problem.message}", one.problem.problems))
            return True
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
        """True when the lock of the date is this run's; a lock that cannot be read fails its date alone."""
        try:
            return self._wait_for(lease, one)
        except ClaydistError as e:
            if one.status is None:
                one.failed(e)
            return False

    def _wait_for(self, lease: Lease, one: DateRun) -> bool:
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
            checks.check_folder(self.output, one.folder, one.current.manifest)
            checks.check_files(one.files, one.rows, self.bundle.predictor.schema.names, one.folder)
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
                    if one.status == "empty" and one.withdrawn(f"{one.reason} any more"):
                        self.staging.clean(one.planned, one.staged.values(), one.run, names)
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
        works: dict[tuple[int, int, int], tuple[Inventory, list[UnitWork]]] = {}
        for one in dates:
            travelling = Partition(one.day, one.folder, (), one.planned.state)
            for unit in one.planned.units:
                if unit.unit_id not in one.staged:
                    # Dates inside files share these and one inventory, others have one each.
                    _, found = works.setdefault((id(one.files), unit.file, unit.run), (one.files, []))
                    found.append(UnitWork(travelling, unit, one.run))
        key = tuple(name for name in self.spec.key if self.rule is None or name != self.rule.folder_key)
        return [
            ScoreTask(
                only_files(inventory, [file]), tuple(sorted({g for w in found for g in w.unit.row_groups})),
                tuple(found), self.rule, key, self.spec.where, self.staging.store, self.model,
            )
            for (_, file, _), (inventory, found) in works.items()
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


def _raise_common(problems: Sequence[ClaydistError | None]) -> None:
    """Raise what is wrong with every date, for then it is wrong with the spec or the whole input."""
    if problems and problems[0] is not None and len({str(problem) for problem in problems}) == 1:
        raise problems[0]
