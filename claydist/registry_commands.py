"""`claydist models`, `runs` and `report`: what the registry knows; none of them needs Ray."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from claydist.bundle import check_golden, read_bundle, read_manifest
from claydist.errors import SpecError
from claydist.output import AsJson, Output, RegistryUrl
from claydist.registry import open_registry, parse_ref
from claydist.runs import list_runs, show_run

models_app = typer.Typer(no_args_is_help=True, help="Versions in the registry: list, show, promote, roll back, verify.")
runs_app = typer.Typer(no_args_is_help=True, help="What was run from this registry, how far it came and why it ended.")


@models_app.command("list")
def models_list(as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """All models, their versions and aliases. Example: `claydist models list`."""
    opened = open_registry(registry)
    table = Table("model", "versions", "champion")
    rows = []
    for name in opened.models():
        versions, champion = opened.versions(name), opened.alias_version(name)
        rows.append({"model": name, "versions": versions, "champion": champion})
        table.add_row(name, ", ".join(map(str, versions)), str(champion or "none"))
    Output(as_json).result({"registry": opened.store.url, "models": rows}, table if rows else "no models yet")


@models_app.command("show")
def models_show(ref: str, as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """Everything that a version's manifest says. Example: `claydist models show flight-delay:3`."""
    found = open_registry(registry).resolve(ref)
    manifest = read_manifest(found.store)
    manifest.pop("golden", None)
    Output(as_json).result({"uri": found.store.url, **manifest}, json.dumps(manifest, indent=1, ensure_ascii=False))


@models_app.command("promote")
def models_promote(
    ref: str,
    alias: Annotated[str, typer.Option("--alias", help="The alias to move.")] = "champion",
    why: Annotated[str, typer.Option("--why", help="The reason, kept in the history.")] = "",
    as_json: AsJson = False,
    registry: RegistryUrl = None,
) -> None:
    """Move an alias to a version. Example: `claydist models promote flight-delay:3 --why "lower log loss"`."""
    parsed = parse_ref(ref)
    if parsed.url is not None:
        # A bundle elsewhere names itself; this registry's version of that name is another one.
        raise SpecError(f"expected NAME:VERSION of the registry to promote, found the URL or path {ref!r}")
    opened = open_registry(registry)
    found = opened.resolve(parsed)
    assert found.version is not None
    move = opened.promote(found.name, found.version, alias=alias, why=why)
    _show_move(found.name, move, as_json)


@models_app.command("rollback")
def models_rollback(
    name: str,
    alias: Annotated[str, typer.Option("--alias", help="The alias to move.")] = "champion",
    why: Annotated[str, typer.Option("--why", help="The reason, kept in the history.")] = "",
    as_json: AsJson = False,
    registry: RegistryUrl = None,
) -> None:
    """Move an alias back to the version before. Example: `claydist models rollback flight-delay`."""
    _show_move(name, open_registry(registry).rollback(name, alias=alias, why=why), as_json)


@models_app.command("history")
def models_history(name: str, as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """Every move of the model's aliases, the oldest first. Example: `claydist models history flight-delay`."""
    moves = [move.to_json() for move in open_registry(registry).history(name)]
    table = Table("when", "alias", "from", "to", "by", "why")
    for move in moves:
        table.add_row(*(str(move[key] or "") for key in ("when", "alias", "from", "to", "by", "why")))
    Output(as_json).result({"model": name, "history": moves}, table if moves else f"{name} was never promoted")


@models_app.command("verify")
def models_verify(ref: str, as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """Check every digest of a version, and its golden rows. Example: `claydist models verify flight-delay`."""
    found = open_registry(registry).resolve(ref)
    bundle = read_bundle(found.store)
    check_golden(bundle)
    tree = {"uri": found.store.url, "digest": bundle.digest, "verified": True}
    Output(as_json).result(tree, f"{found.store.url} is whole, and predicts its golden rows to the last bit")


@runs_app.command("list")
def runs_list(as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """All runs, the newest last. Example: `claydist runs list`."""
    keys = ("id", "kind", "name", "stage", "started_at", "inventory", "error")
    rows = [
        {"state": run.state, **{key: run.facts.get(key) for key in keys}} for run in list_runs(open_registry(registry))
    ]
    lines: list[tuple[Any, ...]] = [("run", "kind", "state", "stage", "started", "inventory")]
    for row in rows:
        started = str(row["started_at"] or "")[:16].replace("T", " ")
        lines.append((row["id"], row["kind"], row["state"], row["stage"], started, (row["inventory"] or "")[:8]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # An id must be copied whole: no table, which a narrow terminal would cut.
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    for at, row in reversed(list(enumerate(rows, start=1))):
        if row["error"]:
            text.insert(at + 1, f"  {row['error'].splitlines()[0][:200]}")
    Output(as_json).result({"runs": rows}, "\n".join(text) if rows else "no runs yet")


@runs_app.command("show")
def runs_show(run_id: str, as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """Everything known of a run. Example: `claydist runs show 20261122T213000-flight-delay-1a2b3c`."""
    found = show_run(open_registry(registry), run_id)
    facts = {**found.facts, "state": found.state}
    Output(as_json).result(facts, json.dumps(facts, indent=1, ensure_ascii=False))


def report(ref: str, as_json: AsJson = False, registry: RegistryUrl = None) -> None:
    """Where a model's report is. Example: `claydist report flight-delay`."""
    found = open_registry(registry).resolve(ref)
    url = found.store.join("report.html").url
    Output(as_json).result({"report": url}, url)


def _show_move(name: str, move: Any, as_json: bool) -> None:
    tree = {"model": name, **move.to_json()}
    text = f"{tree['model']}@{tree['alias']}: {tree['from'] or 'none'} -> {tree['to']}"
    Output(as_json).result(tree, text)
