"""OpenAPI for the models that are served, and the page at /docs: nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claydist import __version__
from claydist.schema import Column
from claydist.serving.answers import ARROW, columns
from claydist.serving.oip import model_metadata
from claydist.serving.shelf import Served

PAGE = (Path(__file__).parent / "docs.html").read_bytes()
_MOST_CATEGORIES = 20


def openapi(models: Sequence[Served], *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; each model's request has an example of its golden rows."""
    paths: dict[str, Any] = {}
    for served in {s.name: s for s in reversed(models)}.values():
        paths[f"/predict/{served.name}"] = {"post": _predict(served)}
        paths[f"/v2/models/{served.name}/infer"] = {"post": _infer(served)}
        paths[f"/v2/models/{served.name}"] = {"get": _get(f"Metadata of {served.name}", served.name)}
        paths[f"/batch/{served.name}"] = {"post": _batch(served)}
    paths["/batch/{id}"] = {
        "get": {**_get("Status of a scoring run", "server"), "parameters": [_ID]},
        "delete": {**_get("Stop a scoring run", "server"), "parameters": [_ID]},
    }
    plain = {
        "/models": "The models that answer", "/v2": "Server metadata", "/v2/health/live": "Whether the server lives",
        "/v2/health/ready": "Whether all models are loaded", "/metrics": "Counters of one replica, for Prometheus",
    }  # fmt: skip
    paths |= {path: {"get": _get(summary, "server")} for path, summary in plain.items()}
    document: dict[str, Any] = {
        "openapi": "3.1.0", "info": {"title": "claydist", "version": __version__}, "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }  # fmt: skip
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def example_rows(served: Served) -> dict[str, Any]:
    """A request for `POST /predict/{name}`: two golden rows."""
    return {"rows": list(served.examples[:2])}


def example_tensors(served: Served) -> dict[str, Any]:
    """The same two rows for `POST /v2/models/{name}/infer`."""
    rows = served.examples[:2]
    tensors = model_metadata(served, [])["inputs"]
    inputs = [
        {
            "name": t["name"],
            "datatype": t["datatype"],
            "shape": [len(rows)],
            "data": [_as(row[t["name"]], t) for row in rows],
        }
        for t in tensors
    ]
    return {"id": "1", "inputs": inputs}


def _as(value: Any, tensor: dict[str, Any]) -> Any:
    return int(value) if tensor["datatype"] == "INT64" and isinstance(value, float) and value.is_integer() else value


def _predict(served: Served) -> dict[str, Any]:
    fields = {c.name: _schema(served, c) for c in served.predictor.schema.columns}
    row = {"type": "object", "required": list(fields), "additionalProperties": False, "properties": fields}
    rows = {"type": "array", "minItems": 1, "items": row}
    body = {"type": "object", "required": ["rows"], "additionalProperties": False, "properties": {"rows": rows}}
    arrow = {"schema": {"type": "string", "format": "binary", "description": "Arrow IPC stream of the same columns"}}
    return {
        "summary": f"Predict with {served.name} (version {served.version}, {served.task})", "tags": [served.name],
        "requestBody": {"required": True, "content": {
            "application/json": {"schema": body, "example": example_rows(served)}, ARROW.decode(): arrow,
        }},
        "responses": _responses({"application/json": {"schema": _answer(served)}, ARROW.decode(): arrow}),
    }  # fmt: skip


def _answer(served: Served) -> dict[str, Any]:
    names = (
        list(columns(served.predictor.target, served.predict_values(_example_matrix(served))))
        if served.examples
        else []
    )
    row = {"type": "object", "required": names, "properties": {name: {} for name in names}}
    text = {"type": "string"}
    return {
        "type": "object", "required": ["model", "version", "digest", "predictions"],
        "properties": {"model": text, "version": text, "digest": text, "predictions": {"type": "array", "items": row}},
    }  # fmt: skip


def _example_matrix(served: Served) -> Any:
    return served.encoder.from_rows(served.examples[:1]).values


def _infer(served: Served) -> dict[str, Any]:
    tensor = {
        "type": "object", "required": ["name", "shape", "datatype", "data"],
        "properties": {"name": {"type": "string"}, "shape": {"type": "array", "items": {"type": "integer"}},
                       "datatype": {"type": "string"}, "data": {"type": "array"}, "parameters": {"type": "object"}},
    }  # fmt: skip
    body = {
        "type": "object", "required": ["inputs"],
        "properties": {"id": {"type": "string"}, "parameters": {"type": "object"},
                       "inputs": {"type": "array", "minItems": 1, "items": tensor}, "outputs": {"type": "array"}},
    }  # fmt: skip
    return {
        "summary": f"Predict with {served.name}, Open Inference Protocol v2", "tags": [served.name],
        "requestBody": _body(body, example_tensors(served)),
        "responses": _responses({"application/json": {"schema": {"type": "object"}}}),
    }  # fmt: skip


def _batch(served: Served) -> dict[str, Any]:
    example = {"input": "s3://bucket/flights", "output": "s3://bucket/scores", "date": "dt", "key": ["flight"]}
    return {
        "summary": f"Score a table with {served.name}, as a Ray job", "tags": [served.name],
        "requestBody": _body({"type": "object"}, example),
        "responses": {**_responses({"application/json": {}}), "202": {"description": "submitted, or at work already"}},
    }  # fmt: skip


def _body(schema: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _get(summary: str, tag: str) -> dict[str, Any]:
    return {"summary": summary, "tags": [tag], "responses": _responses({"application/json": {}})}


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    found = {status: {"description": text, **error} for status, text in _STATUSES.items()}
    return {"200": {"description": "the answer", "content": content}, **found}


def _schema(served: Served, column: Column) -> dict[str, Any]:
    names = {"integer": "number", "float": "number", "decimal": "number", "boolean": "boolean"}
    schema: dict[str, Any] = {"type": [names.get(column.type, "string"), "null"]}
    if column.type in ("date", "timestamp"):
        schema["format"] = "date" if column.type == "date" else "date-time"
        schema["description"] = column.describe()
    feature = next((f for f in served.predictor.plan.features if f.column == column.name), None)
    if feature is not None and feature.vocabulary:
        shown = feature.vocabulary[:_MOST_CATEGORIES]
        more = len(feature.vocabulary) - len(shown)
        schema["description"] = f"seen in training: {', '.join(shown)}" + (f" and {more} more" if more else "")
    return schema


_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
_STATUSES = {
    "400": "the request is wrong; the error names the field", "401": "no valid key", "404": "no such model or run",
    "413": "too many bytes or rows", "422": "a category that the model refuses to guess about",
    "429": "this key asks too often", "503": "overloaded; Retry-After says when to ask again",
}  # fmt: skip
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {"anyOf": [{"type": "string"}, {
        "type": "object", "required": ["kind", "message"],
        "properties": {"kind": {"type": "string"}, "message": {"type": "string"}, "field": {"type": "string"},
                       "problems": {"type": "array", "items": {"type": "string"}}},
    }]}},
}  # fmt: skip
