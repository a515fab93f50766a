"""How a date becomes visible: whole, once, and only in the place of what the publisher has seen there.

On a local disk the folder is put together beside the output and changes places with the old one (`swap`); what is
compared and the exchange happen under one lock of the kernel's. On object stores the files get their names first, then
a record of the next number is created exclusively (`records`): that is the publication, which `read_scores` follows.
The folder's `_manifest.json` repeats it, and after a crash in between the next run writes it.

Two owners of a date's lock may be alive at once: one sleeps longer than its lease, and wakes. So the names of published
files hold the publishing run, and whoever loses removes its own files and no others. What a dead or sleeping publisher
has left is removed only after it can no longer go live: on a local disk its folder is first renamed, under the kernel's
lock, and a publisher whose folder is not whole under that lock gives up; on object stores its number is taken first.
"""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claydist.errors import ClaydistError, Locked, StorageError
from claydist.scoring import lock, records, swap
from claydist.scoring.manifest import (
    MANIFEST,
    PROTOCOL,
    Manifest,
    is_ours,
    part_names,
    quarantine_names,
    read_manifest,
    to_bytes,
)
from claydist.scoring.records import QUARANTINE
from claydist.scoring.staging import Staging, each
from claydist.scoring.units import Partition
from claydist.storage import Store, redact

GRACE_S = 1.0
"""A reader that began to list a folder before it was replaced has ended by then."""

_ABANDONED_S = 3600.0
_SETTLES = 20


@dataclass(frozen=True)
class Current:
    """What is published of a date.

    Attributes
    ----------
    record : what says so; None when nothing ever was.
    is_settled : False when a crash has left something for `settle` to finish.
    missing : published files that are not in the folder.
    """

    record: Manifest | None
    is_settled: bool = True
    missing: tuple[str, ...] = ()

    @property
    def manifest(self) -> Manifest | None:
        """None when nothing is published."""
        return None if self.record is None or records.is_void(self.record) else self.record

    @property
    def identity(self) -> tuple[Any, Any]:
        """What the next publication compares: sequence and publisher."""
        return (0, None) if self.record is None else (self.record["sequence"], self.record["published_by"])

    @property
    def damage(self) -> str:
        """Why the date must be scored anew whatever its manifest says; "" when it is whole."""
        return f"files are missing: {', '.join(self.missing)}" if self.missing else ""


@dataclass(frozen=True)
class Committed:
    """A date that is published, and what could be left.

    Attributes
    ----------
    replaced : the folder that it replaced, for `sweep`.
    unfinished : why something that follows the publication was not done; the next run does it.
    """

    replaced: Path | None = None
    unfinished: str | None = None


def look(output: Store, folder: str) -> Current:
    """What is published of a date now.

    Raises
    ------
    DataError : when a newer claydist wrote it, or it is damaged.
    """
    found = _look(output, folder)
    # A date that is replaced between the look at its manifest and at its files lacks nothing.
    while found.missing and (again := _look(output, folder)).identity != found.identity:
        found = again
    return found


def _look(output: Store, folder: str) -> Current:
    in_folder = read_manifest(output.join(folder, MANIFEST))
    if output.is_local:
        beside = swap.aside(Path(output.path))
        is_left = in_folder is None and any(beside.glob(f"{folder}~*{swap.REPLACED}"))
        return Current(in_folder, not is_left, _missing(in_folder, output.join(folder).list()))
    newest, numbers = records.newest(output, folder)
    names = output.join(folder).list()
    current = Current(newest or in_folder, missing=_missing(newest or in_folder, names))
    is_repeated = current.manifest is None or in_folder == current.manifest
    is_settled = is_repeated and len(numbers) <= 1 and not _unnamed(names, current.manifest)
    return Current(current.record, is_settled, current.missing)


def _missing(manifest: Manifest | None, names: Sequence[str]) -> tuple[str, ...]:
    return () if manifest is None else tuple(sorted(part_names(manifest) - set(names)))


def _unnamed(names: Sequence[str], manifest: Manifest | None) -> set[str]:
    """Those of our names that no manifest knows: a publisher has left them, or is at work."""
    known = set() if manifest is None else part_names(manifest) | quarantine_names(manifest)
    return {name for name in names if is_ours(name)} - known


def settle(output: Store, folder: str) -> None:
    """Finish what a crash has left of a date's publication. With the date's lock held.

    Raises
    ------
    StorageError : when the output cannot be changed.
    Locked : when others publish the date all the while.
    """
    if output.is_local:
        _settle_local(output, folder)
        return
    for _ in range(_SETTLES):
        current = look(output, folder)
        if not current.is_settled:
            records.finish(output, folder)
        # Listed before the fence: what a later publisher copies, which knows of the fence, is not among them.
        left = _left(output, folder, current.manifest)
        if not left:
            return
        if records.fence(output, folder, current.record):
            records.remove(left)
            records.finish(output, folder)
            return
    raise _lost(output, folder, current)


def _left(output: Store, folder: str, manifest: Manifest | None) -> list[Store]:
    """Files of ours, of the date and in its quarantine, that no manifest knows."""
    places = (output.join(folder), output.join(QUARANTINE, folder))
    return [place.join(name) for place in places for name in sorted(_unnamed(place.list(), manifest))]


def _settle_local(output: Store, folder: str) -> None:
    beside = swap.aside(Path(output.path))
    with _doing(output), swap.exclusive(_kernel_lock(output)):
        swap.mend(Path(output.path) / folder, beside)
        for left in list(beside.glob(f"{folder}~*")):
            swap.bury(left)
        quarantined = output.join(QUARANTINE, folder)
        unnamed = _unnamed(quarantined.list(), look(output, folder).manifest)
        records.remove([quarantined.join(name) for name in unnamed])


def commit(output: Store, partition: Partition, run: str, base: Current, manifest: Manifest) -> Committed:
    """Publish a date in the place of `base`.

    Parameters
    ----------
    run : in the names of the staged files.
    manifest : without sequence and protocol, which are set here.

    Raises
    ------
    Locked : when something else than `base` is published by now, or another run has taken the date over.
    StorageError : when something could not be written.
    """
    folder, staging = partition.folder, Staging(output).store
    full = {"protocol": PROTOCOL, "sequence": base.identity[0] + 1, **manifest}
    parts = [(staging.join(partition.name(file["unit"], run)), file["name"]) for file in full["files"]]
    quarantined = output.join(QUARANTINE, folder)
    copies = [
        (staging.join(partition.quarantine_name(file["unit"], run)), quarantined.join(file["name"]))
        for file in full["quarantine"]
    ]
    if not output.is_local:
        copies += [(source, output.join(folder, name)) for source, name in parts]
    mine = [target for _, target in copies]
    try:
        _compare(output, folder, base)
        each(lambda pair: _copy(*pair), copies)
        replaced = _exchange(output, folder, parts, base, full) if output.is_local else None
    except ClaydistError as e:
        records.remove(mine)
        if isinstance(e.__cause__, FileNotFoundError):  # nobody else removes what this run has put there
            raise _lost(output, folder, base) from None
        raise
    if output.is_local:
        old = set() if base.manifest is None else quarantine_names(base.manifest) - quarantine_names(full)
        return Committed(replaced, records.remove([quarantined.join(name) for name in old]))
    if not records.create(output, folder, full):
        records.remove(mine)
        raise _lost(output, folder, base)
    # The date is published: nothing that follows makes it fail.
    try:
        return Committed(unfinished=records.finish(output, folder))
    except ClaydistError as e:
        return Committed(unfinished=str(e))


def _exchange(
    output: Store, folder: str, parts: Sequence[tuple[Store, str]], base: Current, manifest: Manifest
) -> Path | None:
    """Put the folder of a date together and have it take the place of the old one, which is given back."""
    new = swap.aside(Path(output.path)) / f"{folder}~{manifest['published_by']}"
    made = Store(str(new), output.fs, str(new))
    try:
        with _doing(output):
            with swap.exclusive(_kernel_lock(output)):
                new.mkdir(parents=True)
            for source, name in parts:
                swap.link(Path(source.path), new / name)
            made.join(MANIFEST).write(to_bytes(manifest))
            with swap.exclusive(_kernel_lock(output)):
                _compare(output, folder, base)
                lost_rows = quarantine_names(manifest) - set(output.join(QUARANTINE, folder).list())
                if lost_rows or set(made.list()) != {MANIFEST, *part_names(manifest)}:
                    raise _lost(output, folder, base)
                swap.put_in_place(new, Path(output.path) / folder)
    except ClaydistError:
        swap.remove(new)
        raise
    return new if new.exists() else None


def check_place(output: Store) -> None:
    """Pass when a date can be put together beside a local output and come in by a rename.

    Raises
    ------
    StorageError : when it cannot.
    """
    if not output.is_local:
        return
    place, beside = Path(output.path), swap.aside(Path(output.path))
    name = f"probe-{uuid.uuid4().hex}"
    with _doing(output), swap.exclusive(_kernel_lock(output)):
        staged, made = place / lock.FOLDER / name, beside / name
        beside.mkdir(parents=True, exist_ok=True)
        try:
            staged.touch()
            swap.link(staged, made)
            made.rename(place / lock.FOLDER / f"{name}-in")
        finally:
            for path in (staged, made, place / lock.FOLDER / f"{name}-in"):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                beside.rmdir()


def sweep(output: Store, replaced: Sequence[Path]) -> None:
    """Remove replaced folders, and what dead publishers have left beside the output."""
    beside = swap.aside(Path(output.path))
    if not output.is_local or not beside.exists():
        return
    with suppress(OSError):
        with swap.exclusive(_kernel_lock(output)):
            for left in list(beside.iterdir()):
                # The exchange renames a folder, which sets its ctime; its mtime is that of its last file.
                is_abandoned = _age(left) > _ABANDONED_S and not left.name.endswith(swap.REPLACED)
                if left in replaced or is_abandoned:
                    swap.bury(left)
        dead = list(beside.glob(f"{swap.DEAD}*"))
        time.sleep(min(max(0.0, GRACE_S - min(map(_age, dead), default=GRACE_S)), GRACE_S))
        for left in dead:
            swap.remove(left)
        with swap.exclusive(_kernel_lock(output)):
            beside.rmdir()  # fails when another run is publishing


def _age(path: Path) -> float:
    """Seconds since something was renamed; 0 when it is gone."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_ctime
    return 0.0


def _compare(output: Store, folder: str, base: Current) -> None:
    if look(output, folder).identity != base.identity:
        raise _lost(output, folder, base)


def _lost(output: Store, folder: str, base: Current) -> Locked:
    how, again = "taken over", "run again"
    with suppress(ClaydistError):
        if look(output, folder).identity[1] != base.identity[1]:
            how, again = "published", "run again with --replace to publish anew"
    return Locked(
        f"{folder} in {output} was {how} by another run while this one scored it; "
        f"nothing of this run was published: look at what is there, and {again}"
    )


def _kernel_lock(output: Store) -> Path:
    return Path(output.path) / lock.FOLDER / "publish.flock"


def _copy(source: Store, target: Store) -> None:
    """A copy within the store; on object stores it does not travel through this process."""
    if source.is_local:
        target.write(source.read())
        return
    try:
        source.fs.cp_file(source.path, target.path)
    # Each store's client has errors of its own, none of which is there for sure.
    except Exception as e:
        reason = redact(" ".join(str(e).split()), source.fs.storage_options)
        is_gone = isinstance(e, FileNotFoundError)
        raise StorageError(f"cannot copy {source} to {target}: {reason}; run again") from (e if is_gone else None)


@contextmanager
def _doing(output: Store) -> Iterator[None]:
    """What the system says of the output's disk, as an error of ours."""
    try:
        yield
    except OSError as e:
        beside = swap.aside(Path(output.path))
        if e.errno == errno.EXDEV:
            raise StorageError(
                f"cannot publish in {output}: it is a volume of its own, and a date is put together in {beside}, which "
                f"must be on the same filesystem, for it comes in by one rename; give a folder inside the volume as "
                f"the output"
            ) from e
        raise StorageError(
            f"cannot publish in {output}: {e.strerror or e} ({e.filename}); a date is put together in {beside}, on the "
            f"same filesystem, before it comes in by one rename: give an output whose parent can be written to"
        ) from e
