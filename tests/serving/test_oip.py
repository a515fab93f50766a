from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from asking import ask
from serving_models import boosted, register

from claydist.registry import Registry, load, open_registry
from claydist.serving.application import Application
from claydist.serving.keys import KeyRing
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Shelf
from claydist.spec import DataSpec
from claydist.values import to_plain

Make = Callable[..., Application]
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def oip(shared_schemas: Path) -> ModuleType:
    """The protocol's own schemas, as a checker."""
    spec = importlib.util.spec_from_file_location("validate_oip", shared_schemas / "validate_oip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(app: Application, name: str, table: pa.Table) -> list[dict[str, Any]]:
    """One input per column, of the datatypes that the metadata names; a missing value is null."""
    rows = to_plain(table, app.shelf.find(name).predictor.plan)
    inputs = ask(app, "GET", f"/v2/models/{name}").json()["inputs"]
    return [
        {"name": t["name"], "datatype": t["datatype"], "shape": [len(rows)], "data": [row[t["name"]] for row in rows]}
        for t in inputs
    ]


def as_table(answer: dict[str, Any]) -> dict[str, list[Any]]:
    return {t["name"]: t["data"] for t in answer["outputs"]}


@pytest.mark.parametrize("name", ["trees", "classes", "numbers", "linear"])
def test_tensors_give_the_bits_of_the_bundle(
    name: str, make_app: Make, registry: Registry, table: pa.Table, oip: ModuleType
) -> None:
    app = make_app()
    request = {"id": "42", "inputs": list(reversed(tensors(app, name, table)))}
    answer = ask(app, "POST", f"/v2/models/{name}/infer", json=request)
    assert answer.status_code == 200, answer.text
    expected = load(name, registry).predict(table)
    assert as_table(answer.json()) == {c: expected[c].to_pylist() for c in expected.column_names}
    assert answer.json()["id"] == "42"
    assert not oip.errors("inference_response", answer.json())


def test_every_body_is_valid_by_the_protocol(make_app: Make, table: pa.Table, oip: ModuleType) -> None:
    app = make_app()
    assert not oip.errors("metadata_server_response", ask(app, "GET", "/v2").json())
    for name in ("trees", "classes", "numbers", "linear"):
        assert not oip.errors("metadata_model_response", ask(app, "GET", f"/v2/models/{name}").json())
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
            assert ask(app, "GET", f"{path}/ready").status_code == 200
        request = {"inputs": tensors(app, name, table.drop_null()[:3])}
        assert not oip.errors("inference_request", request)
        answer = ask(app, "POST", f"/v2/models/{name}/versions/1/infer", json=request)
        assert not oip.errors("inference_response", answer.json())
        assert answer.json()["model_version"] == "1"
    for path, schema in (
        ("/v2/models/absent", "metadata_model_error_response"),
        ("/v2/nothing", "metadata_server_error_response"),
        ("/v2/models/trees/versions/7/infer", "inference_error_response"),
    ):
        answer = ask(app, "POST" if path.endswith("infer") else "GET", path)
        assert answer.status_code == 404
        assert not oip.errors(schema, answer.json())


def test_outputs_are_chosen_and_parameters_echoed(make_app: Make, table: pa.Table) -> None:
    app = make_app()
    request = {
        "inputs": tensors(app, "trees", table[:2]),
        "outputs": [{"name": "probability"}],
        "parameters": {"trace": "abc"},
    }
    answer = ask(app, "POST", "/v2/models/trees/infer", json=request).json()
    assert [t["name"] for t in answer["outputs"]] == ["probability"]
    assert answer["parameters"] == {"trace": "abc", "digest": app.shelf.find("trees").digest}
    assert "id" not in answer


def test_metadata_says_how_missing_is_spelled(make_app: Make, table: pa.Table) -> None:
    app = make_app()
    parameters = ask(app, "GET", "/v2/models/trees").json()["parameters"]
    assert "null" in parameters["missing"]
    assert parameters["classes"] == [False, True]
    inputs = tensors(app, "trees", table[:1])
    for t in inputs:
        t["data"] = [None]
    nulls = as_table(ask(app, "POST", "/v2/models/trees/infer", json={"inputs": inputs}).json())
    for t in inputs:
        if t["datatype"] in ("FP64", "INT64"):
            t["data"] = ["NaN"]
        elif t["datatype"] == "BYTES" and t["name"] == "carrier":
            t |= {"data": ["<NA>"], "parameters": {"missing": "<NA>"}}
    assert as_table(ask(app, "POST", "/v2/models/trees/infer", json={"inputs": inputs}).json()) == nulls


def binary_request(inputs: list[dict[str, Any]], **more: Any) -> tuple[bytes, dict[str, str]]:
    """The request with all tensors in binary, as Triton's client writes it."""
    kinds = {"FP64": np.float64, "INT64": np.int64, "BOOL": np.bool_}
    blobs, heads = [], []
    for t in inputs:
        if t["datatype"] == "BYTES":
            texts = [str(v).encode() for v in t["data"]]
            blob = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            blob = np.array(t["data"], kinds[t["datatype"]]).tobytes()
        blobs.append(blob)
        heads.append({k: v for k, v in t.items() if k != "data"} | {"parameters": {"binary_data_size": len(blob)}})
    text = orjson.dumps({"inputs": heads, **more})
    return b"".join([text, *blobs]), {LENGTH: str(len(text))}


def test_binary_tensors(make_app: Make, registry: Registry, table: pa.Table) -> None:
    app, whole = make_app(), table.drop_null()
    body, headers = binary_request(tensors(app, "classes", whole), parameters={"binary_data_output": True})
    answer = ask(app, "POST", "/v2/models/classes/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[LENGTH])
    said, data = orjson.loads(answer.content[:length]), answer.content[length:]
    expected = load("classes", registry).predict(whole)
    for t in said["outputs"]:
        blob, data = data[: t["parameters"]["binary_data_size"]], data[t["parameters"]["binary_data_size"] :]
        if t["datatype"] == "BYTES":
            texts = [text for label in expected[t["name"]].to_pylist() for text in [label.encode()]]
            assert blob == b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        else:
            assert blob == expected[t["name"]].to_numpy().tobytes()
    assert not data


def test_one_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({f"x{i}": rng.random(300) * 2000 for i in range(4)})
    registry = open_registry(str(tmp_path))
    register(registry, "m", boosted(table, data=DataSpec(path=("x",), label={"column": "y"})), table)
    app = Application(ServeSpec(models=("m",), access_log=False), Shelf(["m"], registry), KeyRing())
    assert "[n, 4]" in ask(app, "GET", "/v2/models/m").json()["parameters"]["matrix"]
    X = np.column_stack([c.to_numpy() for c in table.columns])
    X[0, 0] = np.nan
    expected = load("m", registry).predict(pa.table(dict(zip(table.column_names, X.T, strict=True))))
    data = [[None if v != v else v for v in row] for row in X.tolist()]
    matrix = {"name": "input", "datatype": "FP64", "shape": list(X.shape), "data": data}
    answer = ask(app, "POST", "/v2/models/m/infer", json={"inputs": [matrix]})
    assert as_table(answer.json())["probability"] == expected["probability"].to_pylist()
    for shape in ([300, 5], [4, 300], [1200], [2, 150, 4]):
        assert ask(app, "POST", "/v2/models/m/infer", json={"inputs": [matrix | {"shape": shape}]}).status_code == 400
    text = matrix | {"datatype": "BYTES", "data": ["a"] * 1200}
    assert ask(app, "POST", "/v2/models/m/infer", json={"inputs": [text]}).status_code == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": []}, "one tensor at least"),
        ({"id": 7}, "id: expected text"),
        ({"parameters": []}, "expected an object"),
        ({"outputs": [{"name": "x"}]}, "expected one of prediction, probability"),
        ({"outputs": 5}, "outputs: expected an array"),
        ({"inputs": [5]}, "expected an object"),
        ({"inputs": [{"name": "hour"}]}, "datatype"),
    ],
)
def test_a_wrong_request_is_refused(make_app: Make, table: pa.Table, change: dict[str, Any], said: str) -> None:
    app = make_app()
    request = {"inputs": tensors(app, "trees", table[:1]), **change}
    answer = ask(app, "POST", "/v2/models/trees/infer", json=request)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("distance", {"name": "distanze"}, "'distanze' is unknown"),
        ("distance", {"shape": [2]}, "the shape says 2 values"),
        ("distance", {"shape": [1, 2], "data": [1, 2]}, "expected the shape [n]"),
        ("distance", {"shape": "1"}, "array of sizes"),
        ("distance", {"shape": [-1]}, "array of sizes"),
        ("distance", {"shape": [2**50]}, "array of sizes"),
        ("distance", {"shape": [10**7]}, "10000000 rows"),
        ("distance", {"datatype": "BF16"}, "expected one of BOOL"),
        ("distance", {"datatype": "BYTES", "data": ["x"]}, "expected INT64, FP64"),
        ("distance", {"data": [True]}, "not FP64"),
        ("distance", {"data": ["x"]}, "not FP64"),
        ("distance", {"data": [1e39]}, "up to"),
        ("distance", {"data": 5}, "expected an array"),
        ("distance", {"data": [[1], 2]}, "uneven"),
        ("distance", {"data": [[[[[[[[[[1]]]]]]]]]]}, "not FP64"),
        ("hour", {"data": [1.5]}, "not INT64"),
        ("late", {"datatype": "INT64", "data": [2]}, "0, 1 and NaN"),
        ("carrier", {"datatype": "INT64", "data": [1]}, "expected BYTES"),
        ("carrier", {"parameters": {"binary_data_size": 4}}, "does not fit the body"),
    ],
)
def test_a_wrong_tensor_is_named(make_app: Make, table: pa.Table, name: str, change: dict[str, Any], said: str) -> None:
    app = make_app()
    inputs = [t | change if t["name"] == name else t for t in tensors(app, "trees", table[:1])]
    answer = ask(app, "POST", "/v2/models/trees/infer", json={"inputs": inputs})
    assert answer.status_code == (413 if "rows" in said else 400)
    assert said in answer.json()["error"]


def test_damaged_binary_is_refused(make_app: Make, table: pa.Table) -> None:
    app = make_app()
    body, headers = binary_request(tensors(app, "trees", table.drop_null()[:5]))
    cut = int(headers[LENGTH])
    for wrong, header in (
        (body[:-3], str(cut)),
        (body + b"x", str(cut)),
        (body, str(cut - 5)),
        (body, "-1"),
        (body, str(10**9)),
        (body[:cut] + b"\xff" * (len(body) - cut), str(cut)),
    ):
        answer = ask(app, "POST", "/v2/models/trees/infer", content=wrong, headers={LENGTH: header})
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["error"], str)
