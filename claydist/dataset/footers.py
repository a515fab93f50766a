"""The inventory of an input: its files, their row groups and their schemas, read from the footers and then frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from claydist.dataset.listing import Found, Keys, find_files, shared_files
from claydist.dataset.unify import key_scalar, key_types, unify
from claydist.errors import Absent, ClaydistError, DataError, InputChanged
from claydist.storage import Store

FILES_PER_TASK = 200
FEW_LOCAL_FILES = 4000
"""Footers of so many local files take half a second in one thread, less than tasks take to start."""

_REMOTE_THREADS = 32
_LISTED = 20


@dataclass(frozen=True)
class FileEntry:
    """One file of an input.

    Attributes
    ----------
    url : where it is, without credentials.
    path : relative to the input's root; names the file in hashes and fingerprints.
    size, stamp : bytes, and what changes when the file does (etag, else time of modification).
    schema : number of its schema in `Inventory.schemas`.
    row_groups : rows of each row group.
    group_bytes : bytes of each row group before compression.
    keys : Hive keys and their values as text; None is null.
    """

    url: str
    path: str
    size: int
    stamp: str
    schema: int
    row_groups: tuple[int, ...]
    group_bytes: tuple[int, ...]
    keys: Keys = ()

    @property
    def n_rows(self) -> int:
        """Number of rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Inventory:
    """An input as it was when its footers were read.

    Attributes
    ----------
    files : sorted by path.
    schemas : the distinct schemas of the files, without Hive keys.
    schema : the one that all rows are read as: the files' columns, then the Hive keys.
    fingerprint : SHA-256 of paths relative to the root, sizes, stamps, row groups and schemas, as hexadecimal text.
    """

    files: tuple[FileEntry, ...]
    schemas: tuple[pa.Schema, ...]
    schema: pa.Schema
    fingerprint: str
    stores: tuple[Store, ...] = field(repr=False, compare=False)

    @property
    def n_rows(self) -> int:
        """Number of rows in all files."""
        return sum(entry.n_rows for entry in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of all row groups before compression."""
        return sum(sum(entry.group_bytes) for entry in self.files)

    @cached_property
    def keys(self) -> dict[str, pa.DataType]:
        """Names and types of the Hive keys."""
        names = dict.fromkeys(name for entry in self.files for name, _ in entry.keys)
        return {name: self.schema.field(name).type for name in names}

    def key_values(self, file: int) -> dict[str, pa.Scalar]:
        """Value of each Hive key in one file; null where its path does not have it."""
        own = dict(self.files[file].keys)
        return {name: key_scalar(own.get(name), kind) for name, kind in self.keys.items()}

    def missing(self, column: str) -> list[str]:
        """URLs of the files that do not have a column, neither inside nor in their path."""
        return [
            entry.url
            for entry in self.files
            if column not in self.schemas[entry.schema].names and column not in dict(entry.keys)
        ]

    def overlap(self, other: Inventory) -> list[str]:
        """URLs of the files that are in both inputs."""
        return shared_files(self.stores, other.stores)

    def check_unchanged(self, file: int) -> None:
        """Pass when a file is still the one that was inventoried.

        Raises
        ------
        InputChanged : when its size or stamp is another, or it is gone.
        """
        entry = self.files[file]
        try:
            now = self.stores[file].info()
        except Absent as e:
            raise InputChanged(f"{entry.url} was in the input when it was listed, and is gone; run again") from e
        if (now.size, now.stamp) != (entry.size, entry.stamp):
            raise InputChanged(
                f"{entry.url} changed while it was in use: expected {entry.size} bytes, stamp {entry.stamp!r}, "
                f"found {now.size} bytes, stamp {now.stamp!r}; run again when nothing writes to it"
            )

    def to_json(self) -> dict[str, Any]:
        """A summary for manifests and reports, without credentials."""
        return {
            "fingerprint": self.fingerprint,
            "n_files": len(self.files),
            "n_rows": self.n_rows,
            "n_bytes": self.n_bytes,
            "schema": {field.name: str(field.type) for field in self.schema},
            "keys": list(self.keys),
        }


@dataclass(frozen=True)
class Footer:
    """What one footer says; or with `problem`, why it cannot be read or used."""

    schema: pa.Schema | None = None
    row_groups: tuple[int, ...] = ()
    group_bytes: tuple[int, ...] = ()
    problem: str = ""


Run = Callable[[Callable[[Sequence[Found]], list[Footer]], Sequence[Sequence[Found]]], Sequence[list[Footer]]]


def take_inventory(
    urls: str | Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
    types: Mapping[str, str] | None = None,
    run: Run | None = None,
) -> Inventory:
    """The inventory of an input.

    A Hive key that is also a column of the files counts as in the path; where the file's own statistics show another
    value, the input is refused.

    Parameters
    ----------
    urls : files, directories and globs of Parquet.
    options : for fsspec.
    types : declared types of Hive keys (`data.types`).
    run : maps a function over lists of files, results in order (`cluster.run_tasks`); threads of this process where
        not given. A few local files are always read here.

    Raises
    ------
    DataError : no such path, no Parquet in it, files that are not Parquet, columns or keys whose types do not agree.
    StorageError : a place cannot be listed.
    """
    found = find_files([urls] if isinstance(urls, str) else list(urls), options)
    (inventory,) = take_inventories([found], types=types, run=run)
    if isinstance(inventory, DataError):
        raise inventory
    return inventory


def take_inventories(
    groups: Sequence[Sequence[Found]], *, types: Mapping[str, str] | None = None, run: Run | None = None
) -> list[Inventory | DataError]:
    """The inventory of each group of files, or why it has none; all footers are read in one pass.

    Groups are as apart as inputs of their own: what is wrong with a file is its group's trouble only.
    """
    footers = iter(_read_all([f for found in groups for f in found], run))
    return [_inventory(found, [next(footers) for _ in found], types or {}) for found in groups]


def declared_types(found: Iterable[Found], types: Mapping[str, str]) -> dict[str, str]:
    """`types`, and for each Hive key without one the type that the values in all these paths have together."""
    inferred = key_types(_key_values(found), {})
    words = {name: "integer" if pat.is_integer(kind) else "string" for name, kind in inferred.items()}
    return {**types, **{name: word for name, word in words.items() if types.get(name) in (None, "category")}}


def _inventory(found: Sequence[Found], footers: Sequence[Footer], types: Mapping[str, str]) -> Inventory | DataError:
    if problems := [f"{f.store.url}: {foot.problem}" for f, foot in zip(found, footers, strict=True) if foot.problem]:
        more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        return DataError(
            "files of the input cannot be used; write them anew, move them out of the input, or name them with '_'",
            [*problems[:_LISTED], *more],
        )
    numbers: dict[pa.Schema, int] = {}
    files = tuple(
        FileEntry(
            f.store.url, f.path, f.size, f.stamp, numbers.setdefault(foot.schema, len(numbers)),
            foot.row_groups, foot.group_bytes, f.keys,
        )
        for f, foot in zip(found, footers, strict=True)
    )  # fmt: skip
    schemas = tuple(numbers)
    try:
        keys = key_types(_key_values(found), types)
        schema = unify(schemas, [(entry.url, entry.schema) for entry in files], skip=keys)
    except DataError as e:
        return e
    for name, kind in keys.items():
        schema = schema.append(pa.field(name, kind))
    return Inventory(files, schemas, schema, _fingerprint(files, schema), tuple(f.store for f in found))


def _key_values(found: Iterable[Found]) -> dict[str, set[str | None]]:
    values: dict[str, set[str | None]] = {}
    for f in found:
        for name, value in f.keys:
            values.setdefault(name, set()).add(value)
    return values


def read_footers(files: Sequence[Found]) -> list[Footer]:
    """The footer of each file, in order; files of the same schema share one object."""
    shared: dict[pa.Schema, pa.Schema] = {}
    return [_read_footer(f, shared) for f in files]


def _read_all(found: Sequence[Found], run: Run | None) -> list[Footer]:
    chunks = [found[i : i + FILES_PER_TASK] for i in range(0, len(found), FILES_PER_TASK)]
    if len(found) <= FEW_LOCAL_FILES and all(f.store.is_local for f in found):
        return read_footers(found)
    if run is not None:
        return [footer for footers in run(read_footers, chunks) for footer in footers]
    with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
        return [footer for footers in pool.map(lambda f: read_footers([f]), found) for footer in footers]


def _read_footer(f: Found, shared: dict[pa.Schema, pa.Schema]) -> Footer:
    try:
        fs, path = f.store.arrow()
        metadata = pq.read_metadata(path, filesystem=fs)
        schema = _bare(metadata.schema.to_arrow_schema())
    except ClaydistError:
        raise
    except Exception as e:
        if not f.store.may_raise(e):
            raise
        return Footer(problem=f"cannot be read as Parquet ({f.store.says(e)[:200]})")
    names = schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        return Footer(problem=f"columns {twice} stand in it more than once")
    if other := [p for name, value in f.keys if name in names and (p := _contradiction(metadata, name, value))]:
        return Footer(problem="; ".join(other))
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return Footer(
        shared.setdefault(schema, schema),
        tuple(group.num_rows for group in groups),
        tuple(group.total_byte_size for group in groups),
    )


def _bare(schema: pa.Schema) -> pa.Schema:
    """Names and types only: pandas' notes, field ids and `not null` say nothing about how to read."""
    return pa.schema([pa.field(f.name, f.type) for f in schema])


def _contradiction(metadata: pq.FileMetaData, name: str, value: str | None) -> str | None:
    """How statistics show that a column holds something else than the path says; None when they do not."""
    columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == name]
    chunks = (metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in columns)
    for statistics in (chunk.statistics for chunk in chunks):
        if statistics is None or not statistics.has_min_max:
            continue
        for held in (statistics.min, statistics.max):
            if not _is_same(held, value):
                return f"the path says {name}={value!r} and column {name!r} inside holds {held!r}"
    return None


def _is_same(held: Any, value: str | None) -> bool:
    if value is None:
        return False
    if isinstance(held, bool) or not isinstance(held, (int, float)):
        return str(held).lower() == value.lower()
    try:
        return bool(held == type(held)(value))
    except ValueError:
        return False


def _fingerprint(files: Sequence[FileEntry], schema: pa.Schema) -> str:
    content = {
        "files": [[f.path, f.size, f.stamp, f.row_groups, f.group_bytes, f.keys] for f in files],
        "schema": [[f.name, str(f.type)] for f in schema],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
