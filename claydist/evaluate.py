"""A predictor over a dataset: exact metrics of all rows, by slice, with the constant model beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from claydist.arrays import native_values
from claydist.cluster import run_tasks
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece
from claydist.dataset.split import hash_values
from claydist.dataset.statistics import Part, Run, Task, column_sums, plan_tasks
from claydist.errors import DataError
from claydist.expressions import parse
from claydist.labels import label_values
from claydist.metrics import MetricSums, Outcome, constant_outcome
from claydist.predictor import Prediction, Predictor
from claydist.profile import ColumnSums, check_weights
from claydist.sketch import Sketch
from claydist.spec import DataSpec

ALL_ROWS = ""


@dataclass(frozen=True)
class Evaluation:
    """What a predictor is worth on some rows.

    Attributes
    ----------
    sums : metric sums by slice; ALL_ROWS holds all rows.
    baseline : metric sums of the constant model over all rows; None where the prior is not known.
    unseen : number of categories not seen in training, by feature.
    scores : of `Target.score`, one number a row.
    columns : sums of the feature columns, where a profile was asked for.
    """

    n_rows: int
    sums: Mapping[str, MetricSums]
    baseline: MetricSums | None
    unseen: Mapping[str, int] = field(default_factory=dict)
    scores: Sketch = field(default_factory=Sketch)
    columns: Mapping[str, ColumnSums] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics over all rows, by name."""
        return self.sums[ALL_ROWS].values()

    @property
    def slices(self) -> dict[str, dict[str, Any]]:
        """Metrics by slice, with its number of rows."""
        return {name: {"rows": s.n_rows, **s.values()} for name, s in self.sums.items() if name != ALL_ROWS}

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.n_rows + other.n_rows,
            {name: sums + other.sums[name] for name, sums in self.sums.items()},
            None if self.baseline is None or other.baseline is None else self.baseline + other.baseline,
            Counter(self.unseen) + Counter(other.unseen),
            self.scores + other.scores,
            {name: sums + other.columns[name] for name, sums in self.columns.items()},
        )


@dataclass(frozen=True)
class EvaluationPlan:
    """What every task of an evaluation needs; sent to the cluster once.

    Attributes
    ----------
    weight, group : columns of sample weights and of the ranking query.
    slices : expressions; metrics are given for the rows of each too.
    depths : the k of ndcg@k and map@k.
    prior : the constant model, as `metrics.constant_outcome` takes it; None for no baseline.
    profile : the spec's part on columns, to profile the feature columns too.
    origins : of the sketches of dates and timestamps in the profile to compare with, in seconds by column.
    cache_dir : where remote bytes are kept for later passes.
    """

    predictor: Predictor
    part: Part
    weight: str | None = None
    group: str | None = None
    slices: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()
    prior: tuple[float, ...] | None = None
    profile: DataSpec | None = None
    origins: Mapping[str, float] = field(default_factory=dict)
    cache_dir: str | None = None

    @property
    def columns(self) -> list[str]:
        """Columns to read."""
        more = {column for text in self.slices for column in parse(text).columns}
        named = filter(None, [self.predictor.target.column, self.weight, self.group])
        return sorted({*self.predictor.schema.names, *named, *more})

    def new_sums(self) -> MetricSums:
        """Metric sums of no rows."""
        target = self.predictor.target
        n_classes = max(2, len(target.classes))
        return MetricSums(target.task, n_classes=n_classes, quantiles=target.quantiles, depths=self.depths)


def evaluate(plan: EvaluationPlan, run: Run = run_tasks) -> Evaluation:
    """Exact metrics of the predictor on all rows of the part, by Ray tasks.

    Raises
    ------
    DataError : when there are no rows, a slice names an absent column, or a label is null or was never seen.
    """
    for text in plan.slices:
        parse(text).check(plan.part.inventory.schema.names)
    tasks = plan_tasks(plan.part.counts)
    if not tasks:
        raise DataError("there are no rows to evaluate on")
    total, *others = run(evaluate_task, tasks, plan)
    for other in others:
        total = total + other
    return total


def evaluate_task(task: Task, plan: EvaluationPlan) -> Evaluation:
    """The evaluation of one task's rows."""
    parsed = {text: parse(text) for text in plan.slices}
    sums = {name: plan.new_sums() for name in (ALL_ROWS, *plan.slices)}
    baseline = None if plan.prior is None else plan.new_sums()
    n_rows, unseen, scores = 0, Counter[str](), Sketch()
    columns: dict[str, ColumnSums] = {}
    inventory, selection, counts = plan.part.inventory, plan.part.selection, plan.part.counts
    pieces = [Piece(file, group, 0, counts[file][group]) for file, groups in task for group in groups]
    where = inventory.files[pieces[0].file].url
    for table in read_pieces(inventory, pieces, plan.columns, selection, cache_dir=plan.cache_dir):
        outcome, prediction = _outcome(plan, table, where)
        n_rows += table.num_rows
        unseen.update(prediction.unseen)
        scores.add(plan.predictor.target.score(prediction.values))
        sums[ALL_ROWS].add(outcome)
        for text, expression in parsed.items():
            sums[text].add(outcome.select(expression.mask(table)))
        if baseline is not None and plan.prior is not None:
            baseline.add(constant_outcome(outcome, plan.predictor.task, plan.prior))
        if plan.profile is not None:
            for column in plan.predictor.schema.columns:
                name, values = column.name, table.column(column.name)
                found = column_sums(column, values, outcome.w, plan.profile, plan.origins.get(name, 0.0))
                columns[name] = columns.get(name, ColumnSums()) + found
    return Evaluation(n_rows, sums, baseline, unseen, scores, columns)


def _outcome(plan: EvaluationPlan, table: pa.Table, where: str) -> tuple[Outcome, Prediction]:
    prediction = plan.predictor.predict_arrays(table, where)
    values, target = prediction.values, plan.predictor.target
    quantiles = None
    if target.quantiles:
        quantiles = values.reshape(len(values), -1)
        values = target.middle(quantiles)
    w = None
    if plan.weight is not None:
        w = native_values(table.column(plan.weight)).astype(np.float64)
        check_weights(w, plan.weight, where)
    group = None if plan.group is None else hash_values(table.column(plan.group))
    y = label_values(target, table.column(target.column), where)
    return Outcome(y, values, w, group, quantiles), prediction
