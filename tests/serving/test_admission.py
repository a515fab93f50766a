from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asking import client
from serving_models import boosted, flights

from claydist.serving.admission import SMALL_BYTES, Admission, Place
from claydist.serving.application import Application
from claydist.serving.refusals import Refusal
from claydist.serving.settings import Limits
from claydist.values import to_plain

LARGE = 100_000


async def taught(s_per_byte: float, **limits: Any) -> Admission:
    """An admission that has seen one body, of so many seconds a byte."""
    admission = Admission(Limits(**limits))
    place = admission.enter("json", LARGE)
    place.arrive(LARGE)
    await asyncio.sleep(s_per_byte * LARGE)
    place.finish()
    place.leave()
    assert admission.wait_s == admission.n_bytes == 0
    return admission


def test_what_would_wait_too_long_is_refused_by_its_claim() -> None:
    async def run() -> None:
        admission = await taught(2e-6, queue_s=2.0)
        places: list[Place] = []

        def fill() -> None:
            while len(places) < 10:
                places.append(admission.enter("json", LARGE))

        with pytest.raises(Refusal, match="would wait for about") as caught:
            fill()
        assert caught.value.status == 503
        assert dict(caught.value.headers) == {b"retry-after": b"1"}
        assert 2 <= len(places) <= 8
        assert admission.wait_s <= 0.8 * 2.0
        assert admission.n_bytes == len(places) * LARGE
        admission.enter("json", SMALL_BYTES).leave()
        for place in places:
            place.leave()
        assert admission.wait_s == admission.n_bytes == 0

    asyncio.run(run())


def test_a_small_body_says_nothing_of_a_large_one() -> None:
    async def run() -> None:
        admission = await taught(2e-6, queue_s=1.0)
        waiting = admission.enter("json", LARGE)
        # By the bytes of the small one it would take 20 s.
        admission.enter("json", 100 * LARGE).leave()
        waiting.leave()

    asyncio.run(run())


def test_where_nothing_is_at_work_everything_is_admitted_and_the_estimate_recovers() -> None:
    async def run() -> None:
        admission = await taught(4e-6, queue_s=0.2)
        for _ in range(60):
            place = admission.enter("json", LARGE)
            place.arrive(LARGE)
            place.finish()
            place.leave()
        assert admission.seconds("json", LARGE) < 0.01

    asyncio.run(run())


def test_a_client_that_sends_slowly_does_not_keep_others_out() -> None:
    async def run() -> None:
        admission = await taught(2e-6, queue_s=0.3)
        slow = admission.enter("json", LARGE)
        with pytest.raises(Refusal):
            admission.enter("json", LARGE)
        await asyncio.sleep(0.35)
        assert admission.wait_s == 0
        admission.enter("json", LARGE).leave()
        slow.arrive(LARGE)
        assert admission.wait_s > 0
        assert slow.deadline == pytest.approx(time.monotonic() + 0.3, abs=0.05)
        slow.leave()
        assert admission.wait_s == admission.n_bytes == 0

    asyncio.run(run())


def test_claimed_bytes_are_bounded() -> None:
    async def run() -> None:
        admission = Admission(Limits(queue_bytes=100_000))
        first = admission.enter("json", 99_000)
        with pytest.raises(Refusal, match="99000 bytes"):
            admission.enter("json", 20_000)
        other = admission.enter("json", 500)  # small ones always pass
        with pytest.raises(Refusal):
            other.hold(20_000)
        first.leave()
        other.hold(200_000)  # alone, a body without a claim may be as large as one with it
        other.leave()
        assert admission.n_bytes == 0

    asyncio.run(run())


def test_a_request_that_leaves_holds_its_bytes_until_the_thread_is_done() -> None:
    free, pool = threading.Event(), ThreadPoolExecutor(1)

    async def run() -> None:
        admission = Admission(Limits())
        place: Place = admission.enter("json", LARGE)
        place.arrive(LARGE)
        place.work = pool.submit(free.wait, 10)
        place.leave()
        assert admission.n_bytes == LARGE
        assert admission.wait_s > 0
        free.set()
        while admission.n_bytes:
            await asyncio.sleep(0.01)
        assert admission.wait_s == 0
        assert place.work is None  # which has what was parsed, though the answer is still on its way

    asyncio.run(asyncio.wait_for(run(), 10))
    pool.shutdown()


def test_large_bodies_are_parsed_one_at_a_time_though_their_clients_leave(
    make_app: Callable[..., Application], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, free = make_app(), threading.Event()
    at_work, most, n_parsed = 0, 0, 0

    def slow(*_: Any) -> None:
        nonlocal at_work, most, n_parsed
        at_work += 1
        most = max(most, at_work)
        assert free.wait(10)
        at_work -= 1
        n_parsed += 1
        raise Refusal(400, "parsed")

    monkeypatch.setattr("claydist.serving.answers.read_rows", slow)
    body = b" " * (200 << 10)

    async def run() -> list[Any]:
        async with client(app) as asking:
            left = [asyncio.create_task(asking.post("/predict/trees", content=body)) for _ in range(3)]
            await asyncio.sleep(0.1)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            assert app._admission.n_bytes == len(body)  # of the one that the thread is at
            stays = [asyncio.create_task(asking.post("/predict/trees", content=body)) for _ in range(2)]
            await asyncio.sleep(0.1)
            free.set()
            return await asyncio.gather(*stays)

    assert [a.status_code for a in asyncio.run(run())] == [400, 400]
    assert (most, n_parsed) == (1, 3)
    assert app._admission.n_bytes == app._admission.wait_s == 0


def test_at_four_times_the_capacity_the_server_answers_what_it_takes_in_time(
    make_app: Callable[..., Application],
) -> None:
    app, queue_s, parse_s = make_app(limits={"queue_s": 0.6}), 0.6, 0.05
    table = flights(900, seed=1)
    body = json.dumps({"rows": to_plain(table, boosted(table).plan)}).encode()
    took: list[tuple[int, float]] = []
    most = 0

    async def run() -> None:
        nonlocal most
        async with client(app) as asking:

            async def one() -> None:
                began = time.monotonic()
                answer = await asking.post("/predict/trees", content=body)
                took.append((answer.status_code, time.monotonic() - began))

            tasks = []
            for _ in range(100):
                tasks.append(asyncio.create_task(one()))
                await asyncio.sleep(parse_s / 4)
                most = max(most, app._n_requests)
            await asyncio.gather(*tasks)

    read = app_read_rows(parse_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("claydist.serving.answers.read_rows", read)
        asyncio.run(run())
    statuses = [status for status, _ in took]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) > 15
    # Those that are refused are refused at once: what is held is what will be answered.
    assert most < 2.5 * queue_s / parse_s
    assert max(s for status, s in took if status == 200) < queue_s + 0.5


def app_read_rows(seconds: float) -> Callable[..., Any]:
    from claydist.serving import answers

    real = answers.read_rows

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments)

    return slow
