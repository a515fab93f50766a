"""Exact metrics of what was published, once labels have arrived: what `claydist evaluate --scores --labels` does."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from claydist.arrays import native_values
from claydist.dataset.footers import Inventory, take_inventory
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece
from claydist.dataset.split import hash_values
from claydist.display import Display, RowCount, Silent
from claydist.errors import DataError
from claydist.evaluate import ALL_ROWS
from claydist.expressions import Expression, parse
from claydist.labels import label_values
from claydist.metrics import MetricSums, Outcome
from claydist.places import check_paths
from claydist.predictor import Target
from claydist.scoring.dates import DateRows, DateRule, find_dates, only_files, to_days
from claydist.scoring.publish import look
from claydist.scoring.readers import published_folders, read_folder
from claydist.scoring.work import RayWork, Work
from claydist.storage import Store, open_store, redact

DATES_PER_TASK = 31


@dataclass(frozen=True)
class Judged:
    """Metric sums of one date's rows that have a label, by slice (ALL_ROWS holds them all), and rows without one."""

    sums: Mapping[str, MetricSums]
    unlabelled: int


@dataclass(frozen=True)
class Folder:
    """A published date: its folder, the Hive key in its name ("" of an undated output), and the date."""

    name: str
    key_name: str
    day: dt.date | None


@dataclass(frozen=True)
class JudgeTask:
    """The work of one task: published dates whose labels are in the same files, so that these are read once."""

    output: Store
    folders: tuple[Folder, ...]
    key: tuple[str, ...]
    target: Target
    weight: str | None
    group: str | None
    rule: DateRule | None
    labels: Inventory
    pieces: tuple[Piece, ...]
    slices: tuple[str, ...]


def evaluate_scores(
    scores_url: str,
    labels: str | Sequence[str],
    *,
    slices: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    work: Work | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Exact metrics of published scores on the rows that have a label, over all dates and by date.

    Rows are found by the scores' key columns, and by the date where the labels have its columns. Weights and ranking
    queries are those of training, where the labels have their columns.

    Parameters
    ----------
    scores_url : what `output` is in the spec of scoring.
    labels : URLs of Parquet with the key columns and the label.
    slices : expressions over the labels' columns; metrics are given for the rows of each too.
    work : where tasks run; Ray where not given.

    Returns
    -------
    The JSON of `evaluate`, with `unlabelled` (scored rows without a label) and `dates`, each with its own of all.

    Raises
    ------
    DataError : when nothing is published, the labels lack a column, or a key stands in them or in the scores twice.
    """
    shown = display or Silent()
    shown.stage("inventory")
    urls = [labels] if isinstance(labels, str) else list(labels)
    check_paths([scores_url, *urls])
    work = work or RayWork()
    output = open_store(scores_url, storage_options)
    manifests = _manifests(output)
    first = next(iter(manifests.values()))[2]
    target = _target(first, {folder: manifest for folder, (_, _, manifest) in manifests.items()})
    inventory = take_inventory(urls, options=storage_options, types=_key_types(first), run=work.map)
    _check_labels(inventory, first, target, slices, ", ".join(map(redact, urls)))
    tasks = _tasks(output, manifests, first, target, inventory, tuple(slices), work)
    shown.stage("evaluation")
    count = RowCount(shown, sum(manifest["rows"] for _, _, manifest in manifests.values()), len(manifests), "dates")

    def done(_: int, judged: Sequence[Judged]) -> None:
        count.add(sum(one.sums[ALL_ROWS].n_rows + one.unlabelled for one in judged), len(judged))

    results: list[list[Judged]] = work.map(judge_task, tasks, done)
    shown.done()
    folders = [folder for task in tasks for folder in task.folders]
    return _summary(folders, [one for judged in results for one in judged], manifests)


def judge_task(task: JudgeTask) -> list[Judged]:
    """Metric sums of each date of the task."""
    parsed = {text: parse(text) for text in task.slices}
    extra = {name for expression in parsed.values() for name in expression.columns}
    columns = dict.fromkeys([*task.key, task.target.column, *filter(None, [task.weight, task.group]), *sorted(extra)])
    labels, days = _read_labels(task, list(columns))
    return [
        _judge(task, folder, labels if days is None else labels.filter(pa.array(days == _number(folder))), parsed)
        for folder in task.folders
    ]


def _judge(task: JudgeTask, folder: Folder, labels: pa.Table, parsed: Mapping[str, Expression]) -> Judged:
    scores = read_folder(task.output, folder.name, folder.key_name, folder.day)
    found = _match(scores, labels, task, folder.name)
    labelled = found.column(task.target.column).is_valid()
    rows = found.filter(labelled)
    outcome = _outcome(task, scores.filter(labelled), rows)
    sums = {name: _sums(task.target) for name in (ALL_ROWS, *task.slices)}
    sums[ALL_ROWS].add(outcome)
    for text, expression in parsed.items():
        sums[text].add(outcome.select(expression.mask(rows)))
    return Judged(sums, found.num_rows - rows.num_rows)


def _read_labels(task: JudgeTask, columns: list[str]) -> tuple[pa.Table, np.ndarray | None]:
    """The labels of the task's dates, and the day of each row; None where the labels have no dates."""
    rule = task.rule
    needed = list(dict.fromkeys([*columns, *(rule.columns if rule else ())]))
    wanted = [_number(folder) for folder in task.folders]
    tables = [pa.schema([task.labels.schema.field(name) for name in needed]).empty_table()]
    days = [np.empty(0, np.int32)]
    for table in read_pieces(task.labels, task.pieces, needed):
        found = np.zeros(table.num_rows, np.int32) if rule is None else rule.of_rows(table, "the labels")
        mine = np.isin(found, wanted) if rule else np.ones(len(found), bool)
        tables.append(table.filter(pa.array(mine)))
        days.append(found[mine])
    return pa.concat_tables(tables), np.concatenate(days) if rule else None


def _number(folder: Folder) -> int:
    return 0 if folder.day is None else to_days(folder.day)


def _match(scores: pa.Table, labels: pa.Table, task: JudgeTask, folder: str) -> pa.Table:
    """The labels' rows in the order of the scores; null where a scored row has none."""
    index = pd.MultiIndex.from_frame(_keys(labels, task, scores.schema))
    wanted = pd.MultiIndex.from_frame(_keys(scores, task, scores.schema))
    for name, found in (("the labels", index), (f"the scores of {folder}", wanted)):
        if not found.is_unique:
            n = int(found.duplicated().sum())
            raise DataError(
                f"key columns {list(task.key)} do not tell the rows of {name} apart: {n} rows repeat a key, the first "
                f"{found[found.duplicated()][0]!r}; score with more columns in `key`"
            )
    at = index.get_indexer(wanted)
    return labels.take(pa.array(at, mask=at < 0))


def _keys(table: pa.Table, task: JudgeTask, schema: pa.Schema) -> pd.DataFrame:
    try:
        return pd.DataFrame({
            name: table.column(name).cast(schema.field(name).type).to_pandas() for name in task.key
        })  # fmt: skip
    except pa.ArrowException as e:
        raise DataError(f"the key columns of the labels cannot be read as those of the scores: {e}") from None


def _outcome(task: JudgeTask, scores: pa.Table, rows: pa.Table) -> Outcome:
    target = task.target
    names = target.output_columns[1:] if target.task in ("binary", "multiclass") else target.output_columns
    values = np.column_stack([scores.column(name).to_numpy() for name in names])
    quantiles = values if target.quantiles else None
    if target.quantiles:
        values = target.middle(values)
    elif target.task != "multiclass":
        values = values[:, 0]
    w = None if task.weight is None else native_values(rows.column(task.weight)).astype(np.float64)
    group = None if task.group is None else hash_values(rows.column(task.group))
    return Outcome(label_values(target, rows.column(target.column), "the labels"), values, w, group, quantiles)


def _sums(target: Target) -> MetricSums:
    return MetricSums(target.task, n_classes=max(2, len(target.classes)), quantiles=target.quantiles)


Published = dict[str, tuple[str, dt.date | None, Mapping[str, Any]]]


def _manifests(output: Store) -> Published:
    """The published dates that have a row: one whose rows are all in quarantine has nothing to judge."""
    found, n_empty = {}, 0
    for folder, (key_name, day) in published_folders(output).items():
        manifest = look(output, folder).manifest
        if manifest is not None and manifest["rows"]:
            found[folder] = (key_name, day, manifest)
        elif manifest is not None:
            n_empty += 1
    if not found:
        said = f"{n_empty} dates without a row are" if n_empty else "nothing is"
        raise DataError(f"{said} published at {output.url}; score it first")
    return found


def _target(first: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]) -> Target:
    if not first["key"]:
        raise DataError("the scores have no key columns to find their labels by; score again with `key` in the spec")
    for name in ("target", "key", "date_columns"):
        if other := sorted(folder for folder, manifest in manifests.items() if manifest[name] != first[name]):
            raise DataError(
                f"the dates were scored with different {name}: {other[:5]} have {manifests[other[0]][name]}, "
                f"the first has {first[name]}; score them anew by one spec and model"
            )
    t = first["target"]
    return Target(t["task"], t["column"], tuple(t["classes"]), t["above"], tuple(t["quantiles"]))


def _key_types(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Hive keys that hold a whole date are text, also where all of them look like integers."""
    columns = manifest["date_columns"]
    return {columns[0]: "string"} if len(columns) == 1 else {}


def _key_columns(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The key columns that are in the published files: the date is in their folder's name."""
    dates = manifest["date_columns"]
    return tuple(name for name in manifest["key"] if dates != [name])


def _check_labels(
    inventory: Inventory, manifest: Mapping[str, Any], target: Target, slices: Sequence[str], where: str
) -> None:
    names = inventory.schema.names
    if absent := sorted({*_key_columns(manifest), target.column} - set(names)):
        raise DataError(f"the labels in {where} lack columns {absent}; they have {', '.join(sorted(names))}")
    for text in slices:
        parse(text).check(names)


def _tasks(
    output: Store, manifests: Published, first: Mapping[str, Any], target: Target, inventory: Inventory,
    slices: tuple[str, ...], work: Work,
) -> list[JudgeTask]:  # fmt: skip
    names = inventory.schema.names
    dates = tuple(first["date_columns"])
    rule = None
    if dates and set(dates) <= set(names):
        rule = DateRule(next(key_name for key_name, _, _ in manifests.values()), dates)
    days = {day for _, day, _ in manifests.values() if day}
    rows: Mapping[dt.date | None, tuple[DateRows, ...]] = find_dates(inventory, rule, days or None, work.map)
    weight, group_by = (first.get(role) if first.get(role) in names else None for role in ("weight", "group"))
    groups: dict[tuple[int, ...], list[Folder]] = {}
    for name, (key_name, day, _) in manifests.items():
        files = tuple(where.file for where in rows.get(day if rule else None, ()))
        groups.setdefault(files, []).append(Folder(name, key_name, day))
    tasks = []
    for files, together in groups.items():
        pieces = tuple(
            Piece(number, group, 0, n_rows)
            for number, file in enumerate(files)
            for group, n_rows in enumerate(inventory.files[file].row_groups)
            if n_rows
        )
        tasks += [
            JudgeTask(
                output, tuple(together[start : start + DATES_PER_TASK]), _key_columns(first), target, weight, group_by,
                rule, only_files(inventory, files), pieces, slices,
            )
            for start in range(0, len(together), DATES_PER_TASK)
        ]  # fmt: skip
    return tasks


def _summary(folders: Sequence[Folder], results: Sequence[Judged], manifests: Published) -> dict[str, Any]:
    total: dict[str, MetricSums] = {}
    for result in results:
        for name, sums in result.sums.items():
            total[name] = total[name] + sums if name in total else sums
    if not total[ALL_ROWS].n_rows:
        raise DataError("no scored row has a label yet; are the key columns the same in both?")
    models = [manifests[folder.name][2]["model"] for folder in folders]
    dates = [
        {
            "date": folder.day.isoformat() if folder.day else None, "model": model["name"], "version": model["version"],
            "unlabelled": result.unlabelled, **_metrics(result.sums),
        }
        for folder, result, model in zip(folders, results, models, strict=True)
    ]  # fmt: skip
    dates.sort(key=lambda one: one["date"] or "")
    versions = sorted({str(model["version"]) for model in models})
    return {
        "model": models[0]["name"], "version": models[0]["version"] if len(versions) == 1 else versions,
        **_metrics(total), "unlabelled": sum(result.unlabelled for result in results), "dates": dates,
    }  # fmt: skip


def _metrics(sums: Mapping[str, MetricSums]) -> dict[str, Any]:
    return {
        "rows": sums[ALL_ROWS].n_rows,
        "metrics": sums[ALL_ROWS].values() if sums[ALL_ROWS].n_rows else {},
        "slices": {name: {"rows": s.n_rows, **s.values()} for name, s in sums.items() if name != ALL_ROWS},
    }
