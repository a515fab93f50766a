"""Published scores as Arrow tables, by their manifests: each date old or new, whole, whatever happens meanwhile."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from claydist.errors import DataError, SpecError, StorageError
from claydist.scoring.dates import UNDATED, parse_day
from claydist.scoring.publish import Current, look
from claydist.scoring.records import COMMITS
from claydist.storage import Store, open_store

_ATTEMPTS = 20
_PAUSE_S = 0.1


def read_scores(
    url: str, date: str | dt.date | None = None, storage_options: Mapping[str, Any] | None = None
) -> pa.Table:
    """The published rows of a date, or of all dates, in the order of the input; needs no Ray.

    Parameters
    ----------
    url : what `output` is in the spec.
    date : e.g. `2026-11-21`; all dates where not given.
    storage_options : for fsspec.

    Returns
    -------
    The key columns, the columns of a prediction, and the date (date32) under its Hive key, where there is one.

    Raises
    ------
    DataError : when nothing, or not this date, is published there, or it was written by a newer claydist.
    SpecError : when `date` is no date.
    """
    output = open_store(url, storage_options)
    wanted = None if date is None else parse_day(date)
    if date is not None and wanted is None:
        raise SpecError(f"expected a date such as '2026-11-21', found {date!r}")
    folders = published_folders(output)
    if wanted is not None:
        folders = {folder: found for folder, found in folders.items() if found[1] == wanted}
    if not folders:
        what = "nothing" if wanted is None else f"no scores of {wanted}"
        raise DataError(f"{what} is published at {output.url}; look at `claydist runs list`, or score it")
    tables = [read_folder(output, folder, key, day) for folder, (key, day) in folders.items()]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as e:
        raise DataError(f"the dates at {output.url} have columns of different types ({e}); read one date") from None


def published_folders(output: Store) -> dict[str, tuple[str, dt.date | None]]:
    """Folders of published dates in order, with their Hive key and date ("" and None of an undated output)."""
    names = {*output.list(), *output.join(COMMITS).list()}
    found: dict[str, tuple[str, dt.date | None]] = {UNDATED: ("", None)} if UNDATED in names else {}
    for name in sorted(names):
        key, equals, value = name.partition("=")
        if equals and (day := parse_day(value)) is not None:
            found[name] = (key, day)
    if output.is_local:
        return found
    return {name: what for name, what in found.items() if look(output, name).manifest is not None}


def read_folder(output: Store, folder: str, key: str, day: dt.date | None) -> pa.Table:
    """The rows of one date; begun anew when the date is replaced while it is read."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        current = look(output, folder)
        if current.manifest is None:
            continue  # on disks that cannot exchange folders there is nothing for an instant
        try:
            table = _read_files(output, folder, current.manifest)
        except (FileNotFoundError, StorageError, pa.ArrowException, OSError) as e:
            problem: Exception = e
            if not _is_replaced(output, folder, current):
                break
            continue
        return table if day is None else table.append_column(key, pa.repeat(pa.scalar(day, pa.date32()), len(table)))
    else:
        problem = DataError("no manifest was found")
    raise DataError(f"cannot read the scores in {output.join(folder).url}: {problem}; restore them, or score anew")


def _is_replaced(output: Store, folder: str, seen: Current) -> bool:
    return look(output, folder).identity != seen.identity


def _read_files(output: Store, folder: str, manifest: Mapping[str, Any]) -> pa.Table:
    tables = []
    for file in manifest["files"]:
        fs, path = output.join(folder, file["name"]).arrow()
        with pq.ParquetFile(path, filesystem=fs) as parquet:
            table = parquet.read().replace_schema_metadata(None)
        if table.num_rows != file["rows"]:
            raise DataError(f"expected {file['rows']} rows in {file['name']}, found {table.num_rows}")
        tables.append(table)
    return pa.concat_tables(tables) if tables else pa.table({})
