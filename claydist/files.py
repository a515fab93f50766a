"""How files are listed, replaced, created and renamed, on local and on remote filesystems.

`storage` is what others use; here are the rules of each system that its promises rest on.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.spec import AbstractFileSystem

from claydist.errors import StorageError

TEMPORARY = ".claydist-tmp"  # names with this end are half-written files, which no listing shows
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class FileInfo:
    """One file: its path relative to the store that listed it, its size in bytes, and a stamp that changes with it.

    The stamp is the etag where there is one, else the time of modification in nanoseconds, as text.
    """

    path: str
    size: int
    stamp: str


def protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    """Schemes that the filesystem serves, e.g. `("s3", "s3a")`."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def stamp(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> str:
    """What changes when a remote file does."""
    for key in ("ETag", "etag", "md5Hash"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    changed = next((entry[key] for key in ("mtime", "LastModified", "last_modified", "updated") if key in entry), None)
    if changed is None:
        with suppress(NotImplementedError):
            changed = fs.modified(entry["name"])
    if isinstance(changed, datetime):
        since = changed.replace(tzinfo=changed.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)
        return str((since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000)
    return str(int(changed * 10**9)) if isinstance(changed, float) else str(changed)


def walk_local(directory: str, below: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[FileInfo]:
    """Files of a directory, links followed except those that lead back up; none when it is absent."""
    try:
        status = os.stat(directory)  # noqa: PTH116
        with os.scandir(directory) as found:
            entries = list(found)
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    for entry in entries if here not in above else ():
        name = below + entry.name
        if entry.is_dir():
            yield from walk_local(entry.path, f"{name}/", (*above, here))
        elif entry.is_file():
            with suppress(FileNotFoundError):  # removed since the directory was read
                status = entry.stat()
                yield FileInfo(name, status.st_size, str(status.st_mtime_ns))
        elif entry.is_symlink():
            raise StorageError(f"expected a file at {entry.path}, found a link to nothing; restore or remove it")


def find_remote(fs: AbstractFileSystem, path: str) -> Iterator[FileInfo]:
    """Files below `path`; none when it is absent."""
    root = path.strip("/") + "/"
    for found, entry in fs.find(path, detail=True).items():
        name = found.lstrip("/")
        if name.startswith(root) and not name.endswith("/"):  # S3 consoles mark folders with names that end so
            yield FileInfo(name.removeprefix(root), int(entry["size"]), stamp(fs, entry))


def replace_local(path: str, data: bytes) -> None:
    """Put `data` at `path`, parents included: the old file or the new one is there at every moment, also on a crash."""
    with _written_aside(path, data) as temporary:
        os.replace(temporary, path)  # noqa: PTH105
    _sync_directory(path)


@contextmanager
def _written_aside(path: str, data: bytes) -> Iterator[str]:
    """A temporary file in the directory of `path` that holds `data` on the disk, removed at the end if still there."""
    parent = Path(path).parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with temporary.open("xb") as file:
            _write_through(file, data)
        yield str(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: str) -> None:
    """Make a new name in the directory of `path` outlive a power cut, where the filesystem can say so."""
    with suppress(OSError):
        descriptor = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def create_local(path: str, data: bytes) -> bool:
    """True when `path` is new and holds `data`."""
    with _written_aside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost and then finds its own link.
            return Path(temporary).stat().st_nlink == 2
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, data)
    _sync_directory(path)
    return True


def _create_without_links(path: str, data: bytes) -> bool:
    """True when `path` is new; for filesystems without hard links, where a crash can leave a part."""
    try:
        file = Path(path).open("xb")  # noqa: SIM115  only opening decides who was first
    except FileExistsError:
        return False
    try:
        with file:
            _write_through(file, data)
    except OSError:
        Path(path).unlink()
        raise
    return True


def _write_through(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def create_remote(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """True when `path` is new and holds `data`."""
    is_s3 = "s3" in protocols(fs)
    token = uuid.uuid4().hex
    for attempt in range(6):
        try:
            fs.pipe_file(path, data, mode="create", **({"Metadata": {"writer": token}} if is_s3 else {}))
        except Exception as e:
            code = _condition_code(e)
            if code == "ConditionalRequestConflict" and attempt < 5:
                time.sleep(0.05 * 2**attempt)  # S3 says this while another creation is under way
                continue
            if not isinstance(e, FileExistsError) and code != "PreconditionFailed":
                raise
            if is_s3:
                # s3fs repeats a put whose answer was lost and then finds its own object.
                return fs.exists(path) and fs.metadata(path).get("writer") == token
            if not fs.isfile(path):
                raise
            return False
        else:
            return True
    raise AssertionError("the last attempt returns or raises")


def _condition_code(error: Exception) -> str | None:
    """S3's code of the error; not every S3 says in it which condition failed, which is all that s3fs looks for."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None


def rename_local(path: str, target: str) -> bool:
    """True when `path` has become `target`, in one step; False when `target` is a directory with something in it."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(path, target)  # noqa: PTH105
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    _sync_directory(target)
    _sync_directory(path)
    return True


def rename_remote(fs: AbstractFileSystem, path: str, target: str) -> bool:
    """True when all of `path` is at `target` and the old is removed; False when `target` has something in it."""
    if fs.info(path)["type"] != "directory":
        fs.cp_file(path, target)
        fs.rm_file(path)
        return True
    if fs.find(target):
        return False
    root = path.strip("/")
    for source in fs.find(path):
        fs.cp_file(source, target + source.strip("/").removeprefix(root))
    fs.rm(path, recursive=True)
    return True
