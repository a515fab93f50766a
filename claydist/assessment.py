"""A registered model against labelled tables: what `claydist evaluate` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claydist import cluster
from claydist.bundle import read_bundle
from claydist.dataset.footers import take_inventory
from claydist.dataset.statistics import PassPlan, part_of, run_and_show, summarise
from claydist.display import Display, Silent
from claydist.errors import DataError
from claydist.evaluate import EvaluationPlan, evaluate
from claydist.expressions import parse
from claydist.places import check_paths
from claydist.preparation import Tables, check_visible
from claydist.registry import Registry
from claydist.schema import Roles
from claydist.spec import DataSpec
from claydist.storage import redact


def evaluate_reference(
    ref: str,
    paths: Sequence[str],
    registry: Registry,
    *,
    where: str | None = None,
    slices: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Exact metrics of a version on all rows of some tables, as in the JSON of `evaluate`.

    Weights and ranking queries are those of training, where the tables have their columns.

    Raises
    ------
    DataError : when the tables lack the label or a feature, a label is null, or a node does not see a local file.
    """
    shown = display or Silent()
    shown.stage("inventory")
    check_paths(paths)
    found = registry.resolve(ref)
    bundle = read_bundle(found.store)
    predictor, data = bundle.predictor, bundle.manifest["spec"]["data"]
    inventory = take_inventory(paths, options=storage_options or {}, types=data["types"], run=cluster.run_tasks)
    check_visible(Tables(inventory, {}))
    place = ", ".join(map(redact, paths))
    names = inventory.schema.names
    if predictor.target.column not in names:
        raise DataError(f"label column {predictor.target.column!r} is absent from {place}; columns: {', '.join(names)}")
    predictor.schema.check(inventory.schema, place)
    if where:
        parse(where).check(names)
    weight, group = (data[role] if data[role] in names else None for role in ("weight", "group"))
    label = predictor.target.column
    asked = {**data, "path": list(paths), "where": where, "label": {**data["label"], "column": label}}
    roles = Roles((), label, weight, None, group, ())
    plan = PassPlan(inventory, DataSpec.model_validate(asked), roles, only="test")
    shown.stage("statistics")
    part = part_of(summarise(plan, run_and_show(shown, plan.rows)), plan, "test")
    shown.stage("evaluation")
    evaluation = evaluate(
        EvaluationPlan(predictor, part, weight=weight, group=group, slices=tuple(slices)),
        run_and_show(shown, part.counts),
    )
    shown.done()
    return {
        "model": found.name, "version": found.version, "rows": evaluation.n_rows, "metrics": evaluation.metrics,
        "slices": evaluation.slices, "unseen": dict(evaluation.unseen),
    }  # fmt: skip
