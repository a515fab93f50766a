"""A URL as a place to read and write: local paths, memory, and whatever else fsspec opens.

Two promises hold everything else up: `write` replaces a file whole, and `create` makes a file whole or finds it taken.

| where | `write` | `create` |
|---|---|---|
| local path | temporary file, fsync, `os.replace` | temporary file, fsync, `os.link` |
| memory | one assignment under a lock of the process | the same |
| S3, GCS, Azure | one put (an upload in parts becomes visible as a whole) | the same, if nothing is there |
| other fsspec systems | as atomic as theirs | a look before: two writers at the same moment may both win |

A Store, and not its URL, is what travels to other processes: the URL has lost its credentials.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from claydist.errors import Absent, AlreadyExists, ClaydistError, StorageError
from claydist.files import (
    TEMPORARY,
    FileInfo,
    create_local,
    create_remote,
    find_remote,
    protocols,
    rename_local,
    rename_remote,
    replace_local,
    stamp,
    walk_local,
)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
_INSTALL = {
    **dict.fromkeys(("s3", "s3a"), "pip install s3fs"),
    **dict.fromkeys(("gs", "gcs"), "pip install gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "pip install adlfs"),
}
# s3fs reads ahead 50 MB for every read by default; pyarrow asks for exactly the ranges that it needs.
_DEFAULTS: dict[str, dict[str, Any]] = {scheme: {"default_cache_type": "none"} for scheme in ("s3", "s3a")}
_CHUNK_BYTES = 8 << 20
_SECRET_OPTION = re.compile(r"key|secret|token|pass|credential|sas|auth|connection_string", re.IGNORECASE)
# What stands before the @ of an Azure URL is the container.
_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
_MEMORY_LOCK = threading.RLock()


# Inside Store `list` is the method.
Names: TypeAlias = list[str]
Files: TypeAlias = list[FileInfo]


@dataclass(frozen=True)
class Store:
    """A place, file or directory, on one filesystem; it may be absent. Made by `open_store`.

    Parameters
    ----------
    url : the place for people and messages: an absolute local path, or a URL without its credentials. Two places may
        have the same; `identity` tells them apart.
    fs : the fsspec filesystem, which holds the credentials.
    path : the place in the words of `fs`.
    """

    url: str
    fs: AbstractFileSystem = field(repr=False, compare=False)
    path: str = field(repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """True for a path of this machine."""
        return "file" in protocols(self.fs)

    @property
    def filesystem(self) -> str:
        """A digest of the filesystem and its options, for all processes; fsspec's own token is of one thread."""
        settings = (type(self.fs).__qualname__, self.fs.storage_args, sorted(self.fs.storage_options.items()))
        return sha256(repr(settings).encode())

    @property
    def identity(self) -> tuple[str, str]:
        """What tells this place from every other, in any process; the path may hold credentials."""
        return self.filesystem, self.path

    def resolved(self) -> Store:
        """The same place with links followed, on local paths."""
        if not self.is_local:
            return self
        real = os.path.realpath(self.path)
        return Store(real, self.fs, real)

    def join(self, *parts: str) -> Store:
        """The place below this one.

        Raises
        ------
        StorageError : when a part is empty, absolute, or leads upwards.
        """
        for part in parts:
            if not part or "\0" in part or any(step in ("", ".", "..") for step in part.split("/")):
                raise StorageError(
                    f"expected a name below {self.url}, found {part!r}; leave out '..' and '/' at its ends"
                )
        below = "/".join(parts)
        return Store(f"{self.url.rstrip('/')}/{below}", self.fs, f"{self.path.rstrip('/')}/{below}") if parts else self

    def says(self, error: Exception) -> str:
        """What an error of this place says, in one line and without credentials."""
        return redact(_reason(error), self.fs.storage_options)

    def may_raise(self, error: Exception) -> bool:
        """True for what the place itself raises, false for a mistake of ours, which keeps its traceback.

        botocore, aiohttp, google.auth and azure each have a tree of errors, none of which is there for sure.
        """
        return isinstance(error, (OSError, pa.ArrowException)) or not self.is_local

    def exists(self) -> bool:
        """True when a file or directory is there; a place that cannot be looked at is an error, and not absent."""
        return self._type() is not None

    def is_dir(self) -> bool:
        """True when a directory is there (on object stores: when anything is below)."""
        return self._type() == "directory"

    def read(self) -> bytes:
        """Content of the file.

        Raises
        ------
        Absent : when nothing is there.
        StorageError : when it cannot be read.
        """
        with self._doing("read") as fs:
            return cast(bytes, fs.cat_file(self.path))

    def read_json(self) -> Any:
        """The value that the file holds as JSON; the errors of `read`, and StorageError when it is not JSON."""
        data = self.read()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise StorageError(f"expected JSON in {self.url}, found something else ({e}); the file is damaged") from e

    def open(self) -> BinaryIO:
        """The file, opened for reading bytes at any position; the caller closes it."""
        with self._doing("read") as fs:
            if "memory" in protocols(fs):
                return io.BytesIO(fs.cat_file(self.path))  # memory's own file has one position for all its readers
            return cast(BinaryIO, fs.open(self.path, "rb"))

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """Filesystem and path for pyarrow's readers and writers."""
        with self._doing("read") as fs:
            return (pafs.LocalFileSystem() if self.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(fs))), self.path

    def write(self, data: bytes) -> None:
        """Put `data` there, parents included; readers see the old file or the new one, each whole."""
        with self._doing("write") as fs:
            if self.is_local:
                replace_local(self.path, data)
            else:
                fs.pipe_file(self.path, data)

    def create(self, data: bytes) -> None:
        """Put `data` there, parents included, if nothing is there; no reader ever sees a part of it.

        Raises
        ------
        AlreadyExists : when a file is there, or another creator was first.
        """
        with self._doing("create") as fs:
            if not (create_local(self.path, data) if self.is_local else create_remote(fs, self.path, data)):
                raise AlreadyExists(f"expected nothing at {self.url}, found a file; somebody else was first")

    def list(self) -> Names:
        """Names of what is directly inside, sorted; empty when the place is absent or a file."""
        with self._doing("list") as fs, suppress(FileNotFoundError, NotADirectoryError):
            if self.is_local:
                names = [entry.name for entry in Path(self.path).iterdir()]
            else:
                root = self.path.strip("/")
                found = (str(entry).strip("/") for entry in fs.ls(self.path, detail=False))
                names = [entry.rpartition("/")[2] for entry in found if entry != root]
            return sorted({name for name in names if not name.endswith(TEMPORARY)})
        return []

    def files(self) -> Files:
        """Every file inside, at any depth, sorted by path; empty when the place is absent or a file."""
        with self._doing("list") as fs:
            found = walk_local(self.path) if self.is_local else find_remote(fs, self.path)
            return sorted((f for f in found if not f.path.endswith(TEMPORARY)), key=lambda f: f.path)

    def glob(self, pattern: str) -> Files:
        """Files inside whose relative path matches, and all files of directories that match, sorted by path.

        Parameters
        ----------
        pattern : relative to this store; `*` and `?` stay within one part, `**` spans parts, `[ab]` is one of a set.
        """
        matches = glob_matcher(pattern, self.url)
        return [f for f in self.files() if matches(f.path)]

    def info(self) -> FileInfo:
        """Name, size and stamp of the file; the errors of `read`."""
        with self._doing("read") as fs:
            entry = fs.info(self.path)
            if entry["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            changed = str(Path(self.path).stat().st_mtime_ns) if self.is_local else stamp(fs, entry)
            return FileInfo(self.name, int(entry["size"]), changed)

    def sha256(self) -> str:
        """SHA-256 of the file's content, as hexadecimal text."""
        digest = hashlib.sha256()
        with self.open() as file, self._doing("read"):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def remove(self, recursive: bool = False) -> None:
        """Remove the file, or with `recursive` the directory and all that is inside; absent is an error."""
        with self._doing("remove") as fs:
            is_link = self.is_local and Path(self.path).is_symlink()
            is_dir = not is_link and fs.info(self.path)["type"] == "directory"
            if is_dir and not recursive:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if self.is_local:
                shutil.rmtree(self.path) if is_dir else Path(self.path).unlink()
            else:
                fs.rm(self.path, recursive=is_dir)

    def rename(self, other: Store) -> None:
        """Move file or directory to `other`; a file there is replaced. Atomic on local paths only.

        Elsewhere everything is copied, then removed: a reader may meet a part, and a crash leaves both.

        Raises
        ------
        AlreadyExists : when this is a directory and `other` has something in it.
        StorageError : also when `other` is on another filesystem.
        """
        if type(self.fs) is not type(other.fs):
            raise StorageError(f"cannot move {self.url} to {other.url}, another filesystem; copy it instead")
        with self._doing("move") as fs:
            if not (rename_local(self.path, other.path) if self.is_local else rename_remote(fs, self.path, other.path)):
                raise AlreadyExists(f"expected nothing at {other.url}, found a directory with something in it")

    def _type(self) -> str | None:
        with self._doing("look at") as fs, suppress(FileNotFoundError, NotADirectoryError):
            return str(fs.info(self.path)["type"])
        return None

    @contextmanager
    def _doing(self, verb: str) -> Iterator[AbstractFileSystem]:
        """The filesystem, usable in this process; whatever it raises inside becomes a StorageError."""
        # fsspec's memory is plain dictionaries, and listing one while another thread writes fails.
        with _MEMORY_LOCK if "memory" in protocols(self.fs) else nullcontext():
            try:
                yield _living(self.fs)
            except ClaydistError:
                raise
            except Exception as e:
                if not (isinstance(e, ValueError) or self.may_raise(e)):
                    raise
                is_absent = verb == "read" and isinstance(e, (FileNotFoundError, NotADirectoryError))
                kind = Absent if is_absent else StorageError
                error = kind(f"cannot {verb} {self.url}: {self.says(e)}; {_advice(e)}")
                raise error from (e if self.is_local else None)


def open_store(url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """The store of a local path (made absolute) or of any single fsspec URL; nothing is read yet.

    Parameters
    ----------
    url : e.g. `data/x.parquet`, `s3://bucket/data`, `memory://x`.
    options : passed to the filesystem, e.g. `{"endpoint_url": "http://minio:9000"}`; local paths take none.

    Raises
    ------
    StorageError : when the scheme is unknown, its package is not installed, or it refuses the options.
    """
    text = os.fspath(url)
    scheme = _SCHEME.match(text)
    if not text or "\0" in text:
        raise StorageError(f"expected a path or URL, found {text!r}")
    if scheme is None and not re.match(r"[a-z0-9]+::", text):
        return _open_local(text)
    if scheme is None or "::" in text[: text.rfind("://")]:
        raise StorageError(f"expected a single URL, found the chain {redact(text)!r}; caches may serve what is stale")
    if scheme[1].lower() in _LOCAL:
        return _open_local(text[scheme.end() :])
    return _open_remote(text, scheme[1], options or {})


def split_glob(url: str) -> tuple[str, str | None]:
    """The root before the first part with a wildcard, and the pattern below it (None without a wildcard)."""
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    parts = url[start:].split("/")
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), None)
    if wild is None:
        return url, None
    root = "/".join(parts[:wild]) or ("/" if parts[0] == "" else "" if scheme else ".")
    return url[:start] + root, "/".join(parts[wild:])


def glob_matcher(pattern: str, where: str) -> Callable[[str], bool]:
    """What says whether a path below `where` matches, or one of the directories in it."""
    try:
        matches = re.compile(glob_translate(pattern.strip("/"))).match
    except ValueError as e:
        raise StorageError(f"expected a pattern below {where}, found {pattern!r}: {e}") from e
    return lambda path: any(matches(part) for part in _prefixes(path))


def sha256(data: bytes) -> str:
    """SHA-256 of `data`, as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """`text` without user information and queries of URLs, and without values of options that look secret.

    A container before the @ of an Azure URL stays.
    """
    text = re.sub(r"([A-Za-z0-9+.-]*)://([^/\s'\"]+)@", _redact_user, text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?***", text, flags=re.IGNORECASE)
    for secret in sorted(_secrets(options or {}), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _redact_user(match: re.Match[str]) -> str:
    is_container = match[1].lower() in _CONTAINER_SCHEMES and not set(match[2]) & set(":@")
    return match[0] if is_container else f"{match[1]}://***@"


def _secrets(options: Mapping[str, Any], inherited: bool = False) -> Iterator[str]:
    for key, value in options.items():
        is_secret = inherited or _SECRET_OPTION.search(str(key)) is not None
        if isinstance(value, Mapping):
            yield from _secrets(value, is_secret)
        elif is_secret and isinstance(value, str) and len(value) > 3:
            yield value


def _open_local(path: str) -> Store:
    absolute = os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111  Path.resolve would follow links
    return Store(absolute, fsspec.filesystem("file"), absolute)


def _open_remote(url: str, scheme: str, options: Mapping[str, Any]) -> Store:
    shown = redact(url, options)
    settings = {**_DEFAULTS.get(scheme, {}), **options, "use_listings_cache": False}
    try:
        fs, path = fsspec.url_to_fs(url, **settings)
    except ImportError as e:
        install = _INSTALL.get(scheme, f"install what fsspec needs: {e}")
        raise StorageError(f"cannot open {shown}: the package for {scheme}:// is not installed; {install}") from e
    except ValueError as e:
        if "Protocol not known" not in str(e):
            raise StorageError(f"cannot open {shown}: {redact(str(e), options)}; check storage_options") from None
        known = "a local path, s3://, gs://, abfs:// or another scheme of fsspec's"
        raise StorageError(f"cannot open {shown}: expected {known}, found {scheme}://") from None
    except Exception as e:
        reason = redact(_reason(e), options)
        raise StorageError(f"cannot open {shown}: {reason}; check storage_options and credentials") from None
    bare = path.rstrip("/") or path[:1]
    return Store(shown.rstrip("/") if not shown.endswith("://") else shown, fs, bare)


def _living(fs: AbstractFileSystem) -> AbstractFileSystem:
    """`fs` itself, or after a fork its equal with an event loop of this process."""
    if getattr(fs, "async_impl", False) and getattr(fs, "_pid", None) != os.getpid():
        return type(fs)(*fs.storage_args, **fs.storage_options)
    return fs


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _advice(error: Exception) -> str:
    if isinstance(error, PermissionError) or "redential" in f"{type(error).__name__} {error}":
        return "check permissions and the credentials in the environment"
    if isinstance(error, FileNotFoundError):
        return "check that it exists and is spelt right"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space"
    return "check the URL and storage_options"


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[: n + 1]) for n in range(len(parts)))
