"""A predictor with its report and its facts, as one directory that a person can read and that nothing has to execute.

`write_bundle` puts the payload first and `manifest.json` last, each file exclusively: a directory without a manifest is
no bundle, and a bundle never changes. `read_bundle` reads, checks every byte, and only then builds.
"""

from __future__ import annotations

import base64
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xgboost

from claydist import __version__
from claydist.errors import AlreadyExists, BundleError, ClaydistError
from claydist.predictor import Predictor
from claydist.storage import Store, sha256

PROTOCOL = 1
"""Number of the format of a bundle. To change the format:

1. Raise it by one when an older claydist would misread what is written now; a new key or file that it ignores is fine.
2. Keep `read_manifest` able to bring every older manifest to the new form, one step from each number to the next.
3. Put a bundle of the old number, written by its last release, into `tests/data/bundle-<number>/`, where
   `tests/test_bundle.py` loads it and repeats its golden rows.
4. Say in README's changes which releases read which numbers.
"""

MANIFEST = "manifest.json"
N_GOLDEN = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_OURS = {"seal", "protocol", "created_at", "files"}
# The manifest vouches for itself: the seal is the SHA-256 of its bytes with zeros in the place of the seal.
_SEAL_START = b'{\n "seal": "'
_SEAL_ZEROS = b"0" * 64


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte has been checked.

    Parameters
    ----------
    predictor : built from the bundle's files.
    manifest : what `manifest.json` says.
    digest : SHA-256 of `manifest.json`; it names the bundle, since the manifest has the digests of all files.
    uri : where it was read.
    store : the place, for the files that the predictor does not need.
    """

    predictor: Predictor
    manifest: dict[str, Any] = field(repr=False)
    digest: str
    uri: str
    store: Store = field(repr=False)

    def predict(self, table: pa.Table | pd.DataFrame) -> pa.Table:
        """Predictions, one row for each row of the table; see `Predictor.predict`."""
        return self.predictor.predict(table)

    def read(self, name: str) -> bytes:
        """Checked content of one of the bundle's files, e.g. `profile.json`."""
        return _read_file(self.store, self.manifest, name)


def write_bundle(
    store: Store, predictor: Predictor, *, manifest: Mapping[str, Any], extra_files: Mapping[str, bytes]
) -> str:
    """Write a bundle to a place that has none, and give its digest.

    Parameters
    ----------
    store : the directory; absent, or without files of these names.
    predictor : its `to_files()` are the payload.
    manifest : JSON-able facts (name, version, spec, schema, metrics, goals, golden, ...; versions are added to ours);
        a number that is not finite becomes null.
    extra_files : further files by name, e.g. `report.html`.

    Raises
    ------
    AlreadyExists : when a file is there; what is there stays as it is.
    """
    files = {**predictor.to_files(), **extra_files}
    wrong = sorted(name for name in files if not _NAME.fullmatch(name) or name == MANIFEST)
    assert not wrong, f"not names for files of a bundle: {wrong}"
    assert not _OURS & manifest.keys(), f"write_bundle itself sets {sorted(_OURS & manifest.keys())}"
    if store.join(MANIFEST).exists():
        raise AlreadyExists(f"expected no bundle at {store}, found one; a bundle never changes, choose another place")
    for name, data in sorted(files.items()):
        store.join(name).create(data)
    tree = {
        "seal": _SEAL_ZEROS.decode(),
        "protocol": PROTOCOL,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in sorted(files.items())},
        **manifest,
        "versions": {**versions(), **manifest.get("versions", {})},
    }
    sealed = _seal(_to_json(tree))
    store.join(MANIFEST).create(sealed)
    return sha256(sealed)


def read_bundle(store: Store) -> Bundle:
    """The bundle at a place: read, checked, then built; nothing in it is executed.

    Raises
    ------
    BundleError : when there is no bundle, a byte has changed, a file is absent, or the protocol is another.
    """
    data = _manifest_bytes(store)
    manifest = _checked(data, store)
    files = {name: _read_file(store, manifest, name) for name in manifest["files"]}
    try:
        predictor = Predictor.from_files(files)
    except BundleError as e:
        raise BundleError(f"cannot build the predictor of {store}: {e.message}", e.problems) from e
    return Bundle(predictor, manifest, sha256(data), store.url, store)


def read_manifest(store: Store) -> dict[str, Any]:
    """The checked manifest of the bundle at a place; its files are not read. Raises as `read_bundle`."""
    return _checked(_manifest_bytes(store), store)


def versions() -> dict[str, str]:
    """Versions of claydist, Python and the libraries that a prediction depends on."""
    return {
        "claydist": __version__,
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (np, pa, xgboost)},
    }


def golden_rows(table: pa.Table, predictor: Predictor, n_rows: int = N_GOLDEN) -> dict[str, Any]:
    """Rows and their predictions for the key `golden` of a manifest, exact to the last bit.

    Parameters
    ----------
    table : rows to choose from, with the predictor's columns; rows with nulls and rows spread evenly are chosen.
    n_rows : rows kept at the most.
    """
    features = table.select(predictor.schema.names).combine_chunks().replace_schema_metadata(None)
    chosen = features.take(pa.array(_choose(features, n_rows), pa.int64()))
    return {
        "n_rows": chosen.num_rows,
        "format": "Arrow IPC stream in base64",
        "rows": _to_text(chosen),
        "predictions": _to_text(predictor.predict(chosen, "the golden rows")),
    }


def check_golden(bundle: Bundle) -> None:
    """Pass when the predictor, here and now, gives the golden rows' predictions bit by bit.

    Raises
    ------
    BundleError : with each column that differs, or when the golden rows are absent or cannot be predicted.
    """
    golden = bundle.manifest.get("golden")
    if not isinstance(golden, Mapping):
        raise BundleError(f"expected golden rows in the manifest of {bundle.uri}, found none; train it again")
    try:
        rows, expected = _from_text(golden["rows"]), _from_text(golden["predictions"])
        found = bundle.predictor.predict(rows, "the golden rows")
    except (KeyError, TypeError, ValueError, pa.ArrowException, ClaydistError) as e:
        raise BundleError(f"cannot repeat the golden rows of {bundle.uri}: {e}") from e
    if problems := _differences(expected, found):
        then, now = bundle.manifest.get("versions"), versions()
        raise BundleError(
            f"{bundle.uri} does not repeat its golden rows; written with {then}, read with {now}: "
            f"install what it was written with, or train it again",
            problems,
        )


def _manifest_bytes(store: Store) -> bytes:
    place = store.join(MANIFEST)
    if not place.exists():
        raise BundleError(f"expected a bundle at {store}, found no {MANIFEST}; check the URL, or write it again")
    return place.read()


def _checked(data: bytes, store: Store) -> dict[str, Any]:
    """The manifest in `data`, when it is of this protocol, as it was sealed, and names only files beside it."""
    damaged = f"{store.join(MANIFEST)} is damaged"
    restore = "restore the bundle from a copy, or train it again"
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{damaged}: it is not JSON ({e}); {restore}") from e
    protocol = manifest.get("protocol") if isinstance(manifest, dict) else None
    if type(protocol) is not int or protocol != PROTOCOL:
        raise BundleError(
            f"{store.join(MANIFEST)} was written by a newer claydist, or damaged: "
            f"expected protocol {PROTOCOL}, found {protocol!r}; install a newer claydist, or {restore}"
        )
    if data != _seal(data):
        raise BundleError(f"{damaged}: its bytes are not those that it was sealed with; {restore}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(fact, dict) for fact in files.values()):
        raise BundleError(f"{damaged}: expected the facts of every file under 'files'; {restore}")
    if wrong := sorted(name for name in files if not _NAME.fullmatch(name) or name == MANIFEST):
        raise BundleError(f"{damaged}: names that are not of files beside it: {wrong}; do not use this bundle")
    return manifest


def _to_json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(_plain(tree), ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def _seal(data: bytes) -> bytes:
    """A manifest with the seal that its other bytes ask for, whatever stood in its place."""
    blank = _SEAL_START + _SEAL_ZEROS + data[len(_SEAL_START) + len(_SEAL_ZEROS) :]
    return blank.replace(_SEAL_ZEROS, sha256(blank).encode(), 1)


def _read_file(store: Store, manifest: Mapping[str, Any], name: str) -> bytes:
    fact = manifest["files"].get(name)
    if fact is None:
        raise BundleError(f"no file {name!r} in the bundle {store}; it has {sorted(manifest['files'])}")
    place = store.join(name)
    if not place.exists():
        raise BundleError(f"expected {place}, found nothing; restore the bundle from a copy, or train it again")
    data = place.read()
    if sha256(data) != fact.get("sha256"):
        raise BundleError(
            f"{place} is damaged: expected {fact.get('bytes')} bytes with sha256 {fact.get('sha256')}, found "
            f"{len(data)} with {sha256(data)}; restore the bundle from a copy, or train it again"
        )
    return data


def _plain(value: Any) -> Any:
    """`value` as JSON has it: text keys, lists, no numpy, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _choose(table: pa.Table, n_rows: int) -> list[int]:
    """Indices of the first row with a null in each column, and of rows spread evenly, `n_rows` at the most, sorted."""
    if table.num_rows <= n_rows:
        return list(range(table.num_rows))
    with_nulls = (pc.index(column.is_null(), True).as_py() for column in table.columns if column.null_count)
    chosen = list(dict.fromkeys(with_nulls))[: n_rows // 2]
    even = np.linspace(0, table.num_rows - 1, n_rows - len(chosen), dtype=np.int64)
    return sorted({*chosen, *even.tolist()})


def _to_text(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return base64.b64encode(sink.getvalue()).decode()


def _from_text(text: str) -> pa.Table:
    with pa.ipc.open_stream(base64.b64decode(text, validate=True)) as stream:
        return stream.read_all()


def _differences(expected: pa.Table, found: pa.Table) -> list[str]:
    if expected.schema.names != found.schema.names or expected.num_rows != found.num_rows:
        return [f"expected {expected.num_rows} rows of {expected.schema.names}, "
                f"found {found.num_rows} of {found.schema.names}"]  # fmt: skip
    problems = []
    for name in expected.schema.names:
        before, after = expected.column(name), found.column(name)
        if before.type != after.type:
            problems.append(f"column {name!r}: expected {before.type}, found {after.type}")
        elif rows := [i for i, pair in enumerate(zip(_bits(before), _bits(after), strict=True)) if pair[0] != pair[1]]:
            i = rows[0]
            problems.append(f"column {name!r}: {len(rows)} rows differ, the first is {i}: "
                            f"expected {before[i].as_py()!r}, found {after[i].as_py()!r}")  # fmt: skip
    return problems


def _bits(column: pa.ChunkedArray) -> list[Any]:
    """Values that are equal when their bits are: NaN equals itself, and 0.0 differs from -0.0."""
    if not pa.types.is_floating(column.type):
        return column.to_pylist()
    width = {16: np.uint16, 32: np.uint32, 64: np.uint64}[column.type.bit_width]
    bits = column.fill_null(0).to_numpy().view(width).tolist()
    return [None if null else value for null, value in zip(column.is_null().to_pylist(), bits, strict=True)]
