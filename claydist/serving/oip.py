"""The Open Inference Protocol v2, REST: tensors to columns and back, with its binary tensor extension.

One input per column (shape [n] or [n, 1]), or, where all columns are numbers, one input `input` of shape
[n, n_columns] in the order of the metadata. The binary extension is Triton's: the header
`Inference-Header-Content-Length` says how much of the body is JSON, the tensors follow in the order of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as pat

from claydist import __version__
from claydist.rows import RowMatrix
from claydist.schema import Column
from claydist.serving.answers import columns, finite, parse_json
from claydist.serving.refusals import Refusal
from claydist.serving.shelf import Served

MATRIX = "input"
EXTENSIONS = ["model_versions", "binary_tensor_data"]
MISSING = (
    'JSON: null, or "NaN" in a tensor of numbers; binary: NaN (send numbers with missing values as FP64); '
    'BYTES: null in JSON, or a text that the parameter "missing" of the input or of the request names'
)
_NUMPY: dict[str, type] = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
_NARROW = ("FP16", "FP32")
_DATATYPES = {
    "integer": "INT64", "float": "FP64", "decimal": "FP64", "boolean": "BOOL",
    "string": "BYTES", "date": "BYTES", "timestamp": "BYTES",
}  # fmt: skip
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Inference:
    """What a request asks for.

    Attributes
    ----------
    matrix : the rows.
    outputs : names of the outputs wanted, each with whether in binary; in order.
    id : of the client, None where it gave none.
    parameters : of the request, echoed.
    """

    matrix: RowMatrix
    outputs: tuple[tuple[str, bool], ...]
    id: str | None
    parameters: Mapping[str, Any]


def server_metadata() -> dict[str, Any]:
    """The server's name, version and extensions."""
    return {"name": "claydist", "version": __version__, "extensions": EXTENSIONS}


def model_metadata(served: Served, versions: list[str]) -> dict[str, Any]:
    """The model's tensors, classes, and how a missing value is spelled."""
    target = served.predictor.target
    inputs = [_input_metadata(served, c) for c in served.predictor.schema.columns]
    outputs = [{"name": f.name, "datatype": _output_datatype(f.type), "shape": [-1]} for f in served.outputs]
    parameters: dict[str, Any] = {
        "version": served.version, "digest": served.digest, "task": served.task, "missing": MISSING,
        "unseen": served.predictor.plan.unseen,
    }  # fmt: skip
    if target.classes:
        parameters["classes"] = list(target.classes)
    if served.encoder.takes_matrix:
        n_columns = len(inputs)
        parameters["matrix"] = f"or one input {MATRIX!r} of FP32 or FP64, shape [n, {n_columns}], columns in this order"
    return {
        "name": served.name, "versions": versions, "platform": f"claydist_{served.predictor.model.kind}",
        "inputs": inputs, "outputs": outputs, "parameters": parameters,
    }  # fmt: skip


def parse(
    served: Served, body: bytes | bytearray, header_length: bytes | None, max_rows: int, max_json: int
) -> Inference:
    """What the body of an inference request asks of the model.

    Parameters
    ----------
    header_length : of `Inference-Header-Content-Length`; None where the body is JSON alone.

    Raises
    ------
    Refusal : 400 with the name of the tensor, 413 for too many rows.
    RowError : for values that are not the model's.
    """
    text, binary = _split(body, header_length)
    if len(text) > max_json:
        raise Refusal(413, f"{len(text)} bytes of JSON; this server takes {max_json}: send binary tensors, or Arrow")
    tree = parse_json(bytes(text))
    if not isinstance(tree, dict):
        raise Refusal(400, "expected a JSON object with 'inputs'")
    request_id, inputs = tree.get("id"), tree.get("inputs")
    if request_id is not None and not isinstance(request_id, str):
        raise Refusal(400, "id: expected text", field="id")
    if not isinstance(inputs, list) or not inputs:
        raise Refusal(400, "inputs: expected an array of one tensor at least", field="inputs")
    parameters = _echoed(_parameters(tree, "the request"))
    tensors = _tensors(served, inputs, binary, parameters.get("missing"), max_rows)
    if len(tensors) == 1 and MATRIX in tensors and MATRIX not in served.encoder.names:
        matrix = served.encoder.from_matrix(tensors[MATRIX])
    else:
        matrix = served.encoder.from_columns(tensors)
    return Inference(matrix, _outputs(served, tree, parameters), request_id, parameters)


def respond(served: Served, asked: Inference, values: np.ndarray) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON part where tensors follow it in binary."""
    found = columns(served.predictor.target, values)
    outputs, blobs = [], []
    for name, is_binary in asked.outputs:
        datatype = _output_datatype(served.outputs.field(name).type)
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": [len(values)]}
        if is_binary:
            blob = _to_bytes(found[name], datatype)
            tensor["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            tensor["data"] = _json_values(found[name], datatype)
        outputs.append(tensor)
    echoed = {key: value for key, value in asked.parameters.items() if key != "binary_data_output"}
    tree = {
        "model_name": served.name, "model_version": served.version,
        "parameters": {**echoed, "digest": served.digest}, "outputs": outputs,
    }  # fmt: skip
    if asked.id is not None:
        tree["id"] = asked.id
    text = orjson.dumps(tree)
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


def _input_metadata(served: Served, column: Column) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": column.name, "datatype": _DATATYPES[column.type], "shape": [-1]}
    if column.type in ("date", "timestamp"):
        tensor["parameters"] = {"content_type": f"{column.describe()}, ISO 8601"}
    elif vocabulary := next((f.vocabulary for f in served.predictor.plan.features if f.column == column.name), ()):
        tensor["parameters"] = {"n_categories": len(vocabulary)}
    return tensor


def _output_datatype(kind: pa.DataType) -> str:
    if pat.is_boolean(kind):
        return "BOOL"
    if pat.is_integer(kind):
        return "INT64"
    if pat.is_floating(kind):
        return "FP32" if pat.is_float32(kind) else "FP64"
    return "BYTES"


def _split(body: bytes | bytearray, header_length: bytes | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if header_length is None:
        return view, view[:0]
    if not header_length.isdigit() or len(header_length) > 12 or int(header_length) > len(body):
        raise Refusal(400, f"Inference-Header-Content-Length: expected a number up to {len(body)}, the body's length")
    return view[: int(header_length)], view[int(header_length) :]


def _parameters(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = tree.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise Refusal(400, f"parameters of {where}: expected an object", field="parameters")
    return parameters


def _echoed(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, which the answer repeats; a Refusal where they cannot be written."""
    try:
        orjson.dumps(parameters)
    except TypeError as e:
        raise Refusal(400, f"parameters of the request: {e}; expected plain values", field="parameters") from None
    return parameters


def _tensors(served: Served, inputs: list[Any], binary: memoryview, missing: Any, max_rows: int) -> dict[str, Any]:
    """Values of the inputs by name: a list or array (n,), or an array (n, n_columns) of the matrix input."""
    schema = {c.name: c for c in served.predictor.schema.columns}
    tensors: dict[str, Any] = {}
    at = 0
    for i, tensor in enumerate(inputs):
        name, shape, datatype, n_values = _header(tensor, i, max_rows, len(schema))
        if name in tensors:
            raise Refusal(400, f"inputs[{i}]: {name!r} is there twice", field=f"inputs.{name}")
        column = schema.get(name)
        if column is None and (name != MATRIX or len(inputs) > 1):
            served.encoder.check_names([t.get("name") if isinstance(t, dict) else None for t in inputs], "inputs")
        parameters = _parameters(tensor, name)
        size = parameters.get("binary_data_size")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(binary) - at or "data" in tensor:
                raise Refusal(
                    400, f"{name}: binary_data_size {str(size)[:20]} does not fit the body", field=f"inputs.{name}"
                )
            values = _from_bytes(binary[at : at + size], datatype, n_values, name)
            at += size
        else:
            values = _from_json(tensor.get("data"), datatype, n_values, name)
        if column is None:
            tensors[name] = _matrix(values, shape, datatype)
        else:
            _check_shape(shape, name)
            tensors[name] = _column(values, column, datatype, parameters.get("missing", missing), name)
    if at != len(binary):
        raise Refusal(400, f"{len(binary) - at} bytes follow the tensors that the inputs announce")
    return tensors


def _header(tensor: Any, i: int, max_rows: int, n_columns: int) -> tuple[str, list[int], str, int]:
    """Name, shape, datatype and number of values of an input."""
    if not isinstance(tensor, dict):
        raise Refusal(400, f"inputs[{i}]: expected an object", field=f"inputs[{i}]")
    name, shape, datatype = tensor.get("name"), tensor.get("shape"), tensor.get("datatype")
    if not isinstance(name, str):
        raise Refusal(400, f"inputs[{i}].name: expected text", field=f"inputs[{i}].name")
    if not isinstance(datatype, str) or (datatype not in _NUMPY and datatype != "BYTES"):
        known = ", ".join([*_NUMPY, "BYTES"])
        raise Refusal(400, f"inputs[{i}].datatype: expected one of {known}", field=f"inputs[{i}].datatype")
    sizes = shape if isinstance(shape, list) and 0 < len(shape) <= _MOST_DIMENSIONS else [-1]
    if not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
        raise Refusal(400, f"inputs[{i}].shape: expected an array of sizes", field=f"inputs[{i}].shape")
    if sizes[0] > max_rows or math.prod(sizes) > max_rows * n_columns:
        raise Refusal(413, f"inputs[{i}]: {sizes[0]} rows; this server takes {max_rows} in one request")
    return name[:200], sizes, datatype, math.prod(sizes)


def _check_shape(shape: list[int], name: str) -> None:
    if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1):
        raise Refusal(400, f"{name}: expected the shape [n] or [n, 1], found {shape}", field=f"inputs.{name}.shape")


def _from_bytes(data: memoryview, datatype: str, n_values: int, name: str) -> Any:
    field = f"inputs.{name}"
    if datatype != "BYTES":
        kind = np.dtype(_NUMPY[datatype]).newbyteorder("<")
        if len(data) != n_values * kind.itemsize:
            raise Refusal(400, f"{name}: expected {n_values * kind.itemsize} bytes, found {len(data)}", field=field)
        if datatype == "BOOL" and len(data) and max(data) > 1:
            raise Refusal(400, f"{name}: expected bytes 0 and 1 for BOOL", field=field)
        return np.frombuffer(data, kind)
    values, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if at + size > len(data):
            raise Refusal(400, f"{name}: a text of BYTES is cut short", field=field)
        try:
            values.append(str(data[at : at + size], "utf-8"))
        except UnicodeDecodeError:
            raise Refusal(400, f"{name}: element {len(values)} of BYTES is not UTF-8", field=field) from None
        at += size
    if len(values) != n_values:
        raise Refusal(400, f"{name}: expected {n_values} texts, found {len(values)}", field=field)
    return values


def _from_json(data: Any, datatype: str, n_values: int, name: str) -> list[Any]:
    if not isinstance(data, list):
        raise Refusal(400, f"{name}: expected an array under 'data'", field=f"inputs.{name}.data")
    values = data
    for _ in range(_MOST_DIMENSIONS):
        if not any(isinstance(v, list) for v in values):
            break
        if not all(isinstance(v, list) for v in values):
            raise Refusal(400, f"{name}: the nesting of 'data' is uneven", field=f"inputs.{name}.data")
        values = [v for part in values for v in part]
    if len(values) != n_values:
        raise Refusal(
            400, f"{name}: the shape says {n_values} values, found {len(values)}", field=f"inputs.{name}.data"
        )
    allowed = _JSON_TYPES[datatype[:3]]
    for i, value in enumerate(values):
        if value.__class__ not in allowed and value is not None:
            if value == "NaN" and datatype not in ("BYTES", "BOOL"):
                continue
            raise Refusal(
                400, f"{name}: value {i} is not {datatype} or null (missing)", field=f"inputs.{name}.data[{i}]"
            )
    if datatype not in ("BYTES", "BOOL"):
        values = [None if v == "NaN" else v for v in values]
    if datatype in _NARROW:
        return _narrowed(values, datatype)
    return values


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "BOO": (bool,), "BYT": (str,), "INT": (int,), "UIN": (int,),
    "FP1": (float, int), "FP3": (float, int), "FP6": (float, int),
}  # fmt: skip


def _narrowed(values: list[Any], datatype: str) -> list[Any]:
    """Values of FP16 or FP32 as that type has them."""
    with np.errstate(over="ignore"):
        narrow: np.ndarray = np.array([math.nan if v is None else v for v in values], np.float64).astype(
            _NUMPY[datatype]
        )
    return narrow.astype(np.float64).tolist()


def _matrix(values: Any, shape: list[int], datatype: str) -> np.ndarray:
    if datatype in ("BYTES", "BOOL"):
        raise Refusal(400, f"{MATRIX}: expected numbers, found {datatype}", field=f"inputs.{MATRIX}.datatype")
    if isinstance(values, list):
        values = [math.nan if v is None else v for v in values]
    return np.array(values, np.float64).reshape(shape)


def _column(values: Any, column: Column, datatype: str, missing: Any, name: str) -> Any:
    """The values as the encoder takes them for the column."""
    takes_text = column.type in ("string", "date", "timestamp")
    if takes_text != (datatype == "BYTES") or (datatype == "BOOL" and column.type != "boolean"):
        expected = "BYTES" if takes_text else "BOOL" if column.type == "boolean" else "INT64, FP64 or another number"
        raise Refusal(400, f"{name}: expected {expected}, found {datatype}", field=f"inputs.{name}.datatype")
    if takes_text:
        return [None if v == missing else v for v in values] if isinstance(missing, str) else values
    if column.type == "boolean" and datatype != "BOOL":
        return _as_booleans(values, name)
    return values


def _as_booleans(values: Any, name: str) -> list[Any]:
    """Numbers 0, 1 and NaN (missing) as booleans, so that binary tensors have a missing value too."""
    items = values.tolist() if isinstance(values, np.ndarray) else values
    if any(v not in (0, 1, None) and v == v for v in items):
        raise Refusal(400, f"{name}: expected BOOL, or numbers 0, 1 and NaN for missing", field=f"inputs.{name}")
    return [None if v is None or v != v else bool(v) for v in items]


def _outputs(served: Served, tree: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    default = parameters.get("binary_data_output") is True
    wanted = tree.get("outputs")
    if wanted is None or wanted == []:
        return tuple((name, default) for name in served.outputs.names)
    if not isinstance(wanted, list) or not all(isinstance(o, dict) for o in wanted):
        raise Refusal(400, "outputs: expected an array of objects", field="outputs")
    chosen = []
    for i, output in enumerate(wanted):
        name = output.get("name")
        if not isinstance(name, str) or name not in served.outputs.names:
            known = ", ".join(served.outputs.names)
            raise Refusal(400, f"outputs[{i}].name: expected one of {known}", field=f"outputs[{i}].name")
        is_binary = _parameters(output, f"outputs[{i}]").get("binary_data", default)
        chosen.append((name, is_binary is True))
    return tuple(dict(chosen).items())


def _json_values(values: list[Any], datatype: str) -> list[Any]:
    if datatype == "BYTES":
        return [str(v) for v in values]
    return finite(values) if datatype in ("FP32", "FP64") else values


def _to_bytes(values: list[Any], datatype: str) -> bytes:
    if datatype != "BYTES":
        return np.array(values, np.dtype(_NUMPY[datatype]).newbyteorder("<")).tobytes()
    texts = (str(v).encode() for v in values)
    return b"".join(len(t).to_bytes(4, "little") + t for t in texts)
