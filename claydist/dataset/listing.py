"""Which files an input has, and what their paths say of their rows."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from claydist.errors import DataError, StorageError
from claydist.files import FileInfo
from claydist.storage import Store, open_store, redact, split_glob

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
Keys = tuple[tuple[str, str | None], ...]

_KEY = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_ICEBERG = re.compile(r"(?:^|/)metadata/[^/]+\.metadata\.json$")
_DELTA = re.compile(r"(?:^|/)_delta_log/")


@dataclass(frozen=True)
class Found:
    """One file of an input: its place, its path relative to the input's root, size, stamp and Hive keys.

    The path has no credentials, so that a URL signed anew is the same input; it may thus be that of several files.
    """

    store: Store
    path: str
    size: int
    stamp: str
    keys: Keys


def find_files(urls: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Found]:
    """The data files of an input, each once, sorted by their path relative to the input's root.

    The root is the directory that is given, what stands before the first wildcard of a glob, the parent of a file,
    and of several the directory that they share. Hidden and `_`-prefixed names below it and zero-byte files are left
    out.

    Parameters
    ----------
    urls : files, directories and globs, as any URL of fsspec's or local paths.
    options : for fsspec.

    Raises
    ------
    DataError : when a path is absent, holds no data file, or belongs to a Delta or Iceberg table.
    """
    found: dict[tuple[str, str], tuple[Store, FileInfo, Keys]] = {}
    roots = []
    for url in urls:
        root, files = _expand(url, options)
        roots.append(root)
        above = _keys(_trailing_keys(root.path))
        for store, info in files:
            below = info.path.split("/")[:-1]
            found.setdefault(store.identity, (store, info, _join_keys(above, _keys(below), store.url)))
    base = _common(roots)
    placed = [Found(store, _below(store, base), info.size, info.stamp, keys) for store, info, keys in found.values()]
    return sorted(placed, key=lambda f: (f.path, f.store.url, f.store.path))


def is_data(path: str) -> bool:
    """True when neither a file's name nor one of the directories in its path is hidden or begins with `_`."""
    return not any(part[0] in "._" for part in path.split("/"))


def shared_files(one: Iterable[Store], other: Iterable[Store]) -> list[str]:
    """URLs of the files of `one` that are also in `other`, links followed on local paths; sorted."""
    taken = {store.resolved().identity for store in other}
    return sorted(store.url for store in one if store.resolved().identity in taken)


def _expand(url: str, options: Mapping[str, Any] | None) -> tuple[Store, list[tuple[Store, FileInfo]]]:
    """The root of one URL, and its files with paths relative to that root."""
    before, pattern = split_glob(url)
    shown = redact(url)
    if pattern is not None and not (literal := open_store(url, options)).exists():
        root = open_store(before, options)
        files = root.glob(pattern)
    elif (literal := open_store(url, options)).is_dir():
        root, files = literal, literal.files()
    elif literal.exists():
        return _single(literal)
    else:
        raise DataError(f"expected Parquet at {shown!r}, found no such file or directory ({literal.url})")
    _refuse_lakes(root, files)
    data = [f for f in files if f.size and is_data(f.path)]
    if not data:
        said = f"only {len(files)} files that are empty, hidden or begin with '_'" if files else "no file"
        raise DataError(f"expected Parquet files at {shown!r}, found {said} ({literal.url})")
    return root, [(root.join(*f.path.split("/")), f) for f in data]


def _single(store: Store) -> tuple[Store, list[tuple[Store, FileInfo]]]:
    info = store.info()
    if not info.size:
        raise DataError(f"expected a Parquet file at {store.url}, found an empty file")
    return _parent(store), [(store, info)]


def _refuse_lakes(root: Store, files: Iterable[FileInfo]) -> None:
    """Pass unless the files belong to a table whose log, and not whose folder, says which of them count."""
    table = root
    for _ in _trailing_keys(root.path):
        table = _parent(table)
    above = table.list()
    paths = [f.path for f in files]
    kind = None
    if "_delta_log" in above or any(map(_DELTA.search, paths)):
        kind = "Delta"
    elif any(map(_ICEBERG.search, paths)) or _is_iceberg(table):
        kind = "Iceberg"
    elif table.name == "data":
        with suppress(StorageError):  # what is beside the input may be closed to us
            kind = "Iceberg" if _is_iceberg(_parent(table)) else None
    if kind:
        raise DataError(
            f"{root.url} is in a table of {kind}'s, whose folder also holds files that are no longer part of it; "
            f"write the version that you want as plain Parquet, and give that path"
        )


def _is_iceberg(table: Store) -> bool:
    return any(name.endswith(".metadata.json") for name in table.join("metadata").list())


def _parent(store: Store) -> Store:
    # The path of http's filesystem is the whole URL, and its query may have slashes.
    path = store.path.partition("?")[0] if "://" in store.path else store.path
    return Store(store.url.rpartition("/")[0] or "/", store.fs, path.rpartition("/")[0] or "/")


def _trailing_keys(path: str) -> list[str]:
    """The `k=v` parts at the end of a directory's path: a root such as `table/year=2013/month=1` has keys too."""
    parts = path.rstrip("/").split("/")
    n = next((i for i, part in enumerate(reversed(parts)) if not _KEY.fullmatch(part)), len(parts))
    return parts[len(parts) - n :]


def _keys(parts: Iterable[str]) -> Keys:
    """Keys and values that directories' names spell, decoded."""
    matches = [match for part in parts if (match := _KEY.fullmatch(part))]
    return tuple((unquote(m[1]), None if m[2] == HIVE_NULL else unquote(m[2])) for m in matches)


def _join_keys(above: Keys, below: Keys, url: str) -> Keys:
    keys = above + below
    names = [name for name, _ in keys]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"expected each Hive key once in a path, found {twice} more than once in {url}")
    return keys


def _common(roots: Sequence[Store]) -> str | None:
    """The directory that all roots share; None when they are on different filesystems."""
    if len({root.filesystem for root in roots}) > 1:
        return None
    paths = [redact(root.path).rstrip("/") or "/" for root in roots]
    return posixpath.commonpath(paths) if len(paths) > 1 else paths[0]


def _below(store: Store, base: str | None) -> str:
    return store.url if base is None else posixpath.relpath(redact(store.path), base)
