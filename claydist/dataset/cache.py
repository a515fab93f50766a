"""A node's copy of the remote bytes that its workers read, so that later passes do not fetch them again.

What is kept is column chunks, not files: a worker that reads three columns of ten row groups fetches just these, once.
fsspec's own caches keep whole files, or blocks in a map that is not safe among several processes.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from claydist.errors import ClaydistError, StorageError
from claydist.storage import Store

KEEP_FREE_BYTES = 2 << 30
"""The cache leaves so much of the disk free; what does not fit is fetched in every pass."""

Range = tuple[int, int]


@dataclass
class ChunkCache:
    """Reads one remote file through a directory that the workers of a node share.

    Parameters
    ----------
    store : the file.
    directory : of the run; its owner removes it (`shutil.rmtree`).
    size, stamp : of the version that is read; another version is another name.
    """

    store: Store
    directory: Path
    size: int
    stamp: str
    _held: dict[Range, bytes] = field(default_factory=dict, init=False, repr=False)

    def open(self) -> io.RawIOBase:
        """The file, for pyarrow to read at any position."""
        return _CachedFile(self)

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Have these bytes [start, stop) here, fetched together where they are not yet."""
        self._held.clear()
        absent = [span for span in ranges if span[0] < span[1] and not self._name(span).exists()]
        for span, data in zip(absent, self._load(absent), strict=True):
            if not self._keep(span, data):
                self._held[span] = data

    def read(self, span: Range) -> bytes:
        """The bytes [start, stop)."""
        if span in self._held:
            return self._held[span]
        try:
            return self._name(span).read_bytes()
        except FileNotFoundError:
            [data] = self._load([span])
            self._keep(span, data)
            return data

    def _load(self, spans: list[Range]) -> list[bytes]:
        if not spans:
            return []
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        fs = self.store.fs
        try:
            found = fs.cat_ranges([self.store.path] * len(spans), starts, stops, on_error="raise")
        except ClaydistError:
            raise
        except Exception as e:  # every package for a remote store has errors of its own
            said = self.store.says(e)
            raise StorageError(f"cannot read {self.store.url}: {said}; check the connection and run again") from None
        return [bytes(data) for data in found]

    def _keep(self, span: Range, data: bytes) -> bool:
        """Whether the bytes are on the disk now; another worker may put the same there at the same time."""
        # The rows may be nobody else's business.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(self.directory).free - len(data) < KEEP_FREE_BYTES:
            return False
        name = self._name(span)
        temporary = name.with_name(f"{name.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            temporary.replace(name)
        except OSError:  # a full disk makes the run slower, not wrong
            temporary.unlink(missing_ok=True)
            return False
        return True

    def _name(self, span: Range) -> Path:
        version = hashlib.sha256(f"{self.store.identity}\n{self.size}\n{self.stamp}".encode()).hexdigest()[:32]
        return self.directory / f"{version}-{span[0]}-{span[1]}"


class _CachedFile(io.RawIOBase):
    """A file whose every read is one range of the cache; pyarrow reads a column chunk at once."""

    def __init__(self, cache: ChunkCache) -> None:
        self._cache = cache
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._cache.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._cache.size if size < 0 else min(self._at + size, self._cache.size)
        data = self._cache.read((self._at, stop)) if stop > self._at else b""
        self._at += len(data)
        return data


def chunk_ranges(metadata: pq.FileMetaData, row_group: int, columns: Iterable[str]) -> list[Range]:
    """Bytes [start, stop) of the columns' chunks of one row group, nested columns with all their parts."""
    wanted = set(columns)
    group = metadata.row_group(row_group)
    ranges = []
    for chunk in (group.column(i) for i in range(group.num_columns)):
        if chunk.path_in_schema in wanted or chunk.path_in_schema.split(".")[0] in wanted:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            ranges.append((start, start + chunk.total_compressed_size))
    return ranges
