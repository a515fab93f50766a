"""Answers: a model's values in the forms that go over HTTP, equal to the columns of `Predictor.predict`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as pat

from claydist.errors import DataError
from claydist.predictor import Target
from claydist.serving.refusals import Refusal
from claydist.serving.shelf import Served

ARROW = b"application/vnd.apache.arrow.stream"
JSON = b"application/json"

# A dictionary is read once, and checked with each batch that refers to it.
_MOST_DECODED_BYTES = 1 << 30


def columns(target: Target, values: np.ndarray) -> dict[str, list[Any]]:
    """The columns of a prediction as lists of plain values; a float32 keeps its value to the last bit."""
    names = target.output_columns
    if target.task == "binary":
        shares = values.tolist()
        negative, positive = target.classes
        return {names[0]: [positive if p >= 0.5 else negative for p in shares], names[1]: shares}
    if target.task == "multiclass":
        labels = [target.classes[k] for k in values.argmax(axis=1).tolist()]
        return dict(zip(names, [labels, *values.T.tolist()], strict=True))
    return dict(zip(names, values.reshape(len(values), -1).T.tolist(), strict=True))


def predictions(served: Served, values: np.ndarray) -> bytes:
    """The body of an answer to plain rows; a number that is not finite is null, since JSON has none."""
    found = columns(served.predictor.target, values)
    names = list(found)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*found.values(), strict=True)]
    return orjson.dumps({**served.identity(), "predictions": rows})


def arrow_predictions(served: Served, parts: list[np.ndarray]) -> bytes:
    """The body of an answer in Arrow: a stream whose schema's metadata names model, version and digest."""
    schema = served.outputs.with_metadata(served.identity())
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as stream:
        for values in parts:
            stream.write_table(pa.table(served.predictor.target.columns(values), schema=schema))
    return sink.getvalue()


def read_rows(served: Served, body: bytes | bytearray, max_rows: int) -> Any:
    """The RowMatrix of a JSON body `{"rows": [...]}`.

    Raises
    ------
    Refusal : 400 for what is no such JSON, 413 for too many rows.
    RowError : for rows that are not the model's.
    """
    tree = parse_json(body)
    if not isinstance(tree, dict) or "rows" not in tree:
        raise Refusal(400, 'expected a JSON object {"rows": [{column: value, ...}, ...]}', field="rows")
    if unknown := sorted(str(key)[:40] for key in tree if key != "rows"):
        raise Refusal(400, f"unknown keys {unknown[:5]} beside 'rows'", field=unknown[0])
    rows = tree["rows"]
    if not isinstance(rows, list):
        raise Refusal(400, "rows: expected an array of objects", field="rows")
    if len(rows) > max_rows:
        raise Refusal(413, f"{len(rows)} rows; this server takes {max_rows} in one request", field="rows")
    return served.encoder.from_rows(rows)


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON text; a Refusal 400 where it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as e:
        hint = (
            "; NaN and Infinity are not JSON: a missing value is null" if b"NaN" in body or b"Infinity" in body else ""
        )
        raise Refusal(400, f"the body is not JSON: {e.msg} at byte {e.pos}{hint}") from None


def read_arrow(served: Served, body: bytes | bytearray, max_rows: int) -> pa.Table:
    """The table of an Arrow IPC stream: the model's columns alone, checked in every byte.

    Raises
    ------
    Refusal : 400 for a stream that is damaged, compressed, or of other columns; 413 for too many rows.
    """
    try:
        _refuse_compression(body)
        with pa.ipc.open_stream(body) as stream:
            found = stream.schema
            _refuse_views(found)
            served.predictor.schema.check(found, "the Arrow stream")
            wanted = [found.get_field_index(name) for name in served.predictor.schema.names]
        options = pa.ipc.IpcReadOptions(included_fields=wanted)
        with pa.ipc.open_stream(body, options=options) as stream:
            table = pa.Table.from_batches(_checked(stream, max_rows), stream.schema)
        table.validate(full=True)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        said = " ".join(str(e).split())[:200]
        raise Refusal(400, f"the body is not an Arrow IPC stream that can be read: {said}") from None
    if not table.num_rows:
        raise Refusal(400, "expected one row at least, found none")
    return table


def _checked(stream: Any, max_rows: int) -> Iterator[pa.RecordBatch]:
    n_rows = n_bytes = 0
    for batch in stream:
        n_rows += batch.num_rows
        if n_rows > max_rows:
            raise Refusal(413, f"more than {max_rows} rows, which is what this server takes in one request")
        # The size is computed from offsets, which must lie within their buffers.
        batch.validate()
        n_bytes += batch.nbytes
        if n_bytes > _MOST_DECODED_BYTES:
            raise Refusal(
                413,
                f"the batches are more than {_MOST_DECODED_BYTES >> 20} MB with their dictionaries; send fewer batches",
            )
        batch.validate(full=True)
        yield batch


def _refuse_views(schema: pa.Schema) -> None:
    """A Refusal for columns of views: many of them may show the same bytes, which any copy writes out for each."""
    for field in schema:
        kind = field.type.value_type if pat.is_dictionary(field.type) else field.type
        if pat.is_string_view(kind) or pat.is_binary_view(kind):
            raise Refusal(400, f"column {field.name[:80]!r} is {field.type}: send it as string", field=field.name[:80])


def _refuse_compression(body: bytes | bytearray) -> None:
    """A Refusal for compressed buffers: a few bytes of them can claim any size."""
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type in ("record batch", "dictionary") and _is_compressed(message.metadata.to_pybytes()):
            raise Refusal(
                400, "the Arrow stream is compressed; send it uncompressed (IpcWriteOptions(compression=None))"
            )


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message's flatbuffer (Arrow's Message.fbs) has BodyCompression; ValueError where it is cut short."""
    header = _field(metadata, _u32(metadata, 0), 2)
    kind = _field(metadata, _u32(metadata, 0), 1)
    if header is None or kind is None:
        return False
    batch = header + _u32(metadata, header)
    if metadata[kind] == 2:  # a dictionary batch holds its record batch
        inner = _field(metadata, batch, 1)
        if inner is None:
            return False
        batch = inner + _u32(metadata, inner)
    return _field(metadata, batch, 3) is not None


def _field(data: bytes, table: int, index: int) -> int | None:
    """Position of a field of a flatbuffer's table; None where it is not set."""
    vtable = table - int.from_bytes(_slice(data, table, 4), "little", signed=True)
    size = int.from_bytes(_slice(data, vtable, 2), "little")
    if 4 + 2 * index >= size:
        return None
    offset = int.from_bytes(_slice(data, vtable + 4 + 2 * index, 2), "little")
    return table + offset if offset else None


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(_slice(data, at, 4), "little")


def _slice(data: bytes, at: int, size: int) -> bytes:
    if at < 0 or at + size > len(data):
        raise ValueError("a message of the stream is cut short")
    return data[at : at + size]


def status_of(error: DataError) -> int:
    """422 for a category that the model refuses to guess about, else 400."""
    text = str(error)
    return 422 if "not seen in training" in text or "training has seen" in text else 400


def finite(values: list[Any]) -> list[Any]:
    """Numbers with the words of JSON Schema-less clients for what is not finite; other values as they are."""
    return [v if not isinstance(v, float) or math.isfinite(v) else _WORDS.get(v, "NaN") for v in values]


_WORDS = {math.inf: "Infinity", -math.inf: "-Infinity"}
