"""Which publication of a date holds on an object store, where no folder takes the place of another in one step.

```
_commits/<folder>/000003.json  the manifest of the third publication, created exclusively and never changed
```
The record of the highest number is what is published; the folder's `_manifest.json` repeats it, for readers of the
folder. Who publishes in the place of number 3 creates number 4, which two cannot. A publisher may have died, or sleep
and wake at any moment, after it has copied files and before its record. So nobody removes files that no record names
before a `fence` has taken the number that their publisher would need: it repeats what is published, or says that
nothing is (`void`). The publisher that wakes then finds its number taken, and removes its files itself.

A record that was overtaken stays until all that it alone names is removed: it is the list of what is left to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from claydist.errors import AlreadyExists, ClaydistError, StorageError
from claydist.scoring.manifest import (
    MANIFEST,
    PROTOCOL,
    Manifest,
    part_names,
    quarantine_names,
    read_manifest,
    to_bytes,
)
from claydist.scoring.staging import each
from claydist.storage import Store

COMMITS = "_commits"
QUARANTINE = "_quarantine"
_ASKED, _PAUSE_S = 4, 0.5
_LOOKS = 20


def newest(output: Store, folder: str) -> tuple[Manifest | None, list[int]]:
    """The record that holds (None when there is none), and the numbers of all, the lowest first.

    Raises
    ------
    DataError : when a newer claydist wrote it, or it is damaged.
    StorageError : when what is listed cannot be read.
    """
    for _ in range(_LOOKS):
        names = output.join(COMMITS, folder).list()
        numbers = sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())
        if not numbers:
            return None, []
        if (record := read_manifest(_place(output, folder, numbers[-1]))) is not None:
            return record, numbers
        # Overtaken and removed since: there is a higher number.
    raise StorageError(f"cannot read what is listed in {output.join(COMMITS, folder)}; run again")


def create(output: Store, folder: str, manifest: Manifest) -> bool:
    """True when the manifest's record is there: it is published. False when its number was taken or overtaken.

    Raises
    ------
    StorageError : when it is not known whether the record is there; its files must stay.
    """
    place = _place(output, folder, manifest["sequence"])

    def is_mine() -> bool:
        found, _ = newest(output, folder)  # a fence may repeat it under a higher number
        return found is not None and found["published_by"] == manifest["published_by"]

    try:
        place.create(to_bytes(manifest))
    except StorageError as e:
        # A store whose answer was lost is asked again, and then finds the first attempt's own record.
        if is_mine():
            return True
        if isinstance(e, AlreadyExists):
            return False
        raise
    # The number may have been taken, overtaken and removed since we looked.
    if not _insist(is_mine):
        remove([place])
        return False
    return True


def _insist(ask: Callable[[], bool]) -> bool:
    """The answer of a store that may fail for a moment; its error when it fails for longer."""
    for _ in range(_ASKED - 1):
        with suppress(StorageError):
            return ask()
        time.sleep(_PAUSE_S)
    return ask()


def fence(output: Store, folder: str, current: Manifest | None) -> bool:
    """True when no publisher that saw `current`, or nothing, can publish any more; False when another was first.

    What is published stays the same, under the next number.
    """
    number = 1 if current is None else current["sequence"] + 1
    record = {**(current or _VOID), "sequence": number}
    place = _place(output, folder, number)
    try:
        place.create(to_bytes(record))
    except AlreadyExists:
        return False
    found, _ = newest(output, folder)
    if found is None or found["sequence"] != number:
        remove([place])
        return False
    return True


_VOID: Manifest = {
    "protocol": PROTOCOL, "sequence": 0, "published_by": None, "rows": 0, "quarantined": 0, "files": [],
    "quarantine": [], "state": {}, "void": True,
}  # fmt: skip


def is_void(record: Manifest) -> bool:
    """True for a fence where nothing is published."""
    return bool(record.get("void"))


def finish(output: Store, folder: str) -> str | None:
    """Do what follows a record: the folder's manifest, and the end of what only overtaken records name.

    Anybody may, at any moment. Of several who do, the last one to write leaves the newest manifest, for each looks
    again after it has written.

    Returns
    -------
    Why something could not be removed; None when all is done.

    Raises
    ------
    ClaydistError : when the manifest cannot be written.
    """
    place = output.join(folder, MANIFEST)
    old = [_read_or_none(place)]
    written = None
    record, numbers = newest(output, folder)
    while record is not None and record != written:
        if not is_void(record):
            place.write(to_bytes(record))
        written = record
        record, numbers = newest(output, folder)
    if record is None:
        return None
    overtaken = [number for number in numbers if number < record["sequence"]]
    old += each(lambda number: _read_or_none(_place(output, folder, number)), overtaken)
    before = [one for one in old if one is not None and one["sequence"] < record["sequence"]]
    files = {name for one in before for name in part_names(one)} - part_names(record)
    bad = {name for one in before for name in quarantine_names(one)} - quarantine_names(record)
    left = [output.join(folder, name) for name in files] + [output.join(QUARANTINE, folder, name) for name in bad]
    return remove(left) or remove([_place(output, folder, number) for number in overtaken])


def remove(places: Sequence[Store]) -> str | None:
    """Remove files, some of which may be gone; gives why one of them could not be."""

    def without(place: Store) -> str | None:
        try:
            place.remove()
        except StorageError as e:
            with suppress(StorageError):
                return str(e) if place.exists() else None
            return str(e)
        return None

    said: Sequence[str | None] = each(without, places)
    return next((text for text in said if text), None)


def _read_or_none(place: Store) -> Manifest | None:
    """A manifest that only says what may be removed: without it that stays, and the next `settle` finds it."""
    with suppress(ClaydistError):
        return read_manifest(place)
    return None


def _place(output: Store, folder: str, number: int) -> Store:
    return output.join(COMMITS, folder, f"{number:06}.json")
