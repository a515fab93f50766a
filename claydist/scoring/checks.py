"""What must hold before a row is scored; each failure is one clear error."""

from __future__ import annotations

import socket
import sys
import uuid
from collections.abc import Collection, Iterable, Sequence

from claydist import cluster
from claydist.dataset.footers import Inventory
from claydist.dataset.listing import Found, is_data
from claydist.errors import DataError, SpecError
from claydist.expressions import parse
from claydist.places import check_same_sizes
from claydist.predictor import Predictor
from claydist.scoring.dates import UNDATED, DateRows, DateRule, parse_day
from claydist.scoring.lock import FOLDER as LOCKS
from claydist.scoring.manifest import MANIFEST, Manifest, is_ours, part_names
from claydist.scoring.records import COMMITS, QUARANTINE
from claydist.scoring.reports import FOLDER as REPORTS
from claydist.scoring.staging import FOLDER as STAGING
from claydist.scoring.staging import each
from claydist.spec import ScoreSpec
from claydist.storage import Store, glob_matcher, open_store, redact, split_glob

PUBLISHED = "part-00000-00000000-run.parquet"
"""What a published file's name is like."""

_LISTED = 20
_OWN = (STAGING, LOCKS, COMMITS, QUARANTINE, REPORTS)
"""What is beside the dates in an output; with another `_` in front begins what other writers of tables rely on."""


def check_columns(spec: ScoreSpec, rule: DateRule | None, inventory: Inventory, predictor: Predictor) -> None:
    """Pass when the input has the model's columns, the key, and what `where` and `date` name, in types that fit.

    Raises
    ------
    DataError : with every column that is absent or of a wrong type.
    """
    where, names = ", ".join(map(redact, spec.input)), inventory.schema.names
    predictor.schema.check(inventory.schema, where)
    if absent := sorted(set(spec.key) - set(names)):
        raise DataError(f"key columns {absent} are not in {where}; it has {', '.join(sorted(names))}")
    if taken := sorted(set(spec.key) & set(predictor.target.output_columns)):
        raise DataError(f"key columns {taken} have the names of columns of the prediction; rename them in the input")
    if spec.where is not None:
        parse(spec.where).check(names)
    if rule is not None:
        rule.check(inventory.schema, where)


def check_files(inventory: Inventory, rows: Sequence[DateRows], columns: Sequence[str], what: str) -> None:
    """Pass when the files of a date have the model's columns; in some of them a column may be absent, and is null.

    Raises
    ------
    DataError : when a column is in none of the date's files.
    """
    files = [inventory.files[found.file] for found in rows]
    there = {name for n in {f.schema for f in files} for name in inventory.schemas[n].names}
    there |= {name for f in files for name, _ in f.keys}
    if absent := sorted(set(columns) - there):
        raise DataError(
            f"{what}: columns {absent}, which the model needs, are in none of its files, of which the first is "
            f"{files[0].url}; write them anew with these columns"
        )


def check_apart(spec: ScoreSpec, stores: Iterable[Store], output: Store, folders: Iterable[str]) -> None:
    """Pass when nothing that is published is read as input, now or in the next run.

    Parameters
    ----------
    stores : the files of the input.
    folders : names of folders that dates are published in.

    Raises
    ------
    SpecError : when input and output overlap.
    """
    problems = [f"the input has {s.resolved()}, which is in the output" for s in stores if _is_in(s, output)]
    for url in spec.input:
        before, pattern = split_glob(url)
        root, shown = open_store(before, spec.storage_options), redact(url)
        if pattern is None and root.is_dir() and _is_in(output, root):
            problems.append(f"the output is in the input {shown!r}")
        elif pattern is not None and _is_in(output, root):
            above = f"{root.resolved().path.rstrip('/')}/"
            paths = (output.join(folder, PUBLISHED).resolved().path.removeprefix(above) for folder in folders)
            matches = glob_matcher(pattern, root.url)
            if any(is_data(path) and matches(path) for path in paths):
                problems.append(f"the input {shown!r} would find what is published")
    if problems:
        raise SpecError(f"input and output overlap, the output being {output.url}; keep them apart", problems[:_LISTED])


def check_output(output: Store, rule: DateRule | None) -> None:
    """Pass when the output is absent, empty, or holds nothing but what this program publishes by the same rule.

    Raises
    ------
    DataError : with the names that are foreign.
    """
    foreign = []
    if output.exists() and not output.is_dir():
        raise DataError(f"expected a folder for the output, found a file: {output.url}; give another output")
    for name in output.list():
        if name.startswith(".") or name in _OWN or name == (UNDATED if rule is None else None):
            continue
        key, equals, value = name.partition("=")
        if rule is None or key != rule.folder_key or not equals or parse_day(value) is None:
            foreign.append(name)
    if foreign:
        expected = f"only {UNDATED!r}" if rule is None else f"only folders such as {rule.folder_key}=2026-11-21"
        raise DataError(
            f"the output {output.url} holds what this spec does not publish ({expected}); give an empty or new folder",
            foreign[:_LISTED],
        )


def check_input_visible(found: Iterable[Found]) -> None:
    """Pass when every node sees local input with the same size; nothing is done on one node, or without Ray.

    Raises
    ------
    DataError : with the nodes that do not, and what they see.
    """
    if _has_several_hosts():
        check_same_sizes({f.store.path: f.size for f in found if f.store.is_local})


def check_output_visible(output: Store) -> None:
    """Pass when every node sees what is written to a local output; nothing is done on one node, or without Ray.

    Raises
    ------
    DataError : with the nodes that do not.
    """
    if not output.is_local or not _has_several_hosts():
        return
    probe = output.join(LOCKS, f"probe-{uuid.uuid4().hex}")
    probe.write(b"")
    try:
        blind = sorted({host for host in cluster.run_on_every_node(_host_without, probe) if host})
    finally:
        probe.remove()
    if blind:
        raise DataError(
            f"the output {output.url} is not one folder for all nodes; give a shared folder or a storage URL",
            [f"{probe.url} was written on {socket.gethostname()}, and {host} does not see it" for host in blind],
        )


def _has_several_hosts() -> bool:
    # Asking Ray for its nodes would start it.
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized()) and len({node.address for node in cluster.living_nodes()}) > 1


def _host_without(place: Store) -> str:
    """Name of this host, or "" when it sees the place."""
    return "" if place.exists() else socket.gethostname()


def check_folder(output: Store, folder: str, manifest: Manifest | None) -> None:
    """Pass when a date's folder holds nothing that is not ours, or where that stays when the date is replaced.

    Parameters
    ----------
    manifest : of the date; None when nothing is published, and on a local disk then every file is foreign.

    Raises
    ------
    DataError : with the names that are foreign.
    """
    known = {MANIFEST} if manifest is None else {MANIFEST, *part_names(manifest)}
    found = [name for name in output.join(folder).list() if name not in known]
    if not output.is_local:  # what a crash has left there has our names
        found = [] if manifest else [name for name in found if not is_ours(name)]
    if found:
        what = f"holds files that {MANIFEST} does not name" if manifest else f"holds files and no {MANIFEST}"
        raise DataError(f"{output.join(folder).url} {what}, so they are not ours; move them away", found[:_LISTED])


def find_markers(stores: Iterable[Store], rule: DateRule | None, name: str) -> set[tuple[str, str]]:
    """Identities of the folders of these files, and of those above them, that say that a date's input is complete.

    A file's own folder is looked at, and those above it down to the one whose name gives the date.

    Parameters
    ----------
    name : of the file that says so.
    """
    folders = {folder.identity: folder for store in stores for folder in _marker_folders(store, rule)}
    is_there = each(lambda folder: folder.join(name).exists(), list(folders.values()))
    return {identity for identity, has in zip(folders, is_there, strict=True) if has}


def missing_marker(stores: Iterable[Store], rule: DateRule | None, complete: Collection[tuple[str, str]]) -> str | None:
    """A folder of a date's files that was not complete, by `find_markers`; None when all were."""
    for store in stores:
        folders = _marker_folders(store, rule)
        if not any(folder.identity in complete for folder in folders):
            return folders[0].url
    return None


def _marker_folders(store: Store, rule: DateRule | None) -> list[Store]:
    """The file's folder, then those above it, the last being the lowest whose name is one of the date's keys."""
    keys = () if rule is None else rule.columns
    parents = store.path.split("/")[:-1]
    at = [i for i, part in enumerate(parents) if part.partition("=")[0] in keys and "=" in part]
    n_up = len(parents) - at[-1] if at else 1
    folders, url, place = [], store.url, store.path
    for _ in range(n_up):
        url, place = url.rpartition("/")[0], place.rpartition("/")[0]
        folders.append(Store(url, store.fs, place))
    return folders


def _is_in(inner: Store, outer: Store) -> bool:
    inner, outer = inner.resolved(), outer.resolved()
    return inner.filesystem == outer.filesystem and f"{inner.path}/".startswith(f"{outer.path.rstrip('/')}/")
