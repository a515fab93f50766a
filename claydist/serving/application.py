"""The server as an ASGI application: routes, admission, and the way of a request through parse, predict and write.

It needs no Ray: tests and any ASGI server can run it. Serve runs one in each replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from claydist.errors import ClaydistError, DataError
from claydist.serving import answers, oip
from claydist.serving.admission import SMALL_BYTES, Admission
from claydist.serving.answers import ARROW, JSON
from claydist.serving.batching import Batcher
from claydist.serving.bulk import predict_matrix, predict_pieces
from claydist.serving.docs import PAGE, openapi
from claydist.serving.exchange import (
    PIECE_BYTES,
    Answer,
    Disconnected,
    Exchange,
    Receive,
    Scope,
    Send,
    json_answer,
    send_answer,
)  # fmt: skip
from claydist.serving.jobs import BatchJobs
from claydist.serving.keys import KeyRing
from claydist.serving.memory import Memory
from claydist.serving.refusals import Refusal, busy, refuse
from claydist.serving.settings import Limits, ServeSpec
from claydist.serving.shelf import Served, Shelf
from claydist.serving.telemetry import Exporter, Labels, Telemetry

logger = logging.getLogger("claydist.serving")

# A body beyond it would hold up the small requests beside it.
_PARSE_INLINE_BYTES = 128 << 10
_WRITE_INLINE_VALUES = 4000
# Calls of Ray's Jobs API at once: it may hang, and its callers wait no longer than for any answer.
_JOB_THREADS, _MOST_JOB_CALLS = 2, 8

Handler = Callable[[Exchange], Awaitable[Answer]]


class Application:
    """All endpoints of DESIGN section 9, for the models of one shelf.

    Parameters
    ----------
    spec : limits, roots and the access log.
    shelf : the models.
    keys : who may ask.
    adds_request_id : whether the answer's X-Request-ID is set here; under Serve it is set outside.
    exporter : hands the counters to Ray; None outside Ray.
    """

    def __init__(
        self,
        spec: ServeSpec,
        shelf: Shelf,
        keys: KeyRing,
        *,
        adds_request_id: bool = True,
        exporter: Exporter | None = None,
    ) -> None:
        self.shelf = shelf
        shelf.on_swap = self._count_swap
        self.telemetry = Telemetry(access_log=spec.access_log, gauges=self._gauges)
        self._limits: Limits = spec.limits
        self._keys = keys
        self._jobs = BatchJobs(spec)
        self._adds_request_id = adds_request_id
        self._exporter = exporter
        self._batcher = Batcher(spec.limits, self._count_batch)
        self._admission = Admission(spec.limits)
        self._turn = asyncio.Lock()  # of bodies parsed in the loop
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse")  # one thread: large ones take turns too
        self._job_threads = ThreadPoolExecutor(_JOB_THREADS, thread_name_prefix="jobs")
        self._job_calls: list[Future[Any]] = []
        self._n_requests = 0
        self._memory = Memory(lambda: not self._n_requests)
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._other_protocol(scope, receive, send)
            return
        if not self._is_started:
            self.start()
        start = time.perf_counter()
        exchange = Exchange(scope, receive)
        self._n_requests += 1
        try:
            answer = await self._answer(exchange)
        except Disconnected:
            return
        finally:
            self._n_requests -= 1
            if exchange.place is not None:
                exchange.place.leave()
        request_id = exchange.request_id if self._adds_request_id else None
        sending = send_answer(send, answer, request_id, head=exchange.method == "HEAD")
        # What goes in one piece is not held here, whether the client reads it or not.
        await (sending if len(answer.body) <= PIECE_BYTES else self._watched(sending, exchange, len(answer.body)))
        self._count_request(exchange, answer.status, time.perf_counter() - start)

    async def _watched(self, sending: Awaitable[None], exchange: Exchange, n_bytes: int) -> None:
        """Send a large answer, which counts until it is sent; a client that does not read it loses its connection."""
        self._n_requests += 1
        self._admission.n_bytes += n_bytes
        try:
            async with asyncio.timeout(self._limits.request_s):
                await sending
        except TimeoutError:
            logger.warning(
                "request %s: its client did not read %d bytes within %g s, and is cut off",
                exchange.request_id, n_bytes, self._limits.request_s,
            )  # fmt: skip
        finally:
            self._n_requests -= 1
            self._admission.n_bytes -= n_bytes

    def start(self) -> None:
        """Follow the aliases and write the log, in this event loop; the first request does it where nobody else has."""
        self._is_started = True
        self.shelf.follow()
        self.telemetry.start(self._exporter)
        self._memory.follow()

    def close(self) -> None:
        """Stop what `start` began."""
        self.shelf.close()
        self.telemetry.close()
        self._memory.close()
        self._batcher.close()
        self._parser.shutdown(wait=False)
        self._job_threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, exchange: Exchange) -> Answer:
        try:
            handler = self._route(exchange)
            if handler not in (self._live, self._ready, self._docs):
                self._keys.check(exchange.headers.get(b"authorization", b""))
                if self._n_requests > self._limits.queue_requests:
                    raise busy(f"{self._limits.queue_requests} requests are at work already; ask again a little later")
            async with asyncio.timeout(self._limits.request_s):
                return await handler(exchange)
        except Refusal as e:
            return self._refused(exchange, e)
        except TimeoutError:
            return self._refused(exchange, self._too_slow(exchange))
        except DataError as e:
            return self._refused(exchange, refuse(e, answers.status_of(e)))
        except ClaydistError as e:
            return self._refused(exchange, refuse(e))
        except MemoryError:
            logger.warning("request %s needs more memory than there is", exchange.request_id)
            return self._refused(exchange, busy("there is not enough memory; send fewer rows, or ask again later"))
        except (Disconnected, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            return self._refused(
                exchange, Refusal(500, f"the server failed; request {exchange.request_id} is in its log")
            )

    def _too_slow(self, exchange: Exchange) -> Refusal:
        limit = f"{self._limits.request_s:g} s"
        if exchange.body_is_read or exchange.place is None:
            return busy(f"the answer took longer than {limit}; send fewer rows, or ask again later")
        return Refusal(408, f"the body took longer than {limit} to arrive")

    def _refused(self, exchange: Exchange, refusal: Refusal) -> Answer:
        is_oip = exchange.parts[:1] == ["v2"]
        tree = {"error": refusal.text} if is_oip else refusal.to_json()
        return json_answer(tree, refusal.status, refusal.headers)

    def _route(self, exchange: Exchange) -> Handler:
        allowed = self._handlers(exchange.parts)
        method = "GET" if exchange.method == "HEAD" else exchange.method
        handler = allowed.get(method)
        if handler is None:
            if not allowed:
                raise Refusal(404, "nothing is here; see /docs for the endpoints")
            allow = ", ".join(sorted(allowed))
            raise Refusal(405, f"expected one of {allow}", headers=[(b"allow", allow.encode())])
        return handler

    def _handlers(self, parts: list[str]) -> dict[str, Handler]:
        """What a path can be asked for, by method; empty where nothing is there."""
        match parts:
            case ["predict", _]:
                return {"POST": self._predict}
            case ["v2", "models", _, "infer"] | ["v2", "models", _, "versions", _, "infer"]:
                return {"POST": self._infer}
            case ["v2", "models", _] | ["v2", "models", _, "versions", _]:
                return {"GET": self._model_metadata}
            case ["v2", "models", _, "ready"] | ["v2", "models", _, "versions", _, "ready"]:
                return {"GET": self._model_ready}
            case ["v2"] | ["v2", ""]:
                return {"GET": self._server_metadata}
            case ["v2", "health", "live"]:
                return {"GET": self._live}
            case ["v2", "health", "ready"]:
                return {"GET": self._ready}
            case ["batch", _]:
                return {"POST": self._submit, "GET": self._job, "DELETE": self._stop}
            case ["models"]:
                return {"GET": self._models}
            case ["metrics"]:
                return {"GET": self._metrics}
            case ["openapi.json"]:
                return {"GET": self._openapi}
            case ["docs"] | [""]:
                return {"GET": self._docs}
        return {}

    async def _predict(self, exchange: Exchange) -> Answer:
        served = self._find(exchange, exchange.parts[1])
        is_arrow = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == ARROW
        wants_arrow = is_arrow if ARROW not in (accept := exchange.headers.get(b"accept", b"")) else True
        wants_arrow = wants_arrow and JSON not in accept
        limits = self._limits
        if is_arrow:
            parts = await self._predict_arrow(exchange, served)
        else:
            matrix = await self._parsed(exchange, served, "json", limits.json_bytes, answers.read_rows, limits.rows)
            parts = [await self._predict_matrix(exchange, served, matrix)]
        start = time.perf_counter()
        content_type, write = (ARROW, answers.arrow_predictions) if wants_arrow else (JSON, _json_predictions)
        is_small = _is_small(exchange, served)
        body = write(served, parts) if is_small else await asyncio.to_thread(write, served, parts)
        self._stage("write", start)
        return Answer(body, content_type, 200, _identity_headers(served))

    async def _predict_arrow(self, exchange: Exchange, served: Served) -> list[np.ndarray]:
        limits = self._limits
        table = await self._parsed(exchange, served, "arrow", limits.body_bytes, answers.read_arrow, limits.rows)
        start = time.perf_counter()
        exchange.rows = table.num_rows
        parts = []
        async for values, piece in predict_pieces(served, table, self._batcher, limits.batch_rows, exchange.deadline):
            exchange.finish_wait()
            self._count_values(served, piece.unseen, piece.missing)
            parts.append(values)
        self._stage("predict", start)
        return parts

    async def _infer(self, exchange: Exchange) -> Answer:
        served = self._find(exchange, exchange.parts[2], exchange.parts[4] if len(exchange.parts) == 6 else None)
        limits = self._limits
        header = exchange.headers.get(b"inference-header-content-length")
        kind, limit = ("json", limits.json_bytes) if header is None else ("tensors", limits.body_bytes)
        asked = await self._parsed(exchange, served, kind, limit, oip.parse, header, limits.rows, limits.json_bytes)
        values = await self._predict_matrix(exchange, served, asked.matrix)
        start = time.perf_counter()
        write = partial(oip.respond, served, asked, values)
        text, length = write() if _is_small(exchange, served) else await asyncio.to_thread(write)
        self._stage("write", start)
        if length is None:
            return Answer(text)
        return Answer(text, b"application/octet-stream", 200, [(b"inference-header-content-length", b"%d" % length)])

    async def _predict_matrix(self, exchange: Exchange, served: Served, matrix: Any) -> np.ndarray:
        start = time.perf_counter()
        exchange.rows = len(matrix.values)
        self._count_values(served, matrix.unseen, matrix.missing)
        values = await predict_matrix(
            served, matrix.values, self._batcher, self._limits.batch_rows, exchange.deadline, exchange.finish_wait
        )
        self._stage("predict", start)
        return values

    async def _parsed(
        self, exchange: Exchange, served: Served, kind: str, limit: int, parse: Callable[..., Any], *rest: Any
    ) -> Any:
        """What `parse` makes of the body, once there is time for it, and it is read.

        Parameters
        ----------
        kind : what takes about the same time for the same size.
        limit : bytes at the most.
        parse : called with the model, the body and `rest`.
        """
        start = time.perf_counter()
        body = await exchange.body(limit, partial(self._admission.enter, f"{kind} {served.name}"))
        read = self._stage("read", start)
        found = await self._in_turn(exchange, len(body), partial(parse, served, body, *rest))
        self._stage("parse", read)
        return found

    async def _in_turn(self, exchange: Exchange, n_bytes: int, parse: Callable[[], Any]) -> Any:
        """What `parse` gives: at once for a small body, else when it is its turn, for large ones in a thread.

        Answers go out between two turns, and one large body at a time takes the many times of its size that JSON needs.
        """
        place = exchange.place
        if n_bytes <= SMALL_BYTES or place is None:
            return parse()
        self._memory.use()
        if n_bytes <= _PARSE_INLINE_BYTES:
            async with self._turn:
                await asyncio.sleep(0)
                return place.spend(parse)
        place.work = self._parser.submit(place.spend, parse)
        return await asyncio.wrap_future(place.work)

    def _find(self, exchange: Exchange, name: str, version: str | None = None) -> Served:
        served = self.shelf.find(name, version)
        exchange.model, exchange.version = served.name, served.version
        return served

    async def _models(self, exchange: Exchange) -> Answer:
        return json_answer({"models": [self._describe(served) for served in self.shelf.served]})

    def _describe(self, served: Served) -> dict[str, Any]:
        target = served.predictor.target
        inputs = [{"name": c.name, "type": c.describe()} for c in served.predictor.schema.columns]
        slot = next((s for s in self.shelf.slots if s.current is served), None)
        return {
            **served.identity(), "reference": slot.text if slot else None, "task": served.task,
            "kind": served.predictor.model.kind, "classes": list(target.classes), "columns": inputs,
            "predictions": served.outputs.names, "created_at": served.manifest.get("created_at"),
        }  # fmt: skip

    async def _server_metadata(self, exchange: Exchange) -> Answer:
        return json_answer(oip.server_metadata())

    async def _model_metadata(self, exchange: Exchange) -> Answer:
        served = self._find(exchange, exchange.parts[2], exchange.parts[4] if len(exchange.parts) == 5 else None)
        return json_answer(oip.model_metadata(served, self.shelf.versions(served.name)))

    async def _model_ready(self, exchange: Exchange) -> Answer:
        served = self._find(exchange, exchange.parts[2], exchange.parts[4] if len(exchange.parts) == 6 else None)
        return json_answer({"name": served.name, "ready": True})

    async def _live(self, exchange: Exchange) -> Answer:
        return Answer(b'{"live":true}')

    async def _ready(self, exchange: Exchange) -> Answer:
        return Answer(b'{"ready":true}')

    async def _docs(self, exchange: Exchange) -> Answer:
        return Answer(PAGE, b"text/html; charset=utf-8", 200, _PAGE_HEADERS)

    async def _openapi(self, exchange: Exchange) -> Answer:
        return json_answer(openapi([slot.current for slot in self.shelf.slots], has_keys=bool(self._keys)))

    async def _metrics(self, exchange: Exchange) -> Answer:
        return Answer(self.telemetry.text().encode(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _submit(self, exchange: Exchange) -> Answer:
        served = self._find(exchange, exchange.parts[1])
        self._jobs.require_roots()
        limit = min(self._limits.json_bytes, _PARSE_INLINE_BYTES)
        tree = answers.parse_json(await exchange.body(limit, partial(self._admission.enter, "batch")))
        return json_answer(await self._call_jobs(self._jobs.submit, served, tree), 202)

    async def _job(self, exchange: Exchange) -> Answer:
        return json_answer(await self._call_jobs(self._jobs.look, exchange.parts[1]))

    async def _stop(self, exchange: Exchange) -> Answer:
        return json_answer(await self._call_jobs(self._jobs.stop, exchange.parts[1]), 202)

    async def _call_jobs(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call of the Jobs API gives, in threads of its own: one that hangs must not hold up anything else."""
        self._job_calls = [future for future in self._job_calls if not future.done()]
        if len(self._job_calls) >= _MOST_JOB_CALLS:
            raise busy(f"{len(self._job_calls)} calls wait for Ray's Jobs API already; ask again a little later", 5)
        self._job_calls.append(self._job_threads.submit(call, *arguments))
        return await asyncio.wrap_future(self._job_calls[-1])

    async def _other_protocol(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begin and end with the ASGI server; close WebSockets."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.start()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                self.close()
                return

    def _stage(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.telemetry.observe(stage, now - since)
        return now

    def _count_values(self, served: Served, unseen: Mapping[str, int], missing: Mapping[str, int]) -> None:
        if unseen or missing:
            labels = _model_labels(served)
            self.telemetry.count_each("claydist_unseen_categories_total", labels, unseen)
            self.telemetry.count_each("claydist_missing_values_total", labels, missing)

    def _count_swap(self, served: Served) -> None:
        self.telemetry.count("claydist_swaps_total", _model_labels(served))

    def _count_batch(self, n_rows: int, seconds: float) -> None:
        self.telemetry.count("claydist_batches_total", ())
        self.telemetry.count("claydist_batch_rows_total", (), n_rows)

    def _count_request(self, exchange: Exchange, status: int, seconds: float) -> None:
        telemetry = self.telemetry
        door = exchange.parts[0] if exchange.parts and exchange.parts[0] in _DOORS else "other"
        telemetry.count("claydist_requests_total", (("model", exchange.model), ("door", door), ("status", str(status))))
        if exchange.rows and status == 200:
            telemetry.count(
                "claydist_rows_total", (("model", exchange.model), ("version", exchange.version)), exchange.rows
            )
        telemetry.observe("total", seconds)
        telemetry.access(
            time.time(), exchange.request_id, exchange.method, exchange.path[:200], status,
            exchange.model, exchange.version, exchange.rows, seconds,
        )  # fmt: skip

    def _gauges(self) -> Iterator[tuple[str, Labels, float]]:
        yield "claydist_requests_in_progress", (), self._n_requests
        yield "claydist_queue_rows", (), self._batcher.n_waiting_rows
        for served in self.shelf.served:
            yield "claydist_model_info", (*_model_labels(served), ("digest", served.digest)), 1
        for slot in self.shelf.slots:
            yield "claydist_follow_errors", (("reference", slot.text),), float(bool(slot.error))


_DOORS = ("predict", "v2", "batch")
_POLICY = b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
_PAGE_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"cache-control", b"no-store"),
]  # fmt: skip


def _is_small(exchange: Exchange, served: Served) -> bool:
    """True for an answer that is written in less time than the way to a thread and back takes."""
    return exchange.rows * len(served.outputs.names) < _WRITE_INLINE_VALUES


def _json_predictions(served: Served, parts: list[np.ndarray]) -> bytes:
    return answers.predictions(served, parts[0] if len(parts) == 1 else np.concatenate(parts))


def _identity_headers(served: Served) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-claydist-model", served.name.encode()), (b"x-claydist-version", served.version.encode()),
        (b"x-claydist-digest", served.digest.encode()),
    ]  # fmt: skip


def _model_labels(served: Served) -> Labels:
    return ("model", served.name), ("version", served.version)
