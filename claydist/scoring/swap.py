"""One folder takes the place of another on a local disk, so that a reader sees the old or the new, whole.

Readers that glob `**/*.parquet` find every file below the output that ends so, hidden folders included. So a folder
with files of such names is put together beside the output, and comes in by one rename; where a folder is in its place,
the two are exchanged by one system call. What was replaced stays whole for a moment, for readers that are listing it:
they then open by a path that now leads to the new folder, where names are others, and get a clean not-found.

A folder beside the output may be exchanged at any moment by a publisher that everybody took for dead. So it is removed
in two steps: under the lock it gets a name that nobody exchanges, and then its files go.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
REPLACED = "~replaced"
DEAD = "dead~"


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """The kernel's lock on a file for the length of a block; it ends with the process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def aside(output: Path) -> Path:
    """Where folders are put together: beside the output, on the same filesystem, where no reader of it looks."""
    real = Path(os.path.realpath(output))  # the filesystem is the one that a link leads to
    return real.parent / f".{real.name}.publishing"


def link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the filesystem has no links."""
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def put_in_place(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`; what was there is then at `new`. Under `exclusive`, for it looks first.

    In one step, but for filesystems that cannot exchange folders: there the place is empty for an instant, and
    `mend` brings the old folder back after a crash in between.
    """
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        old = new.with_name(new.name + REPLACED)
        place.rename(old)
        try:
            new.rename(place)
        except OSError:
            old.rename(place)
            raise
        with suppress(OSError):  # the new folder is in place; the next `settle` finds the old one
            old.rename(new)
    sync(place.parent)


def mend(place: Path, beside: Path) -> None:
    """Bring a folder back that a crash has left beside its place. Under `exclusive`."""
    for old in beside.glob(f"{place.name}~*{REPLACED}"):
        if not place.exists():
            old.rename(place)
            sync(place.parent)


def bury(left: Path) -> None:
    """Give a folder beside the output a name under which nobody exchanges it. Under `exclusive`."""
    if not left.name.startswith(DEAD):
        with suppress(FileNotFoundError):
            left.rename(left.with_name(f"{DEAD}{left.name}~{uuid.uuid4().hex[:8]}"))


def remove(left: Path) -> None:
    """Remove what is beside the output, and of which nobody but the caller knows, or which is buried."""
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """Make the names in a directory outlive a power cut, where the filesystem can say so."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """True when the two have changed places in one step; False where the system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
