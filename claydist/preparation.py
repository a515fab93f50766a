"""From a spec to everything training is given: tables, parts, roles, target, features.

Only here are data looked at before training. Of the test rows the count, the weights and the label's values are known,
and that they can be encoded: what would else end a run after its training. Nothing of them goes into features or model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from claydist import cluster
from claydist.dataset.footers import Inventory, take_inventory
from claydist.dataset.split import SplitPlan
from claydist.dataset.statistics import (
    PARTS,
    Part,
    PassPlan,
    PassSums,
    first_times,
    part_of,
    run_and_show,
    summarise,
)
from claydist.display import Display, Silent
from claydist.errors import DataError, SpecError
from claydist.expressions import parse
from claydist.features import FeaturePlan, build_plan, check_types, float32_warnings
from claydist.labels import check_bounds, decide_target, prior
from claydist.metrics import AUC_CLASSES, TASK_METRICS
from claydist.models.boosted import ONE_WORKER_OBJECTIVES, booster_params
from claydist.places import check_paths, check_same_sizes
from claydist.predictor import Target
from claydist.profile import ColumnProfile, ColumnSums
from claydist.schema import Column, Roles, Schema, column_of, decide_roles, type_of
from claydist.spec import LinearSpec, TrainSpec, XGBoostSpec
from claydist.storage import redact
from claydist.training.boosting import check_params
from claydist.training.linear import LOSSES


@dataclass(frozen=True)
class Tables:
    """The inventories of a spec: the main one, and those of `valid.path` and `test.path` where they are given."""

    main: Inventory
    separate: Mapping[str, Inventory]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all inventories, as hexadecimal text."""
        parts = [self.main.fingerprint, *(self.separate[name].fingerprint for name in sorted(self.separate))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def is_remote(self) -> bool:
        """True where some file is not on a local filesystem."""
        return any(not store.is_local for table in (self.main, *self.separate.values()) for store in table.stores)


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation are given.

    Attributes
    ----------
    parts : rows of train, valid and test, by name; only those that exist.
    profiles : of the feature columns, over the training rows.
    prior : the constant model, as `metrics.constant_outcome` takes it.
    """

    roles: Roles
    parts: Mapping[str, Part]
    target: Target
    plan: FeaturePlan
    profiles: Mapping[str, ColumnProfile]
    prior: tuple[float, ...]
    warnings: tuple[str, ...]

    @property
    def trained_parts(self) -> list[str]:
        """Parts that a training worker reads."""
        return [name for name in ("train", "valid") if name in self.parts]

    @property
    def judged_parts(self) -> list[str]:
        """Parts that the model is evaluated on; the training rows only where there are no others."""
        return [name for name in ("valid", "test") if name in self.parts] or ["train"]

    def model_params(self, spec: TrainSpec, n_threads: int) -> dict[str, Any]:
        """Parameters of the algorithm.

        Raises
        ------
        SpecError : for parameters that do not fit the task or the features, or that XGBoost refuses.
        """
        if isinstance(spec.model, XGBoostSpec):
            params = booster_params(spec.model, self.target.task, self.plan, len(self.target.classes), n_threads)
            check_params(params, self.plan)
            return params
        return linear_params(spec.model, self.target)


def linear_params(model: LinearSpec, target: Target) -> dict[str, Any]:
    """Loss and number of outputs of a linear model.

    Raises
    ------
    SpecError : when the loss does not fit the task.
    """
    possible = LOSSES.get(target.task, ())
    loss = model.loss or (possible[0] if possible else None)
    if loss is None or loss not in possible:
        raise SpecError(
            f"model.loss: {loss!r} does not fit the task {target.task!r}; "
            f"expected {' or '.join(possible) or 'kind: xgboost, linear models do not rank'}"
        )
    return {"loss": loss, "n_outputs": len(target.classes) if target.task == "multiclass" else 1}


def open_tables(spec: TrainSpec) -> Tables:
    """Inventories of all paths of the spec.

    Raises
    ------
    SpecError : for a relative local path inside a Ray job or on several nodes.
    DataError : when a path holds no Parquet, or files of train, valid and test overlap.
    """
    data = spec.data
    check_paths([*data.path, *_separate_paths(spec)])
    main = _inventory(spec, data.path)
    separate = {}
    for name in ("valid", "test"):
        part = getattr(spec.split, name)
        if part and part.path:
            separate[name] = _inventory(spec, part.path)
            if both := separate[name].overlap(main):
                raise DataError(f"split.{name}.path names files that are trained on; keep them apart", both[:20])
    if len(separate) == 2 and (both := separate["valid"].overlap(separate["test"])):
        # Rows that stop the training are no measure of it.
        raise DataError("split.valid.path and split.test.path name the same files; keep them apart", both[:20])
    tables = Tables(main, separate)
    check_visible(tables)
    return tables


def prepare(spec: TrainSpec, tables: Tables, cache_dir: str | None = None, display: Display | None = None) -> Prepared:
    """Everything that training is given, from one pass over the data.

    Parameters
    ----------
    cache_dir : where remote bytes are kept for later passes.

    Raises
    ------
    DataError : when the columns or rows are not what the spec says.
    SpecError : when parts of the spec do not fit the data's types.
    """
    data, main, shown = spec.data, tables.main, display or Silent()
    where = ", ".join(map(redact, data.path))
    split = split_plan(spec)
    _check_expressions(spec, tables)
    roles = decide_roles(data, main.schema, where, split.columns)
    label = column_of(main.schema.field(roles.label), where)
    _require_everywhere(main, roles)
    features = [column_of(main.schema.field(name), where) for name in roles.features]
    schema = Schema((*features, *(Column(o, "float") for o in (roles.offset,) if o and o not in roles.features)))
    check_types(schema, data)
    for name, apart in tables.separate.items():
        _check_separate(apart, main, schema, roles, ", ".join(map(redact, getattr(spec.split, name).path)))
    plan = PassPlan(main, data, roles, tuple(features), split, cache_dir=cache_dir)
    plan = replace(plan, origins=first_times(plan))
    sums = summarise(plan, run_and_show(shown, plan.rows))
    parts, labels, held_out = _parts(spec, tables, plan, sums, shown)
    if not parts["train"].n_rows:
        raise DataError("the split leaves no rows to train on; look at data.where and split")
    target = decide_target(spec, label, labels)
    indicator = isinstance(spec.model, LinearSpec) and spec.model.missing_indicator
    profiles = sums.profiles()
    _check_target(spec, target, labels)
    encoder = build_plan(data, schema, profiles, missing_indicator=indicator)
    _check_seen(encoder, held_out)
    warnings = float32_warnings(encoder, profiles) if isinstance(spec.model, XGBoostSpec) else []
    if trains_alone(spec):
        warnings.append("quantile and absolute-error objectives are exact on one worker only; it trains on one")
    constant = tuple(prior(target, sums.label_numbers, sums.label_weights))
    return Prepared(roles, parts, target, encoder, profiles, constant, tuple(warnings))


def memory_bytes(spec: TrainSpec) -> int:
    """Memory that Ray is asked for by worker, in bytes; 0 where the spec does not say."""
    return int((spec.train.memory_gb or 0) * 2**30)


def _separate_paths(spec: TrainSpec) -> list[str]:
    return [path for part in (spec.split.valid, spec.split.test) if part and part.path for path in part.path]


def _inventory(spec: TrainSpec, paths: tuple[str, ...]) -> Inventory:
    return take_inventory(paths, options=spec.data.storage_options, types=spec.data.types, run=cluster.run_tasks)


def _check_expressions(spec: TrainSpec, tables: Tables) -> None:
    """Pass when `where` and all slices can be computed on every table; else some would only be at the end."""
    texts = [text for text in (spec.data.where, *spec.slices, *(goal.slice for goal in spec.goals)) if text]
    for expression in map(parse, texts):
        expression.mask(tables.main.schema.empty_table())
        for name, apart in tables.separate.items():
            try:
                expression.mask(apart.schema.empty_table())
            except DataError as e:
                raise DataError(f"split.{name}.path: {e.message}", e.problems) from None


def _require_everywhere(inventory: Inventory, roles: Roles) -> None:
    """A label or weight that is absent from a file would be null there; say which file."""
    problems = [
        f"column {name!r} is absent from {url}"
        for name in (roles.label, roles.weight, roles.group, roles.offset) if name
        for url in inventory.missing(name)[:20]
    ]  # fmt: skip
    if problems:
        raise DataError("files lack a column that every row needs", problems)


def _check_separate(there: Inventory, main: Inventory, schema: Schema, roles: Roles, where: str) -> None:
    """Pass when a table of its own has the columns of the training table, with their types."""
    schema.check(there.schema, where)
    single = [name for name in (roles.label, roles.weight, roles.group) if name]
    if absent := sorted(set(single) - set(there.schema.names)):
        raise DataError(f"{where} lacks the columns {absent} of the training table")
    _require_everywhere(there, roles)
    for name in single:
        found, expected = there.schema.field(name).type, main.schema.field(name).type
        if type_of(found) != type_of(expected):
            raise DataError(f"column {name!r} is {found} in {where}, and {expected} in the training table; cast it")


def _parts(
    spec: TrainSpec, tables: Tables, plan: PassPlan, sums: PassSums, display: Display
) -> tuple[dict[str, Part], ColumnSums, dict[tuple[str, str], frozenset[str]]]:
    """The parts that exist, and over all of them the sums of the label and the held-out categories."""
    parts = {"train": part_of(sums, plan, "train")}
    labels, held_out = sums.labels, dict(sums.held_out)
    if parts["train"].n_rows:
        _check_weighted("train", sums)
    for name in ("valid", "test"):
        if getattr(spec.split, name) is None:
            continue
        there = sums
        if name in tables.separate:
            apart = replace(plan, inventory=tables.separate[name], split=None, only=name)
            there = summarise(apart, run_and_show(display, apart.rows, f"tasks of {name}"))
            parts[name] = part_of(there, apart, name)
            labels = labels + there.labels
            held_out |= there.held_out
        else:
            parts[name] = part_of(sums, plan, name)
        if not parts[name].n_rows:
            raise DataError(f"split.{name} holds no rows; look at what it selects")
        _check_weighted(name, there)
    return parts, labels, held_out


def _check_weighted(part: str, sums: PassSums) -> None:
    """Pass when some row of the part counts; else there is nothing to learn from, to watch or to judge by."""
    if not sums.weights[PARTS.index(part)]:
        raise DataError(f"the weights of the rows of {part} are all zero; expected some above 0 (data.weight)")


def _check_seen(plan: FeaturePlan, held_out: Mapping[tuple[str, str], frozenset[str]]) -> None:
    """Pass when training has seen all held-out categories; else evaluation would refuse them after the training."""
    known = {f.column: set(f.vocabulary) for f in plan.features if f.kind == "categorical" and not f.other}
    problems = []
    for (part, column), found in sorted(held_out.items()):
        if unseen := sorted(found - known.get(column, found)):
            problems.append(
                f"column {column!r} has {len(unseen)} values in {part} that train has not, the first is {unseen[0]!r}"
            )
    if problems:
        raise DataError(
            "data.unseen is 'error', and held-out rows have categories that the training rows lack: choose "
            "'missing' or 'other', or another split", problems
        )  # fmt: skip


def _check_target(spec: TrainSpec, target: Target, labels: ColumnSums) -> None:
    """Pass when the model and the goals can have this target; else it would only be found out at the end."""
    possible = TASK_METRICS[target.task]
    if foreign := sorted({g.metric for g in spec.goals if g.metric.partition("@")[0] not in possible}):
        raise SpecError(
            f"goals: {', '.join(foreign)} are not metrics of the task {target.task!r}: {', '.join(possible)}"
        )
    given = {goal.metric for goal in spec.goals}
    if "pinball" in given and not target.quantiles:
        raise SpecError("goals: pinball is the loss of quantiles; give model.quantiles, or another metric")
    if len(target.classes) > AUC_CLASSES and (never := sorted(given & {"auc", "average_precision"})):
        raise SpecError(
            f"goals: {', '.join(never)} of {len(target.classes)} classes are not computed, of {AUC_CLASSES} at the "
            f"most; choose another metric, e.g. logloss"
        )
    if spec.data.offset and (target.task == "multiclass" or len(target.quantiles) > 1):
        raise SpecError(f"data.offset: a model of several outputs ({target.task}) takes no offset; leave it out")
    if target.task == "ranking":
        check_bounds("relevance", target, labels)
    elif target.task == "regression":
        model = spec.model
        check_bounds(model.objective if isinstance(model, XGBoostSpec) else model.loss, target, labels)


def plan_workers(spec: TrainSpec) -> cluster.Layout:
    """Workers and threads on the cluster as it is.

    Raises
    ------
    ClusterError : when it can never hold them.
    """
    workers = 1 if trains_alone(spec) else spec.train.workers
    return cluster.plan_layout(
        cluster.nodes(),
        workers,
        spec.train.cpus_per_worker,
        memory_per_worker=memory_bytes(spec),
        autoscaler_cpus=cluster.autoscaler_cpus(),
    )


def trains_alone(spec: TrainSpec) -> bool:
    """True where only one worker gives the exact model: leaves that XGBoost would average over workers' quantiles."""
    model = spec.model
    return isinstance(model, XGBoostSpec) and (model.objective in ONE_WORKER_OBJECTIVES or bool(model.quantiles))


def split_plan(spec: TrainSpec) -> SplitPlan:
    """The split of the spec; a ranking is split by its queries, so that none is on both sides."""
    return SplitPlan.of(spec.split, spec.seed, (spec.data.group,) if spec.data.group else spec.data.key)


def check_visible(tables: Tables) -> None:
    """Pass when every node sees local files with the same size.

    Raises
    ------
    DataError : with the nodes that do not, and what they see.
    """
    check_same_sizes({
        store.path: entry.size
        for table in (tables.main, *tables.separate.values())
        for store, entry in zip(table.stores, table.files, strict=True) if store.is_local
    })  # fmt: skip
