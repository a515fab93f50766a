"""From a date whose units are all staged to a published one: account, quarantine limit, gates, manifest, commit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from claydist.display import Display
from claydist.errors import ClaydistError, DataError, GateFailed, Locked, StorageError
from claydist.predictor import Target
from claydist.scoring import publish
from claydist.scoring.choice import DateRun
from claydist.scoring.dates import DateRule, parse_day
from claydist.scoring.gates import judge_gates, reasons, too_many
from claydist.scoring.manifest import Manifest, parts, quarantine_files
from claydist.scoring.reports import write_report
from claydist.scoring.staging import Staged, Staging
from claydist.scoring.units import UnitStats
from claydist.scoring.worker import ModelFiles
from claydist.sketch import Sketch
from claydist.spec import ScoreSpec
from claydist.storage import Store

MOST_WARNINGS = 10


@dataclass
class Publisher:
    """Publishes the dates of one run, one after another.

    Parameters
    ----------
    roles : columns of weight and ranking query in the model's training, for `evaluate --scores`.
    training : scores on the rows that the model was evaluated on; None where the bundle has none.
    run_id : of this run.
    """

    output: Store
    spec: ScoreSpec
    rule: DateRule | None
    model: ModelFiles
    target: Target
    roles: dict[str, str | None]
    training: Sketch | None
    run_id: str
    display: Display
    _scores: dict[dt.date, Sketch | None] = field(default_factory=dict)
    _replaced: list[Path] = field(default_factory=list)
    _warnings: list[str] = field(default_factory=list)
    _stats: dict[str, UnitStats] = field(default_factory=dict)
    _verdicts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def publish(self, one: DateRun, names: Sequence[str]) -> None:
        """Publish a date whose units are all staged, and set what became of it.

        Parameters
        ----------
        names : what was in staging when the run began.

        Raises
        ------
        DataError : when more rows are in quarantine than the spec allows.
        GateFailed : with every gate that fails.
        Locked : when another run has taken the date over, or published it, meanwhile.
        """
        staged = [one.staged[unit.unit_id] for unit in one.planned.units]
        stats = UnitStats()
        for unit in staged:
            stats = stats + unit.stats
        if stats.n_read == stats.left_out:
            one.ended("empty", f"`where` is true for no row of {one.folder}")
            return
        self._stats[one.folder] = stats
        self._check_quarantine(one, stats)
        gates = self._judge(one, stats)
        manifest = self._manifest(one, stats, staged, gates)
        done = publish.commit(self.output, one.planned, one.run, one.current, manifest)
        if done.replaced is not None:
            self._replaced.append(done.replaced)
        if done.unfinished is not None:
            self.display.say(f"{one.folder} is published; the next run ends what this one could not: {done.unfinished}")
        Staging(self.output).clean(one.planned, staged, one.run, names)
        if one.day is not None:
            self._scores[one.day] = stats.scores
        one.ended("published", one.current.damage, manifest)

    def report(self, one: DateRun, seconds: float, rows_per_s: float) -> None:
        """Write the page of a date that was published or refused; of a date that another run has it is that run's.

        Parameters
        ----------
        seconds, rows_per_s : of the run's scoring until now.
        """
        stats = self._stats.get(one.folder)
        if stats is None or isinstance(one.error, (Locked, StorageError)):
            return
        facts = {**self._facts(one), "seconds": round(seconds, 1), "rows_per_s": round(rows_per_s)}
        try:
            one.report = write_report(self.output, one.folder, facts, stats, self.training)
        # Whatever is wrong with a page is no reason for a published date to fail, nor for those after it.
        except Exception as e:
            self._warnings.append(f"{one.folder}: its report could not be written: {type(e).__name__}: {e}")

    def end(self) -> None:
        """Say what gates warned of, and remove what was replaced or left behind."""
        for text in self._warnings[:MOST_WARNINGS]:
            self.display.say(text)
        if len(self._warnings) > MOST_WARNINGS:
            n_more = len(self._warnings) - MOST_WARNINGS
            self.display.say(f"... and {n_more} more warnings; those of gates are in the manifest of their date")
        publish.sweep(self.output, self._replaced)
        Staging(self.output).clean_abandoned()

    def _facts(self, one: DateRun) -> dict[str, Any]:
        return {
            "name": self.model.name, "date": one.day.isoformat() if one.day else None, "status": one.status,
            "why": one.reason, "model": {**self.model.facts, "task": self.target.task},
            "uri": self.output.join(one.folder).url, "gates": self._verdicts.get(one.folder, []),
            "lineage": {**one.planned.state.to_json(), "run": self.run_id},
        }  # fmt: skip

    @property
    def _kept(self) -> str:
        return f"what is scored is kept in {Staging(self.output).store.url}"

    def _check_quarantine(self, one: DateRun, stats: UnitStats) -> None:
        if too_many(stats, self.spec.max_quarantined):
            raise DataError(
                f"{one.folder}: {stats.n_quarantined} of {stats.n_read - stats.left_out} rows break the model's "
                f"contract, allowed are {self.spec.max_quarantined:g} (max_quarantined); "
                f"nothing was published, {self._kept}",
                reasons(stats),
            )

    def _judge(self, one: DateRun, stats: UnitStats) -> list[dict[str, Any]]:
        """The verdicts of gates of which none fails; warnings are said."""
        verdicts = judge_gates(stats, self.spec.gates, self.training, self._last_scores(one))
        self._verdicts[one.folder] = [verdict.to_json() for verdict in verdicts]
        said = {kind: [v.describe() for v in verdicts if v.outcome == kind] for kind in ("warn", "fail")}
        self._warnings += [f"{one.folder}: {text}" for text in said["warn"]]
        if said["fail"]:
            raise GateFailed(
                f"{one.folder} was not published: gates failed; {self._kept}: look at the input, and raise the limit "
                f"in `gates` where the scores are right",
                said["fail"],
            )
        return self._verdicts[one.folder]

    def _manifest(
        self, one: DateRun, stats: UnitStats, staged: Sequence[Staged], gates: list[dict[str, Any]]
    ) -> dict[str, Any]:
        partition, target = one.planned, self.target
        return {
            "date": one.day.isoformat() if one.day else None, "rows": stats.n_written,
            "quarantined": stats.n_quarantined, "left_out": stats.left_out, "rows_in": stats.n_read,
            "files": parts(staged, self.run_id),
            "quarantine": quarantine_files(staged, self.run_id), "reasons": list(reasons(stats)),
            "model": self.model.facts, "state": partition.state.to_json(), "run": one.run,
            "published_by": self.run_id, "published_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "input": {"fingerprint": partition.state.inventory, "files": len({u.file for u in partition.units})},
            "date_columns": list(self.rule.columns) if self.rule else [], "key": list(self.spec.key),
            "where": self.spec.where, **self.roles,
            "target": {"task": target.task, "column": target.column, "classes": list(target.classes),
                       "above": target.above, "quantiles": list(target.quantiles)},
            "gates": gates, "unseen": dict(stats.unseen), "scores": stats.scores.to_json(),
        }  # fmt: skip

    def _last_scores(self, one: DateRun) -> Sketch | None:
        """Scores of the last published date before this one; of an undated output those that are replaced."""
        if one.day is None or self.rule is None:
            return _scores(one.current.manifest)
        for last in sorted((day for day in self._published | set(self._scores) if day < one.day), reverse=True):
            if last not in self._scores:
                self._scores[last] = self._read_scores(one, self.rule.folder(last))
            if (found := self._scores[last]) is not None:
                return found
        return None

    def _read_scores(self, one: DateRun, folder: str) -> Sketch | None:
        try:
            return _scores(publish.look(self.output, folder).manifest)
        except ClaydistError as e:  # of that date, and no reason for this one to fail
            self._warnings.append(f"{one.folder}: not compared with {folder}: {e}")
            return None

    @cached_property
    def _published(self) -> set[dt.date]:
        """Dates that have a folder when the first is judged."""
        found = (parse_day(name.partition("=")[2]) for name in self.output.list() if "=" in name)
        return {day for day in found if day}


def _scores(manifest: Manifest | None) -> Sketch | None:
    """The scores of a published date; None where nothing is published, or its manifest does not have them."""
    tree = manifest.get("scores") if manifest else None
    return Sketch.from_json(tree) if tree else None
