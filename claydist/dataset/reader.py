"""Row groups as Arrow tables: the needed columns only, in the inventory's types, in bounded batches."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pyarrow.types as pat

from claydist.dataset.cache import ChunkCache, chunk_ranges
from claydist.dataset.footers import Inventory
from claydist.dataset.shards import Piece
from claydist.dataset.split import TEST, TRAIN, VALID, SplitPlan, hash_values
from claydist.errors import ClaydistError, DataError, StorageError
from claydist.expressions import parse

BATCH_ROWS = 131_072
BATCH_BYTES = 64 * 2**20
TEXT_BYTES = 16
PART_NUMBERS = {"train": TRAIN, "valid": VALID, "test": TEST}

_parsed = lru_cache(parse)


@dataclass(frozen=True)
class Selection:
    """Which rows count: those where `where` is true and, with a split, those of `part` (train, valid or test)."""

    where: str | None = None
    split: SplitPlan | None = None
    part: str | None = None

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the selection looks at."""
        return _selecting(self.where, self.split if self.part else None)


@dataclass(frozen=True)
class _Scan:
    """The columns of one file, ready to be read by row groups."""

    inventory: Inventory
    file: int
    columns: tuple[str, ...]
    batch_rows: int
    cache_dir: Path | None

    @property
    def url(self) -> str:
        return self.inventory.files[self.file].url

    def tables(
        self, row_groups: Sequence[int], keep: str | None = None, done: Container[int] = ()
    ) -> Iterator[tuple[int, int, pa.Table]]:
        """Row group, number of the first row in the file, and rows.

        Parameters
        ----------
        keep : row groups where this condition holds nowhere are left out.
        done : row groups that the caller has enough of; it may grow meanwhile.

        Raises
        ------
        InputChanged, DataError : the file is another one than the inventory's, or cannot be decoded.
        StorageError : a remote store does not give it.
        """
        self.inventory.check_unchanged(self.file)
        entry = self.inventory.files[self.file]
        firsts = np.concatenate([[0], np.cumsum(entry.row_groups)]).tolist()
        inside = [c for c in self.columns if c in self._schema.names and c not in self.inventory.keys]
        at = "the footer"
        try:
            kept = self._prune(row_groups, keep) if keep else row_groups
            parquet, cache = self._open()
            with parquet:
                for group in kept:
                    at = f"row group {group}"
                    if cache is not None:
                        cache.fetch(chunk_ranges(parquet.metadata, group, inside))
                    first = firsts[group]
                    for batch in self._batches(parquet, group, inside):
                        yield group, first, self._complete(batch, inside)
                        first += batch.num_rows
                        if group in done:
                            break
                    else:
                        self._check_rows(first - firsts[group], group)
        except ClaydistError:
            raise
        except Exception as e:
            store = self.inventory.stores[self.file]
            if not store.may_raise(e):
                raise
            self.inventory.check_unchanged(self.file)
            told = f"cannot read {at} of {self.url}: {store.says(e)[:300]}"
            # What a remote store raised may show the whole URL in its traceback, also where its own text does not.
            if store.is_local or isinstance(e, pa.ArrowException):
                cause = e if store.is_local else None
                raise DataError(f"{told}; write the file anew or leave it out") from cause
            raise StorageError(f"{told}; check the connection and the credentials, and run again") from None

    @property
    def _schema(self) -> pa.Schema:
        return self.inventory.schemas[self.inventory.files[self.file].schema]

    def _open(self) -> tuple[pq.ParquetFile, ChunkCache | None]:
        entry, store = self.inventory.files[self.file], self.inventory.stores[self.file]
        if self.cache_dir is None or store.is_local:
            fs, path = store.arrow()
            remote = not store.is_local
            return pq.ParquetFile(path, filesystem=fs, pre_buffer=remote, page_checksum_verification=True), None
        cache = ChunkCache(store, self.cache_dir, entry.size, entry.stamp)
        # Without pre_buffer pyarrow asks for one column chunk at a time, which is what the cache holds.
        source = pa.PythonFile(cache.open(), mode="r")
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True), cache

    def _check_rows(self, n_rows: int, group: int) -> None:
        """A damaged page can end a column early; pyarrow then just stops."""
        expected = self.inventory.files[self.file].row_groups[group]
        if n_rows != expected:
            raise DataError(f"row group {group} of {self.url}: expected {expected} rows, found {n_rows}; write it anew")

    def _batches(self, parquet: pq.ParquetFile, group: int, inside: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if inside:
            yield from parquet.iter_batches(self.batch_rows, row_groups=[group], columns=list(inside))
            return
        n_rows = self.inventory.files[self.file].row_groups[group]
        for start in range(0, n_rows, self.batch_rows):
            rows = min(self.batch_rows, n_rows - start)
            yield pa.RecordBatch.from_arrays([pa.nulls(rows)], ["no column of the file"])

    def _complete(self, batch: pa.RecordBatch, inside: Sequence[str]) -> pa.Table:
        """The batch with all columns in the types of the inventory; absent ones null, Hive keys constant."""
        schema = self.inventory.schema
        keys = self.inventory.key_values(self.file)
        columns = []
        for name in self.columns:
            kind = schema.field(name).type
            if name in keys:
                columns.append(pa.repeat(keys[name], batch.num_rows))
            elif name not in inside:
                columns.append(pa.nulls(batch.num_rows, kind))
            else:
                column = batch.column(name)
                columns.append(column if column.type == kind else _cast(column, kind))
        return pa.table(columns, schema=pa.schema([schema.field(name) for name in self.columns]))

    def _prune(self, row_groups: Sequence[int], keep: str) -> Sequence[int]:
        """The row groups whose statistics do not rule the condition out."""
        keys = self.inventory.key_values(self.file)
        expression = _parsed(keep)
        own = [name for name in expression.columns if name not in keys]
        # Statistics speak in the types of the file: only where these are the inventory's does the filter mean the same.
        if any(n not in self._schema.names or self._schema.field(n).type != self.inventory.schema.field(n).type
               for n in own):  # fmt: skip
            return row_groups
        guarantee = pc.scalar(True)
        for name, value in keys.items():
            guarantee &= pc.field(name) == value if value.is_valid else pc.field(name).is_null()
        fs, path = self.inventory.stores[self.file].arrow()
        fragment = ds.ParquetFileFormat().make_fragment(path, fs, guarantee, row_groups=list(row_groups))
        schema = self.inventory.schema
        return [group.id for group in fragment.subset(expression.arrow(schema), schema=schema).row_groups]


def batch_rows_of(kinds: Iterable[pa.DataType]) -> int:
    """Rows of a batch of columns of these types: BATCH_ROWS, or fewer where so many take more than BATCH_BYTES."""
    width = sum(kind.bit_width / 8 if pat.is_primitive(kind) else TEXT_BYTES for kind in kinds)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(width, 1))))


def read_pieces(
    inventory: Inventory,
    pieces: Iterable[Piece],
    columns: Sequence[str],
    selection: Selection | None = None,
    *,
    groups: tuple[str, np.ndarray] | None = None,
    batch_rows: int | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[pa.Table]:
    """The selected rows of the pieces, in their order, as tables of at least `batch_rows` rows and fewer than twice so.

    Only the last table may be smaller; no table is empty. Every column is in one chunk and has the inventory's type.

    Parameters
    ----------
    pieces : of `plan_shards` (or `plan_groups`); the ranges count selected rows.
    columns : what the tables hold, in this order; the selection reads what it needs besides.
    selection : which rows count; all, where not given.
    groups : a column and sorted `hash_values`; of the pieces' rows only those of these ranking groups are kept.
    batch_rows : bounds the memory, together with the compressed size of one row group; by the width of the columns
        (`batch_rows_of`) where not given.
    cache_dir : where remote bytes are kept for later passes; local files never are.

    Raises
    ------
    DataError : an unknown column, a value or a page that cannot be read; with file and row group.
    InputChanged : a file is not the one of the inventory.
    """
    chosen = selection or Selection()
    needed = _needed(inventory, columns, chosen.columns | ({groups[0]} if groups else set()))
    batch_rows = batch_rows or batch_rows_of(inventory.schema.field(name).type for name in needed)
    cache = Path(cache_dir) if cache_dir is not None else None
    pending: list[pa.Table] = []
    n_pending = 0
    for file, run in groupby(pieces, key=lambda piece: piece.file):
        scan = _Scan(inventory, file, needed, batch_rows, cache)
        for table in _selected(scan, list(run), chosen):
            rows = table.filter(pa.array(_among(hash_values(table.column(groups[0])), groups[1]))) if groups else table
            if rows.num_rows:
                pending.append(rows.select(list(columns)))
                n_pending += rows.num_rows
            if n_pending >= batch_rows:
                yield pa.concat_tables(pending).combine_chunks()
                pending, n_pending = [], 0
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def read_parts(
    inventory: Inventory,
    file: int,
    row_groups: Sequence[int],
    columns: Sequence[str],
    where: str | None = None,
    split: SplitPlan | None = None,
    *,
    batch_rows: int | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[tuple[int, np.ndarray, pa.Table]]:
    """Row group, parts (n_rows,) int8 (0 train, 1 valid, 2 test) and rows of each batch, after `where`.

    One read serves all parts. A row group that has no row after `where` may have no batch.

    Raises
    ------
    As `read_pieces`.
    """
    needed = _needed(inventory, columns, _selecting(where, split))
    batch_rows = batch_rows or batch_rows_of(inventory.schema.field(name).type for name in needed)
    scan = _Scan(inventory, file, needed, batch_rows, Path(cache_dir) if cache_dir is not None else None)
    for group, first, table in scan.tables(row_groups, keep=where):
        rows, parts = _assigned(scan, table, first, where, split)
        if rows.num_rows:
            yield group, parts, rows.select(list(columns)).combine_chunks()


def _selected(scan: _Scan, pieces: Sequence[Piece], selection: Selection) -> Iterator[pa.Table]:
    """Rows of the pieces of one file, batch by batch."""
    spans = {piece.row_group: piece for piece in pieces}
    if len(spans) < len(pieces):
        raise AssertionError("a row group stands in one shard once")
    n_seen = dict.fromkeys(spans, 0)
    split = selection.split if selection.part else None
    done: set[int] = set()
    for group, first, table in scan.tables(list(spans), done=done):
        rows, parts = _assigned(scan, table, first, selection.where, split)
        if split is not None and selection.part:
            rows = rows.filter(pa.array(parts == PART_NUMBERS[selection.part]))
        start, stop = (max(0, bound - n_seen[group]) for bound in (spans[group].start, spans[group].stop))
        n_seen[group] += rows.num_rows
        if n_seen[group] >= spans[group].stop:
            done.add(group)
        yield rows.slice(start, max(0, stop - start))
    short = {group: n for group, n in n_seen.items() if n < spans[group].stop}
    if short:
        raise DataError(f"{scan.url}: expected more selected rows in its row groups, found only {short}")


def _assigned(
    scan: _Scan, table: pa.Table, first: int, where: str | None, split: SplitPlan | None
) -> tuple[pa.Table, np.ndarray]:
    """The rows where `where` is true, and their parts."""
    numbers = None
    try:
        if where is not None:
            mask = _parsed(where).mask(table)
            if not mask.all():
                table, numbers = table.filter(pa.array(mask)), first + np.flatnonzero(mask)
        if split is None:
            return table, np.zeros(table.num_rows, np.int8)
        path = scan.inventory.files[scan.file].path
        return table, split.assign(table, path, first if numbers is None else numbers)
    except pa.ArrowException as e:
        raise DataError(f"cannot select rows of {scan.url}: {e}") from e


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
    return plain if plain.type == kind else plain.cast(kind)


def _among(hashes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Where a hash is in the sorted array."""
    at = np.minimum(np.searchsorted(kept, hashes), len(kept) - 1)
    return kept[at] == hashes if len(kept) else np.zeros(len(hashes), bool)


def _selecting(where: str | None, split: SplitPlan | None) -> frozenset[str]:
    columns = _parsed(where).columns if where is not None else frozenset()
    return columns | split.columns if split is not None else columns


def _needed(inventory: Inventory, columns: Sequence[str], also: Iterable[str]) -> tuple[str, ...]:
    """Every column to read, once; DataError when one is not in the input."""
    if not columns:
        raise AssertionError("a table without columns has no rows: ask for one")
    needed = tuple(dict.fromkeys([*columns, *sorted(also)]))
    if absent := sorted(set(needed) - set(inventory.schema.names)):
        known = ", ".join(sorted(inventory.schema.names))
        raise DataError(f"columns {absent} are not in the input; it has {known}")
    return needed
