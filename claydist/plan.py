"""What training would do, from footers alone: `claydist plan`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from claydist import cluster
from claydist.dataset.shards import plan_shards
from claydist.features import is_categorical
from claydist.memory import estimate_mb
from claydist.preparation import open_tables, plan_workers, split_plan
from claydist.registry import Registry
from claydist.schema import column_of, decide_roles
from claydist.spec import TrainSpec
from claydist.storage import redact


def make_plan(spec: TrainSpec, registry: Registry) -> dict[str, Any]:
    """Files, rows, features, workers, shards, memory and registry of a training, as a JSON-able mapping.

    Raises
    ------
    ClusterError : when the cluster can never hold the workers.
    DataError : when paths or columns are not what the spec says.
    """
    found, layout = cluster.nodes(), plan_workers(spec)
    inventory = open_tables(spec).main
    paths = [redact(url) for url in spec.data.path]
    where = ", ".join(paths)
    roles = decide_roles(spec.data, inventory.schema, where, split_plan(spec).columns)
    columns = [column_of(inventory.schema.field(name), where) for name in roles.features]
    fields = [inventory.schema.field(name) for name in roles.features]
    shards = plan_shards([entry.row_groups for entry in inventory.files], layout.n_workers)
    return {
        "name": spec.name,
        "kind": spec.model.kind,
        "input": {"paths": paths, "files": len(inventory.files), "rows": inventory.n_rows,
                  "mb": round(inventory.n_bytes / 1e6, 1), "fingerprint": inventory.fingerprint},
        "features": {c.name: "categorical" if is_categorical(c, spec.data) else c.describe() for c in columns},
        "roles": {"label": roles.label, "weight": roles.weight, "offset": roles.offset, "group": roles.group},
        "cluster": {"nodes": len(found), "cpus": sum(n.n_cpus for n in found),
                    "free_cpus": sum(n.n_free_cpus for n in found)},
        "workers": len(shards),
        "threads": layout.n_threads,
        "shards": [sum(piece.stop - piece.start for piece in shard) for shard in shards],
        "memory_mb_per_worker": round(estimate_mb(spec, fields, inventory.n_rows, len(shards))),
        "registry": registry.store.url,
        "champion": registry.alias_version(spec.name),
    }  # fmt: skip


def plan_table(plan: dict[str, Any]) -> Table:
    """The plan as a person reads it."""
    table = Table(f"plan of {plan['name']}", "", show_header=True)
    given = plan["input"]
    kinds = list(plan["features"].values())
    table.add_row("input", f"{given['files']:,} files, {given['rows']:,} rows, {given['mb']:,} MB decoded")
    table.add_row("label", plan["roles"]["label"])
    table.add_row("features", f"{len(kinds)}, {kinds.count('categorical')} of them categorical")
    table.add_row("cluster", f"{plan['cluster']['nodes']} nodes, {plan['cluster']['cpus']} CPUs")
    table.add_row("workers", f"{plan['workers']} of {plan['threads']} threads")
    table.add_row(
        "shards",
        ", ".join(f"{n:,}" for n in plan["shards"][:8]) + (" rows" if len(plan["shards"]) <= 8 else " ... rows"),
    )
    table.add_row("memory", f"about {plan['memory_mb_per_worker']:,} MB a worker")
    champion = "no champion yet" if plan["champion"] is None else f"champion {plan['name']}:{plan['champion']}"
    table.add_row("registry", f"{plan['registry']}, {champion}")
    return table
