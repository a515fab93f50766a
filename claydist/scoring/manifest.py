"""The manifest of a published date, and the names that its files have: only these are ever removed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from claydist.errors import Absent, DataError
from claydist.scoring.staging import Staged
from claydist.storage import Store

Manifest: TypeAlias = Mapping[str, Any]

PROTOCOL = 1
"""Number of the format of an output. Raise it when an older claydist would misread what is written now."""

MANIFEST = "_manifest.json"
_NEEDED = {"sequence", "published_by", "rows", "quarantined", "files", "state"}
# Unit and run, in full: Spark's names begin as ours do.
_OURS = re.compile(r"part-\d{5,}-[0-9a-f]{8}-\d{8}T\d{6}-.+-[0-9a-f]{6}\.(parquet|arrow)")


def parts(staged: Sequence[Staged], run: str) -> list[dict[str, Any]]:
    """The published files as the manifest has them: those of units with a row, in the order of the input.

    Parameters
    ----------
    run : the one that publishes, so that no two publishers of a date ever use the same name.
    """
    return [
        {"name": f"part-{unit.unit_id}-{run}.parquet", "unit": unit.unit_id, "rows": unit.stats.n_written,
         "bytes": unit.n_bytes, "sha256": unit.sha256}
        for unit in staged if unit.stats.n_written
    ]  # fmt: skip


def quarantine_files(staged: Sequence[Staged], run: str) -> list[dict[str, Any]]:
    """The quarantined files as the manifest has them; `run` as in `parts`."""
    return [
        {"name": f"part-{unit.unit_id}-{run}.arrow", "unit": unit.unit_id, "rows": unit.stats.n_quarantined,
         "sha256": unit.quarantine}
        for unit in staged if unit.quarantine
    ]  # fmt: skip


def is_ours(name: str) -> bool:
    """True for a name that `parts` or `quarantine_files` gives."""
    return _OURS.fullmatch(name) is not None


def part_names(manifest: Manifest) -> set[str]:
    """The published files."""
    return {file["name"] for file in manifest["files"]}


def quarantine_names(manifest: Manifest) -> set[str]:
    """The files of quarantined rows."""
    return {file["name"] for file in manifest.get("quarantine", ())}


def read_manifest(place: Store) -> Manifest | None:
    """The manifest at a place; None when there is none.

    Raises
    ------
    DataError : when a newer claydist wrote it, or it is damaged.
    """
    try:
        tree = place.read_json()
    except Absent:
        return None
    protocol = tree.get("protocol") if isinstance(tree, dict) else None
    if protocol != PROTOCOL:
        raise DataError(
            f"{place} was written by a newer claydist, or damaged: expected protocol {PROTOCOL}, found {protocol!r}; "
            f"install a newer claydist, or move {place.url.rpartition('/')[0]} away"
        )
    if missing := sorted(_NEEDED - set(tree)):
        raise DataError(f"{place} is damaged: {missing} are absent; move its folder away and score the date again")
    files = [tree["files"], tree.get("quarantine", [])]
    if not all(
        isinstance(n, list) and all(isinstance(f, dict) and {"name", "rows"} <= set(f) for f in n) for n in files
    ):
        raise DataError(f"{place} is damaged: expected files by name; move its folder away and score the date again")
    return tree


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written."""
    return json.dumps(manifest, ensure_ascii=False, indent=1).encode()
