"""How a date becomes visible: whole, once, and only in the place of what the publisher has seen there.

On a local disk the folder is put together beside the output and changes places with the old one (`swap`); what is
compared and the exchange happen under one lock of the kernel's. On object stores the files get their names first, then
a record of the next number is created exclusively: that is the publication, which `read_scores` follows. The folder's
`_manifest.json` repeats it, and after a crash in between the next run writes it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claydist.errors import AlreadyExists, ClaydistError, DataError, Locked, StorageError
from claydist.scoring import lock, swap
from claydist.scoring.staging import Staged, Staging, each
from claydist.scoring.units import Partition
from claydist.storage import Store, redact

PROTOCOL = 1
"""Number of the format of an output. Raise it when an older claydist would misread what is written now."""

MANIFEST = "_manifest.json"
COMMITS = "_commits"
QUARANTINE = "_quarantine"
GRACE_S = 1.0
"""A reader that began to list a folder before it was replaced has ended by then."""

_ABANDONED_S = 3600.0


@dataclass(frozen=True)
class Current:
    """What is published of a date.

    Attributes
    ----------
    manifest : None when nothing is.
    is_settled : False when a crash has left something for `settle` to finish.
    """

    manifest: Mapping[str, Any] | None
    is_settled: bool = True

    @property
    def identity(self) -> tuple[Any, Any]:
        """What the next publication compares: sequence and publisher."""
        return (0, None) if self.manifest is None else (self.manifest["sequence"], self.manifest["published_by"])


def look(output: Store, folder: str) -> Current:
    """What is published of a date now.

    Raises
    ------
    DataError : when a newer claydist wrote it, or it is damaged.
    """
    in_folder = _read(output.join(folder, MANIFEST))
    if output.is_local:
        beside = swap.aside(Path(output.path))
        is_left = in_folder is None and any(beside.glob(f"{folder}~*{swap.REPLACED}"))
        return Current(in_folder, not is_left)
    records = _records(output, folder)
    committed = _read(output.join(COMMITS, folder, f"{records[-1]:06}.json")) if records else None
    if committed is None:
        return Current(in_folder)
    is_finished = committed == in_folder and set(output.join(folder).list()) == _names(committed)
    return Current(committed, is_finished)


def settle(output: Store, folder: str) -> None:
    """Finish what a crash has left of a date's publication. With the date's lock held."""
    if output.is_local:
        place, beside = Path(output.path) / folder, swap.aside(Path(output.path))
        with _doing(output), swap.exclusive(_kernel_lock(output)):
            swap.mend(place, beside)
        for left in beside.glob(f"{folder}~*"):
            _remove_replaced(left)
        return
    current = look(output, folder)
    if current.manifest is not None and not current.is_settled:
        _finish(output, folder, current.manifest)


def parts(staged: Sequence[Staged], run: str) -> list[dict[str, Any]]:
    """The published files as the manifest has them: those of units with a row, in the order of the input."""
    return [
        {"name": f"part-{unit.unit_id}-{run}.parquet", "unit": unit.unit_id, "rows": unit.stats.n_written,
         "bytes": unit.n_bytes, "sha256": unit.sha256}
        for unit in staged if unit.stats.n_written
    ]  # fmt: skip


def commit(
    output: Store, partition: Partition, staged: Sequence[Staged], run: str, base: Current, manifest: Mapping[str, Any]
) -> Path | None:
    """Publish a date in the place of `base`; gives the folder that was replaced, to be removed after GRACE_S.

    Parameters
    ----------
    staged : every unit of the date, in order.
    run : in the names of the staged files.
    manifest : without sequence and protocol, which are set here.

    Raises
    ------
    Locked : when something else than `base` is published by now.
    """
    folder = partition.folder
    full = {"protocol": PROTOCOL, "sequence": base.identity[0] + 1, **manifest}
    staging = Staging(output).store
    names = [(staging.join(partition.name(file["unit"], run)), file["name"]) for file in full["files"]]
    _publish_quarantine(output, partition, staged, run)
    if output.is_local:
        replaced = _commit_local(output, folder, names, base, full)
    else:
        replaced = None
        _commit_remote(output, folder, names, full)
    keep = {file["name"] for file in full["quarantine"]}
    for name in output.join(QUARANTINE, folder).list():
        if name not in keep:
            with suppress(StorageError):
                output.join(QUARANTINE, folder, name).remove()
    return replaced


def quarantine_files(staged: Sequence[Staged], run: str) -> list[dict[str, Any]]:
    """The quarantined files as the manifest has them."""
    return [
        {"name": f"part-{unit.unit_id}-{run}.arrow", "rows": unit.stats.n_quarantined, "sha256": unit.quarantine}
        for unit in staged if unit.quarantine
    ]  # fmt: skip


def sweep(output: Store, replaced: Sequence[Path]) -> None:
    """Remove replaced folders, and what dead publishers have left beside the output."""
    if not output.is_local:
        return
    for folder in replaced:
        _remove_replaced(folder)
    beside = swap.aside(Path(output.path))
    with suppress(OSError):
        for left in beside.iterdir():
            if not left.name.endswith(swap.REPLACED) and time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        with swap.exclusive(_kernel_lock(output)):
            beside.rmdir()  # fails when another run is publishing


def _remove_replaced(folder: Path) -> None:
    """Remove a folder GRACE_S after it was replaced: moving it has set its ctime."""
    with suppress(FileNotFoundError):
        age = time.time() - folder.stat().st_ctime
        time.sleep(min(max(0.0, GRACE_S - age), GRACE_S))
    shutil.rmtree(folder, ignore_errors=True)


def _commit_local(
    output: Store, folder: str, names: Sequence[tuple[Store, str]], base: Current, manifest: Mapping[str, Any]
) -> Path | None:
    beside = swap.aside(Path(output.path))
    new = beside / f"{folder}~{manifest['published_by']}"
    try:
        with _doing(output):
            with swap.exclusive(_kernel_lock(output)):
                new.mkdir(parents=True)
            for source, name in names:
                swap.link(Path(source.path), new / name)
            Store(str(new), output.fs, str(new)).join(MANIFEST).write(_to_bytes(manifest))
            with swap.exclusive(_kernel_lock(output)):
                _compare(look(output, folder), base, output, folder)
                swap.put_in_place(new, Path(output.path) / folder)
    except ClaydistError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return new if new.exists() else None


def _commit_remote(output: Store, folder: str, names: Sequence[tuple[Store, str]], manifest: Mapping[str, Any]) -> None:
    each(lambda pair: _copy(pair[0], output.join(folder, pair[1])), names)
    record = output.join(COMMITS, folder, f"{manifest['sequence']:06}.json")
    try:
        record.create(_to_bytes(manifest))
    except AlreadyExists:
        raise _lost(output, folder) from None
    # The number may have been taken, overtaken and removed since we looked.
    if _records(output, folder)[-1] != manifest["sequence"]:
        with suppress(StorageError):
            record.remove()
        raise _lost(output, folder)
    _finish(output, folder, manifest)


def _finish(output: Store, folder: str, manifest: Mapping[str, Any]) -> None:
    """What follows the record of a publication: the manifest, and no file but its own."""
    output.join(folder, MANIFEST).write(_to_bytes(manifest))
    old = [output.join(folder, name) for name in output.join(folder).list() if name not in _names(manifest)]
    records = _records(output, folder)
    if records and records[-1] > manifest["sequence"]:
        return  # a later publication is at work here: what is not ours is its
    old += [output.join(COMMITS, folder, f"{n:06}.json") for n in records if n < manifest["sequence"]]

    def remove(place: Store) -> None:
        with suppress(StorageError):
            place.remove()

    each(remove, old)


def _publish_quarantine(output: Store, partition: Partition, staged: Sequence[Staged], run: str) -> None:
    staging = Staging(output).store
    for unit, file in zip([u for u in staged if u.quarantine], quarantine_files(staged, run), strict=True):
        source = staging.join(partition.quarantine_name(unit.unit_id, run))
        output.join(QUARANTINE, partition.folder, file["name"]).write(source.read())


def _compare(found: Current, base: Current, output: Store, folder: str) -> None:
    if found.identity != base.identity:
        raise _lost(output, folder)


def _lost(output: Store, folder: str) -> Locked:
    return Locked(
        f"{folder} in {output} was published by another run while this one scored it; "
        f"nothing of this run was published: look at what is there, and run again with --replace to publish anew"
    )


def _read(place: Store) -> Mapping[str, Any] | None:
    """The manifest at a place; None when there is none."""
    try:
        tree = place.read_json()
    except StorageError:
        if place.exists():
            raise
        return None
    protocol = tree.get("protocol") if isinstance(tree, dict) else None
    if protocol != PROTOCOL:
        raise DataError(
            f"{place} was written by a newer claydist, or damaged: expected protocol {PROTOCOL}, found {protocol!r}; "
            f"install a newer claydist, or move {place.url.rpartition('/')[0]} away"
        )
    if missing := sorted({"sequence", "published_by", "rows", "quarantined", "files", "state"} - set(tree)):
        raise DataError(f"{place} is damaged: {missing} are absent; move its folder away and score the date again")
    return tree


def _names(manifest: Mapping[str, Any]) -> set[str]:
    """What the folder of a published date holds."""
    return {MANIFEST, *(file["name"] for file in manifest["files"])}


def _records(output: Store, folder: str) -> list[int]:
    return sorted(int(name[:-5]) for name in output.join(COMMITS, folder).list() if name.endswith(".json"))


def _kernel_lock(output: Store) -> Path:
    return Path(output.path) / lock.FOLDER / "publish.flock"


def _copy(source: Store, target: Store) -> None:
    """A copy within the store, which does not travel through this process."""
    try:
        source.fs.cp_file(source.path, target.path)
    # Each store's client has errors of its own, none of which is there for sure.
    except Exception as e:
        reason = redact(" ".join(str(e).split()), source.fs.storage_options)
        raise StorageError(f"cannot copy {source} to {target}: {reason}; run again") from None


def _to_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, ensure_ascii=False, indent=1).encode()


@contextmanager
def _doing(output: Store) -> Iterator[None]:
    """What the system says of the output's disk, as an error of ours."""
    try:
        yield
    except OSError as e:
        beside = swap.aside(Path(output.path))
        raise StorageError(
            f"cannot publish in {output}: {e.strerror or e} ({e.filename}); a date is put together in {beside}, on the "
            f"same filesystem, before it comes in by one rename: give an output whose parent can be written to"
        ) from e
