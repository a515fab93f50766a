from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from asking import ARROW, arrow_stream, ask, client
from serving_models import DATA, boosted, register

from claydist.registry import Registry, load, open_registry
from claydist.serving import answers
from claydist.serving.application import Application
from claydist.serving.exchange import Answer, send_answer
from claydist.serving.keys import KeyRing
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Served, Shelf
from claydist.values import to_plain

Make = Callable[..., Application]
MODELS = ("trees", "classes", "numbers", "linear")
KEY = "a-key-of-the-tests"


def rows(served: Served, table: pa.Table) -> dict[str, Any]:
    return {"rows": to_plain(table, served.predictor.plan)}


@pytest.mark.parametrize("name", MODELS)
def test_every_door_gives_the_bits_of_the_bundle(
    name: str, make_app: Make, registry: Registry, shelf: Shelf, table: pa.Table
) -> None:
    app = make_app(limits={"batch_rows": 100})
    expected = load(name, registry).predict(table)
    said = ask(app, "POST", f"/predict/{name}", json=rows(shelf.find(name), table))
    assert said.json()["predictions"] == expected.to_pylist()
    turned = table.select(sorted(table.column_names))
    streamed = ask(app, "POST", f"/predict/{name}", content=arrow_stream(turned), headers={"content-type": ARROW})
    assert pa.ipc.open_stream(streamed.content).read_all().equals(expected)
    mixed = ask(app, "POST", f"/predict/{name}", json=rows(shelf.find(name), table), headers={"accept": ARROW})
    assert pa.ipc.open_stream(mixed.content).read_all().equals(expected)


def test_answers_name_model_version_and_digest(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    app, served = make_app(), shelf.find("trees")
    said = ask(app, "POST", "/predict/trees", json=rows(served, table[:1]))
    assert {key: said.json()[key] for key in ("model", "version", "digest")} == served.identity()
    assert said.headers["x-claydist-digest"] == served.digest
    streamed = ask(app, "POST", "/predict/trees", content=arrow_stream(table[:1]), headers={"content-type": ARROW})
    metadata = pa.ipc.open_stream(streamed.content).schema.metadata
    assert {k.decode(): v.decode() for k, v in metadata.items()} == served.identity()


def test_docs_examples_can_be_tried(make_app: Make) -> None:
    app = make_app()
    document = ask(app, "GET", "/openapi.json").json()
    tried = 0
    for path, methods in document["paths"].items():
        if "post" not in methods or path.startswith("/batch"):
            continue
        example = methods["post"]["requestBody"]["content"]["application/json"]["example"]
        assert ask(app, "POST", path, json=example).status_code == 200, path
        tried += 1
    assert tried == 2 * len(MODELS)
    page = ask(app, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_models_and_metrics_are_listed(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    app = make_app()
    listed = ask(app, "GET", "/models").json()["models"]
    assert [m["model"] for m in listed] == list(MODELS)
    ask(app, "POST", "/predict/trees", json=rows(shelf.find("trees"), table[:7]))
    ask(app, "POST", "/predict/trees", content=b"{")
    text = ask(app, "GET", "/metrics").text
    assert 'claydist_rows_total{model="trees",version="1"} 7' in text
    assert 'claydist_requests_total{model="trees",door="predict",status="400"} 1' in text
    assert 'claydist_stage_seconds_bucket{stage="total",le="+Inf"} 3' in text
    assert "claydist_missing_values_total" in text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/nothing", 404),
        ("GET", "/predict/trees", 405),
        ("POST", "/predict/absent", 404),
        ("POST", "/predict/../predict/trees/..", 404),
        ("POST", "/predict/%2e%2e%2fetc", 404),
        ("POST", "/predict/trees/", 404),
        ("GET", "/v2/models/trees/versions/9", 404),
        ("GET", "/v2/models/trees/versions/1/ready", 200),
        ("GET", "/v2/models/absent/ready", 404),
        ("PATCH", "/v2", 405),
        ("HEAD", "/models", 200),
        ("POST", "/batch/trees", 503),
        ("GET", "/batch/claydist-score-00000000000000000000", 503),
    ],
)
def test_paths_and_methods(make_app: Make, method: str, path: str, status: int) -> None:
    answer = ask(make_app(), method, path, content=b"{}" if method == "POST" else None)
    assert answer.status_code == status
    if status >= 400:
        assert answer.json()["error"]


def test_an_error_names_the_field(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    body = rows(shelf.find("trees"), table[:3])
    body["rows"][2]["distance"] = "far"
    answer = ask(make_app(), "POST", "/predict/trees", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "kind": "bad_request",
        "field": "rows[2].distance",
        "message": "rows[2].distance: expected a number or null, found 'far'",
    }


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"rows": {}}', "expected an array"),
        (b'{"rows": []}', "one row at least"),
        (b'{"rows": [{}], "x": 1}', "unknown keys"),
        (b'{"rows": [{"distance": NaN}]}', "a missing value is null"),
        (b'{"rows": ' + b"[" * 5000, "not JSON"),
        (b'{"rows": [{"distance": 1e999}]}', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"rows": "\\ud800"}', "not JSON"),
    ],
)
def test_what_is_no_request_is_refused(make_app: Make, body: bytes, text: str) -> None:
    answer = ask(make_app(), "POST", "/predict/trees", content=body)
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]


def test_damaged_arrow_is_refused(make_app: Make, table: pa.Table) -> None:
    app, whole = make_app(), arrow_stream(table[:50])

    def status(data: bytes) -> tuple[int, str]:
        answer = ask(app, "POST", "/predict/trees", content=data, headers={"content-type": ARROW})
        return answer.status_code, answer.text

    assert status(b"")[0] == status(b"not arrow")[0] == status(whole[:200])[0] == status(whole[:-300])[0] == 400
    assert "compressed" in status(arrow_stream(table[:50], compression="zstd"))[1]
    assert "absent" in status(arrow_stream(table.drop_columns(["hour"])))[1]
    assert "expected string" in status(arrow_stream(table.set_column(1, "carrier", table["hour"])))[1]
    assert status(arrow_stream(table[:0]))[0] == 400
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 20)):
            broken[at] = rng.integers(0, 256)
        assert status(bytes(broken))[0] in (200, 400, 413)


def overlapping(n: int, size: int) -> pa.Array:
    """Views of nearly all of one buffer: n times its size where they are copied."""
    views = np.zeros(n, [("length", "<i4"), ("prefix", "S4"), ("buffer", "<i4"), ("offset", "<i4")])
    views["length"], views["prefix"] = size - np.arange(n) % (size // 2), b"aaaa"
    buffers = [None, pa.py_buffer(views.tobytes()), pa.py_buffer(b"a" * size)]
    return pa.Array.from_buffers(pa.string_view(), n, buffers)


def test_views_are_refused_before_anything_copies_them(make_app: Make, table: pa.Table) -> None:
    app, views = make_app(), overlapping(400, 1_000_000)
    for column in (views, pa.DictionaryArray.from_arrays(pa.array(np.arange(400, dtype=np.int16)), views)):
        body = arrow_stream(table[:400].set_column(1, "carrier", column))
        before = pa.total_allocated_bytes()
        answer = ask(app, "POST", "/predict/trees", content=body, headers={"content-type": ARROW})
        assert answer.status_code == 400
        assert answer.json()["error"]["field"] == "carrier"
        assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_dictionary_is_not_checked_without_end(
    make_app: Make, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("claydist.serving.answers._MOST_DECODED_BYTES", 10 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100, np.int8)), pa.array(["a" * 500_000]))
    whole = table[:100].set_column(1, "carrier", column)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, whole.schema) as stream:
        stream.write_table(whole, max_chunksize=1)
    answer = ask(make_app(), "POST", "/predict/trees", content=sink.getvalue(), headers={"content-type": ARROW})
    assert answer.status_code == 413
    assert "fewer batches" in answer.json()["error"]["message"]


@pytest.mark.parametrize("error", [MemoryError("x"), pa.ArrowMemoryError("x")])
def test_too_little_memory_is_503(
    make_app: Make, table: pa.Table, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("claydist.features.FeaturePlan.encode", fail)
    answer = ask(make_app(), "POST", "/predict/trees", content=arrow_stream(table[:5]), headers={"content-type": ARROW})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_what_arrow_cannot_compute_is_400(make_app: Make, table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise pa.ArrowNotImplementedError("no such kernel")

    monkeypatch.setattr("claydist.features.FeaturePlan.encode", fail)
    answer = ask(make_app(), "POST", "/predict/trees", content=arrow_stream(table[:5]), headers={"content-type": ARROW})
    assert answer.status_code == 400
    assert "no such kernel" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [pa.decimal128(20, 0), pa.float64(), pa.int32(), pa.uint8()])
def test_a_category_of_integers_comes_as_a_dictionary_of_any_number(
    make_app: Make, registry: Registry, table: pa.Table, kind: pa.DataType
) -> None:
    dictionary = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 2, 1], pa.int8()), pa.array([1, 4, 2], pa.int64()).cast(kind)
    )
    at = table.column_names.index("gate")
    sent = table[:5].set_column(at, "gate", dictionary)
    plain = table[:5].set_column(at, "gate", pa.array([1, 4, None, 2, 4], pa.int64()))
    answer = ask(make_app(), "POST", "/predict/trees", content=arrow_stream(sent), headers={"content-type": ARROW})
    assert pa.ipc.open_stream(answer.content).read_all().equals(load("trees", registry).predict(plain))


@pytest.mark.parametrize(("path", "root"), [("/ml", "/ml"), ("*", ""), ("/ml/predict/x", "/ml"), ("/mlx", "/ml")])
def test_a_path_that_is_the_prefix_itself_is_answered(make_app: Make, path: str, root: str) -> None:
    app, sent = make_app(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] in (200, 404, 405)


def test_a_claim_of_many_rows_is_refused(make_app: Make) -> None:
    # A column of nulls has no buffers, so a few bytes can claim any number of rows.
    plain = pa.table({"x": pa.nulls(10**9)})
    answer = ask(make_app(), "POST", "/predict/trees", content=arrow_stream(plain), headers={"content-type": ARROW})
    assert answer.status_code == 400
    names = {
        name: pa.nulls(10**9)
        for name in ["distance", "carrier", "hour", "seats", "gate", "late", "departs", "booked", "day"]
    }
    answer = ask(
        make_app(), "POST", "/predict/trees", content=arrow_stream(pa.table(names)), headers={"content-type": ARROW}
    )
    assert answer.status_code == 413


def test_limits(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    body = rows(shelf.find("trees"), table[:20])
    few = make_app(limits={"rows": 10})
    assert ask(few, "POST", "/predict/trees", json=body).status_code == 413
    assert (
        ask(
            few, "POST", "/predict/trees", content=arrow_stream(table[:20]), headers={"content-type": ARROW}
        ).status_code
        == 413
    )
    small = make_app(limits={"json_bytes": 1024, "body_bytes": 2048})
    assert ask(small, "POST", "/predict/trees", json=body).status_code == 413
    assert (
        ask(small, "POST", "/predict/trees", content=b"{}", headers={"content-length": "1000000000"}).status_code == 413
    )
    assert ask(small, "POST", "/predict/trees", content=b"{}", headers={"content-length": "-1"}).status_code == 400
    assert ask(small, "POST", "/predict/trees", content=b"{}", headers={"content-encoding": "gzip"}).status_code == 400


def test_a_length_that_lies_is_found_while_reading(make_app: Make) -> None:
    app = make_app(limits={"json_bytes": 1024})
    pieces = iter([b"x" * 600] * 3)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(pieces), "more_body": True}

    assert asyncio.run(raw(app, receive, [(b"content-length", b"10")])) == 413


def test_a_slow_body_is_ended(make_app: Make) -> None:
    app = make_app(limits={"request_s": 0.05})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(10)
        raise AssertionError

    start = time.monotonic()
    headers = [(b"x-request-timeout-seconds", b"1000"), (b"x-request-disconnect-disabled", b"?1")]
    assert asyncio.run(raw(app, receive, headers)) == 408
    assert time.monotonic() - start < 5


def test_a_client_that_leaves_gets_nothing(make_app: Make) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert asyncio.run(raw(make_app(), receive, [])) is None


async def raw(app: Application, receive: Any, headers: list[tuple[bytes, bytes]]) -> int | None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict/trees", "headers": headers}
    await app(scope, receive, send)
    return sent[0]["status"] if sent else None


def test_too_many_requests_at_once_are_turned_away(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    app = make_app(limits={"queue_requests": 4})
    body = rows(shelf.find("trees"), table[:1])

    async def many() -> list[httpx.Response]:
        async with client(app) as asking:
            return await asyncio.gather(*(asking.post("/predict/trees", json=body) for _ in range(30)))

    answers = asyncio.run(many())
    refused = [a for a in answers if a.status_code == 503]
    assert refused
    assert len(refused) < 30
    assert all(a.headers["retry-after"] == "1" and a.json()["error"]["kind"] == "overloaded" for a in refused)
    assert ask(app, "POST", "/predict/trees", json=body).status_code == 200


def test_keys(make_app: Make, shelf: Shelf, table: pa.Table) -> None:
    app = make_app(keys=KeyRing([KEY]))
    body = rows(shelf.find("trees"), table[:1])
    for headers in (
        {},
        {"authorization": "Bearer wrong-wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
    ):
        for method, path in (
            ("POST", "/predict/trees"),
            ("GET", "/models"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
        ):
            refused = ask(app, method, path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
    assert ask(app, "POST", "/predict/trees", json=body, headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert ask(app, "GET", "/v2/health/live").status_code == ask(app, "GET", "/v2/health/ready").status_code == 200


def test_an_unforeseen_failure_tells_nothing(
    make_app: Make, monkeypatch: pytest.MonkeyPatch, shelf: Shelf, table: pa.Table
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret path /etc/passwd")

    monkeypatch.setattr("claydist.serving.answers.read_rows", fail)
    answer = ask(make_app(), "POST", "/predict/trees", json=rows(shelf.find("trees"), table[:1]))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_a_category_the_model_refuses_is_422(tmp_path: Path, table: pa.Table) -> None:
    registry = open_registry(str(tmp_path))
    data = DATA.model_copy(update={"unseen": "error", "max_categories": 100})
    register(registry, "strict", boosted(table, data=data), table)
    spec = ServeSpec(models=("strict",), access_log=False)
    app = Application(spec, Shelf(spec.models, registry), KeyRing())
    body = rows(app.shelf.find("strict"), table[:1])
    body["rows"][0]["carrier"] = "nobody"
    answer = ask(app, "POST", "/predict/strict", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "rows[0].carrier"
    wrong = table.set_column(1, "carrier", pa.array(["nobody"] * len(table)))
    answer = ask(app, "POST", "/predict/strict", content=arrow_stream(wrong), headers={"content-type": ARROW})
    assert answer.status_code == 422


def test_lifespan_and_websockets(make_app: Make) -> None:
    sent: list[Any] = []
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def both() -> None:
        await make_app()({"type": "lifespan"}, receive, send)

        async def connect() -> Any:
            return {"type": "websocket.connect"}

        await make_app()({"type": "websocket"}, connect, send)

    asyncio.run(both())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


def test_request_ids(make_app: Make) -> None:
    assert ask(make_app(), "GET", "/v2", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(ask(make_app(), "GET", "/v2", headers={"x-request-id": "bad id\t"}).headers["x-request-id"]) == 36


@pytest.mark.parametrize("n_rows", [300, 900])
def test_large_bodies_take_turns_and_wait_no_longer_than_said(
    n_rows: int, make_app: Make, shelf: Shelf, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, read_rows = make_app(limits={"queue_s": 0.5}), answers.read_rows
    body = json.dumps(rows(shelf.find("linear"), table[:n_rows])).encode()

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.03)
        return read_rows(*arguments)

    monkeypatch.setattr("claydist.serving.answers.read_rows", slowly)

    async def many() -> list[int]:
        async with client(app) as asking:
            asked = [asking.post("/predict/linear", content=body) for _ in range(60)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert set(asyncio.run(many())) == {200, 503}


def test_an_answer_that_nobody_reads_counts_until_its_connection_is_cut(make_app: Make, table: pa.Table) -> None:
    app = make_app(limits={"request_s": 2.0})
    body = arrow_stream(pa.concat_tables([table] * 4).combine_chunks())
    sent: list[dict[str, Any]] = []
    held: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 4:
            held.append(app._admission.n_bytes)
            await asyncio.sleep(20)

    headers = [(b"content-type", ARROW.encode()), (b"accept", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/predict/trees", "headers": headers}
    start = time.monotonic()
    asyncio.run(app(scope, receive, send))
    assert time.monotonic() - start < 15
    length = int(dict(sent[0]["headers"])[b"content-length"])
    assert held == [length]
    assert length > 4 << 16
    assert all(len(m["body"]) == 1 << 16 and m["more_body"] for m in sent[1:])
    assert app._n_requests == app._admission.n_bytes == 0


def test_a_large_answer_comes_whole_and_in_pieces() -> None:
    for n_bytes in (0, 1, 65_535, 65_536, 65_537, 131_072, 200_000):
        sent: list[dict[str, Any]] = []

        async def send(message: Any, sent: list[dict[str, Any]] = sent) -> None:
            sent.append(message)

        body = np.random.default_rng(0).bytes(n_bytes)
        asyncio.run(send_answer(send, Answer(body), None))
        assert b"".join(m["body"] for m in sent[1:]) == body
        assert max(len(m["body"]) for m in sent[1:]) <= 65_536
        assert [m.get("more_body", False) for m in sent[1:]] == [True] * (len(sent) - 2) + [False]


def test_many_unknown_names_are_counted_and_not_told(make_app: Make) -> None:
    row = {f"{i:x}": 1 for i in range(15_000)}
    start = time.monotonic()
    answer = ask(make_app(), "POST", "/predict/trees", json={"rows": [row]})
    assert time.monotonic() - start < 2
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["field"] == "rows[0].distance"
    assert "'distance' is absent" in error["message"]
    assert "'0' is unknown" in error["message"]
    assert f"and {15_000 + 9 - 8} more" in error["message"]
    assert len(answer.content) < 1000


def test_a_time_beyond_nanoseconds_is_refused_by_name(make_app: Make, table: pa.Table) -> None:
    at = table.column_names.index("booked")
    far = pa.array([2**40] * 5, pa.int64()).view(pa.timestamp("s", "America/New_York"))
    body = arrow_stream(table[:5].set_column(at, "booked", far))
    answer = ask(make_app(), "POST", "/predict/trees", content=body, headers={"content-type": ARROW})
    assert answer.status_code == 400
    assert "'booked' holds 5 timestamps outside the years 1677 to 2262" in answer.json()["error"]["message"]


def test_a_jobs_api_that_hangs_holds_up_nothing_else(
    make_app: Make, shelf: Shelf, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, free = make_app(limits={"request_s": 2.0}), threading.Event()
    monkeypatch.setattr(app._jobs, "look", lambda job_id: free.wait(20) and {})
    body = rows(shelf.find("trees"), table[:1500])

    async def many() -> tuple[list[int], list[int]]:
        async with client(app) as asking:
            waiting = [asyncio.create_task(asking.get("/batch/x")) for _ in range(20)]
            await asyncio.sleep(0.1)
            answers = [(await asking.post("/predict/trees", json=body)).status_code for _ in range(2)]
            assert await shelf.refresh() == []
            found = [(await task).status_code for task in waiting]
            assert sum(not call.done() for call in app._job_calls) == 2  # of the threads that hang
            free.set()
            assert (await asking.get("/batch/x")).status_code == 200
            return answers, found

    answered, refused = asyncio.run(many())
    assert answered == [200, 200]
    assert set(refused) == {503}
