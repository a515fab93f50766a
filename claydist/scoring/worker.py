"""What a task does: read a run of row groups once, predict, and stage one file for each date in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from claydist.dataset.footers import Inventory
from claydist.dataset.reader import BATCH_ROWS, read_pieces
from claydist.dataset.shards import Piece
from claydist.errors import ClaydistError, DataError
from claydist.expressions import parse
from claydist.predictor import Prediction, Predictor
from claydist.schema import type_of
from claydist.scoring.dates import DateRule, to_days
from claydist.scoring.staging import STATS_KEY, Staged, file_facts
from claydist.scoring.units import Partition, Unit, UnitStats
from claydist.storage import Store, sha256

REASON = "quarantine_reason"

_loaded: dict[str, Predictor] = {}


@dataclass(frozen=True)
class ModelFiles:
    """The model as it travels: its facts, and its files or a reference to them in Ray's object store."""

    name: str
    version: int | None
    digest: str
    files: Any = field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """Name, version and digest."""
        return {"name": self.name, "version": self.version, "digest": self.digest}

    def predictor(self) -> Predictor:
        """The predictor, built once a process and model."""
        if self.digest not in _loaded:
            files = self.files
            if not isinstance(files, Mapping):
                import ray

                files = ray.get(files)
            _loaded.clear()  # a process that has served another model has no use for it any more
            _loaded[self.digest] = Predictor.from_files(files)
            _loaded[self.digest].model.set_threads(1)
        return _loaded[self.digest]


@dataclass(frozen=True)
class UnitWork:
    """One unit to write: its date's partition, without the other units, and the run in names and metadata."""

    partition: Partition
    unit: Unit
    run: str


@dataclass(frozen=True)
class ScoreTask:
    """The work of one task: some row groups of one file, the only one in the inventory.

    Attributes
    ----------
    key : columns kept beside the prediction.
    where : rows where it is not true are left out.
    """

    inventory: Inventory
    row_groups: tuple[int, ...]
    works: tuple[UnitWork, ...]
    rule: DateRule | None
    key: tuple[str, ...]
    where: str | None
    staging: Store
    model: ModelFiles


@dataclass(frozen=True)
class Scored:
    """What a task comes to: each unit that it staged, by folder; or the error that ended it."""

    units: tuple[tuple[str, Staged], ...] = ()
    error: ClaydistError | None = None


def score_task(task: ScoreTask) -> Scored:
    """The staged units of a task; an error of ours is a result, so that it ends its own dates only."""
    try:
        return Scored(tuple(_score(task)))
    except ClaydistError as e:
        return Scored(error=e)


def warm_up(model: ModelFiles) -> bool:
    """True, once this process has imported what it needs and built the model."""
    return model.predictor() is not None


def _score(task: ScoreTask) -> Iterator[tuple[str, Staged]]:
    predictor = task.model.predictor()
    entry = task.inventory.files[0]
    sinks = [_Sink(task, work) for work in task.works]
    asked = np.array([_number(work.partition.day) for work in task.works], np.int32)
    pieces = [Piece(0, group, 0, entry.row_groups[group]) for group in task.row_groups]
    where = None if task.where is None else parse(task.where)
    needed = [*predictor.schema.names, *task.key, *(task.rule.columns if task.rule else ())]
    columns = list(dict.fromkeys([*needed, *sorted(where.columns if where else ())]))
    for batch in read_pieces(task.inventory, pieces, columns):
        table, days = _by_date(task, batch, asked)
        mask = np.ones(len(days), bool) if where is None else where.mask(table)
        selected, days_selected = (table, days) if mask.all() else (table.filter(pa.array(mask)), days[mask])
        good, prediction, bad, reasons = predict_good(predictor, selected, entry.url)
        is_good = np.array([not reason for reason in reasons]) if reasons else np.ones(len(days_selected), bool)
        output = output_table(predictor, good, prediction, task.key)
        scores = predictor.target.score(prediction.values)
        for sink, day in zip(sinks, asked, strict=True):
            sink.count(int((days == day).sum()), int((days_selected == day).sum()))
            mine = _span(days_selected[is_good], day)
            sink.write(output[mine], scores[mine], _unseen(predictor, good[mine], good.num_rows, prediction))
            if bad.num_rows:
                lost = _span(days_selected[~is_good], day)
                sink.quarantine(bad[lost], [reason for reason in reasons if reason][lost])
    for work, sink in zip(task.works, sinks, strict=True):
        yield work.partition.folder, sink.close()


def predict_good(predictor: Predictor, table: pa.Table, where: str) -> tuple[pa.Table, Prediction, pa.Table, list[str]]:
    """The rows that keep the model's contract, their prediction, the rows that break it, and a reason for each row.

    A good row has the reason "". Without a bad row the list of reasons is empty.
    """
    try:
        return table, predictor.predict_arrays(table, where), table.slice(0, 0), []
    except DataError:
        found = predictor.bad_rows(table)
        if not found:
            raise
    names = list(found)
    masks = np.stack([found[name] for name in names])
    reasons = ["; ".join(names[i] for i in np.flatnonzero(masks[:, row])) for row in range(table.num_rows)]
    is_bad = masks.any(axis=0)
    good = table.filter(pa.array(~is_bad))
    return good, predictor.predict_arrays(good, where), table.filter(pa.array(is_bad)), reasons


def output_table(predictor: Predictor, table: pa.Table, prediction: Prediction, key: tuple[str, ...]) -> pa.Table:
    """The key columns of a table, and the columns of its prediction."""
    return pa.table({**{name: table.column(name) for name in key}, **predictor.target.columns(prediction.values)})


def _by_date(task: ScoreTask, batch: pa.Table, asked: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The rows of the dates asked for, brought together by date and otherwise in their order, and their days."""
    entry = task.inventory.files[0]
    if task.rule is None or task.rule.of_keys(dict(entry.keys), entry.url) is not None:
        return batch, np.full(batch.num_rows, asked[0], np.int32)
    days = task.rule.of_rows(batch, entry.url)
    order = np.argsort(days, kind="stable")
    order = order[np.isin(days[order], asked)]
    if len(order) == len(days) and days.min() == days.max():
        return batch, days
    return batch.take(pa.array(order)), days[order]


def _span(days: np.ndarray, day: np.int32) -> slice:
    """Where a day's rows are among sorted days."""
    return slice(int(np.searchsorted(days, day, "left")), int(np.searchsorted(days, day, "right")))


def _number(day: date | None) -> int:
    return 0 if day is None else to_days(day)


def _unseen(predictor: Predictor, part: pa.Table, n_rows: int, prediction: Prediction) -> Mapping[str, int]:
    """Unseen categories in some of a batch's `n_rows` rows; of all its rows the prediction knows them."""
    if not prediction.unseen or part.num_rows == n_rows:
        return prediction.unseen
    return predictor.plan.encode(part).unseen


class _Sink:
    """The file of one unit while it is written: in memory, and at once in staging when it is whole."""

    def __init__(self, task: ScoreTask, work: UnitWork) -> None:
        self._task, self._work = task, work
        self._stats = UnitStats()
        self._pending: list[pa.Table] = []
        self._bad: list[pa.Table] = []
        self._buffer = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def count(self, n_read: int, n_selected: int) -> None:
        self._stats += UnitStats(n_read, n_read - n_selected)

    def write(self, table: pa.Table, scores: np.ndarray, unseen: Mapping[str, int]) -> None:
        account = UnitStats(n_written=table.num_rows, n_null=int(np.isnan(scores).sum()), unseen=unseen)
        account.scores.add(scores)
        self._stats += account
        self._pending.append(table)
        if sum(part.num_rows for part in self._pending) >= BATCH_ROWS:
            self._flush()

    def quarantine(self, table: pa.Table, reasons: list[str]) -> None:
        names, counts = np.unique(reasons, return_counts=True)
        self._stats += UnitStats(quarantined=dict(zip(names.tolist(), counts.tolist(), strict=True)))
        self._bad.append(table.append_column(REASON, pa.array(reasons, pa.string())))

    def close(self) -> Staged:
        self._check()
        unit, stats, work = self._work.unit, self._stats, self._work
        # The quarantine first: where the unit's own file is, all of the unit is.
        bad = _to_ipc(self._bad) if stats.n_quarantined else None
        if bad is not None:
            self._task.staging.join(work.partition.quarantine_name(unit.unit_id, work.run)).write(bad)
        self._flush()
        assert self._writer is not None, "a unit has a row, so a batch was written"
        facts = file_facts(self._task.model.facts, work.run, unit.unit_id)
        self._writer.add_key_value_metadata({**facts, STATS_KEY.decode(): json.dumps(stats.to_json())})
        self._writer.close()
        data = self._buffer.getvalue().to_pybytes()
        self._task.staging.join(work.partition.name(unit.unit_id, work.run)).write(data)
        return Staged(unit.unit_id, stats, sha256(data), len(data), None if bad is None else sha256(bad))

    def _flush(self) -> None:
        table = pa.concat_tables(self._pending)
        self._pending = [table.schema.empty_table()]
        if self._writer is None:
            # Predictions and numbers that tell rows apart hardly repeat: building a dictionary of them is time lost.
            dictionary = [name for name in self._task.key if type_of(table.schema.field(name).type) == "string"]
            self._writer = pq.ParquetWriter(self._buffer, table.schema, use_dictionary=dictionary or False)
        if table.num_rows:
            self._writer.write_table(table)

    def _check(self) -> None:
        stats, unit = self._stats, self._work.unit
        if stats.n_read != unit.n_rows or stats.n_read != stats.left_out + stats.n_quarantined + stats.n_written:
            raise DataError(
                f"row groups {list(unit.row_groups)} of {self._task.inventory.files[0].url}: expected {unit.n_rows} "
                f"rows, found {stats.n_read}, of which {stats.left_out} left out, {stats.n_quarantined} quarantined "
                f"and {stats.n_written} scored; write the file anew, or run again"
            )


def _to_ipc(tables: list[pa.Table]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, tables[0].schema) as file:
        for table in tables:
            file.write_table(table)
    return sink.getvalue().to_pybytes()
