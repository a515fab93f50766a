"""Malformed requests of every kind: each is answered with an error that is JSON, and none breaks the server.

`CLAYDIST_FUZZ=100000 pytest tests/serving/test_fuzz.py` asks so many; the suite asks 2,000.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx
import pyarrow as pa
import pytest
from asking import ARROW, arrow_stream, client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claydist.serving.application import Application
from claydist.serving.keys import KeyRing
from claydist.values import to_plain

N_REQUESTS = int(os.environ.get("CLAYDIST_FUZZ", "2000"))
EXPECTED = {200, 202, 400, 401, 404, 405, 408, 413, 422, 429, 503}
NAMES = ["trees", "classes", "numbers", "linear", "absent", "..", "", "a/b", "%00", "trees%2Finfer", "ü"]
DATATYPES = ("FP64", "BYTES", "INT64", "FP64", "INT64", "BOOL", "BYTES", "BYTES", "BYTES")
HEADERS: list[dict[str, str]] = [
    {},
    {"content-type": ARROW},
    {"accept": ARROW},
    {"content-type": "text/plain; charset=utf-16"},
    {"inference-header-content-length": "5"},
    {"inference-header-content-length": "99999999999999999999"},
    {"content-encoding": "br"},
    {"x-request-timeout-seconds": "nan"},
    {"authorization": "Bearer \x01"},
    {"x-request-id": "a" * 1000},
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**63) - 1, 1e308, "NaN", "2013-01-01T00:00:00Z", "\u0000", 10**30])
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


def odd_columns(n: int) -> list[pa.Array]:
    """Columns of types that somebody may send where a model wants another."""
    whole = pa.array([1] * n, pa.int64())
    plain = [
        whole.cast(pa.decimal128(30, 2)), whole.cast(pa.float16()), whole.cast(pa.uint8()), pa.nulls(n),
        pa.array([2**64 - 1] * n, pa.uint64()), pa.array([float("inf")] * n), pa.array([True] * n),
        pa.array(["AA"] * n, pa.string_view()), pa.array(["AA"] * n, pa.large_string()), pa.array([b"\xff"] * n),
        pa.array([Decimal("1e70")] * n, pa.decimal256(76, 0)), pa.array([[1]] * n), pa.array([{"a": 1}] * n),
        whole.cast(pa.timestamp("s")), pa.array([2**62] * n, pa.int64()).view(pa.timestamp("us", "UTC")),
        pa.array([1] * n, pa.int64()).view(pa.timestamp("us", "Bogus/Zone")), whole.cast(pa.duration("s")),
        whole.cast(pa.time64("us")), pa.array([2**40] * n, pa.int64()).cast(pa.date64(), safe=False),
        pa.RunEndEncodedArray.from_arrays(pa.array([n], pa.int32()), pa.array(["AA"])),
    ]  # fmt: skip
    indices = pa.array([0] * n, pa.int8())
    dictionaries = [pa.DictionaryArray.from_arrays(indices, a[:1]) for a in plain[:9]]
    return [*plain, *dictionaries, pa.DictionaryArray.from_arrays(indices, pa.array([None], pa.string()))]


def mutated(tree: Any, rng: random.Random) -> Any:
    """The tree with one of its values replaced by something else, at any depth."""
    odd = [None, True, "x", -1, 1e308, 2**70, [], {}, [[]], "", 0.5, ["a"], {"a": 1}, "2013-13-45", 10**25]
    odd += [nested(rng.choice([3, 130, 260, 900]))] if rng.random() < 0.3 else []
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(sorted(tree))
        action = rng.random()
        if action < 0.08:
            return {k: v for k, v in tree.items() if k != key}
        if action < 0.16:
            return {**tree, rng.choice(["", "zz", "ü", "rows"]): rng.choice(odd)}
        return {**tree, key: mutated(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = rng.randrange(len(tree))
        return [*tree[:at], mutated(tree[at], rng), *tree[at + 1 :]]
    return rng.choice(odd)


def broken(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut, or with some of them changed."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 12)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def requests(
    app: Application, table: pa.Table, rng: random.Random
) -> Callable[[], tuple[str, str, bytes, dict[str, str]]]:
    """Makes the next malformed request."""
    plan = app.shelf.find("trees").predictor.plan
    rows = {"rows": to_plain(table[:3], plan)}
    tensors = {
        "id": "1",
        "inputs": [
            {"name": n, "datatype": d, "shape": [3], "data": [row[n] for row in rows["rows"]]}
            for n, d in zip(plan.schema.names, DATATYPES, strict=True)
        ],
        "outputs": [{"name": "probability"}],
        "parameters": {"missing": "NA", "deep": nested(3)},
    }
    streams = [arrow_stream(table[:3]), arrow_stream(table[:3].replace_schema_metadata({"a": "b"}))]
    dictionary = table[:3].set_column(1, "carrier", table["carrier"][:3].dictionary_encode())
    streams.append(arrow_stream(dictionary))
    odd = odd_columns(3)

    def make() -> tuple[str, str, bytes, dict[str, str]]:
        kind = rng.random()
        if kind < 0.35:
            return "POST", "/predict/trees", json.dumps(mutated(rows, rng)).encode("utf-8", "replace"), {}
        if kind < 0.6:
            return "POST", "/v2/models/trees/infer", json.dumps(mutated(tensors, rng)).encode("utf-8", "replace"), {}
        if kind < 0.7:
            at = rng.randrange(table.num_columns)
            body = arrow_stream(table[:3].set_column(at, table.column_names[at], rng.choice(odd)))
            return "POST", "/predict/" + rng.choice(["trees", "linear"]), body, {"content-type": ARROW}
        if kind < 0.85:
            return "POST", "/predict/trees", broken(rng.choice(streams), rng), {"content-type": ARROW}
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
        ends = ["", "/infer", "/ready", "/versions/1", "/versions/x/infer", "/versions/-1"]
        prefix = rng.choice(["/predict/", "/v2/models/", "/batch/", "/", "/v2/", "//"])
        path = prefix + rng.choice(NAMES) + rng.choice(ends)
        text = json.dumps(rows).encode()
        body = rng.choice([b"", b"{", b"[" * 3000, broken(text, rng), b'{"rows":[{}]}'])
        return method, path, body, rng.choice(HEADERS)

    return make


def check(answer: httpx.Response, said: str) -> None:
    assert answer.status_code in EXPECTED, (answer.status_code, said, answer.text[:300])
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        assert error
        assert "Traceback" not in answer.text
        assert "claydist/" not in answer.text


def resident_mb() -> float:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_malformed_requests_are_answered(make_app: Callable[..., Application], table: pa.Table) -> None:
    app = make_app(limits={"json_bytes": 200_000, "body_bytes": 400_000})
    make = requests(app, table, random.Random(0))

    async def some(n: int) -> None:
        async with client(app) as http:
            for _ in range(n):
                method, path, body, headers = make()
                check(
                    await http.request(method, path, content=body, headers=headers), f"{method} {path} {body[:200]!r}"
                )

    asyncio.run(some(N_REQUESTS // 2))
    gc.collect()
    before = resident_mb()
    asyncio.run(some(N_REQUESTS // 2))
    gc.collect()
    assert resident_mb() - before < 50
    assert app._n_requests == app._admission.n_bytes == app._batcher.n_waiting_rows == 0


@settings(max_examples=max(200, N_REQUESTS // 20), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    trees,
    st.sampled_from(["/predict/trees", "/v2/models/linear/infer", "/batch/trees", "/predict/classes"]),
    st.booleans(),
)
def test_any_json_is_answered(make_app: Callable[..., Application], tree: Any, path: str, inside: bool) -> None:
    app = make_app(keys=KeyRing())
    key = "inputs" if "infer" in path else "rows"
    body = json.dumps({key: [tree]} if inside else tree).encode("utf-8", "surrogatepass")

    async def once() -> httpx.Response:
        async with client(app) as http:
            return await http.post(path, content=body)

    check(asyncio.run(once()), f"{path} {body!r}")
