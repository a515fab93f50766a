from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from claydist.serving.telemetry import BUCKETS_S, Exporter, Histogram, Telemetry


def test_a_histogram_counts_each_second_once() -> None:
    histogram = Histogram()
    for seconds in (0.0001, BUCKETS_S[0], 0.003, 99.0):
        histogram.observe(seconds)
    assert histogram.counts[0] == 2
    assert histogram.counts[-1] == 1
    assert sum(histogram.counts) == 4
    assert histogram.total == pytest.approx(99.0036)


def test_text_is_what_prometheus_reads() -> None:
    telemetry = Telemetry(gauges=lambda: [("claydist_queue_rows", (), 3)])
    telemetry.count("claydist_rows_total", (("model", 'a"b\\c\nd'),), 2)
    telemetry.observe("parse", 0.003)
    lines = telemetry.text().splitlines()
    assert r'claydist_rows_total{model="a\"b\\c\nd"} 2' in lines
    assert "claydist_queue_rows 3" in lines
    assert "# TYPE claydist_rows_total counter" in lines
    assert 'claydist_stage_seconds_bucket{stage="parse",le="0.0025"} 0' in lines
    assert 'claydist_stage_seconds_bucket{stage="parse",le="0.005"} 1' in lines
    assert 'claydist_stage_seconds_count{stage="parse"} 1' in lines


def test_the_access_log_is_lines_of_json() -> None:
    written: list[str] = []
    telemetry = Telemetry(access_log=True, write=written.append)
    telemetry.access(0.0, 'id"1', "POST", "/predict/ü\n{", 200, "m", "3", 7, 0.0123)
    telemetry.flush()
    telemetry.flush()
    (line,) = "".join(written).splitlines()
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000+00:00", "request_id": 'id"1', "method": "POST", "path": "/predict/ü\n{",
        "status": 200, "model": "m", "version": "3", "rows": 7, "ms": 12.3,
    }  # fmt: skip


def test_a_log_that_nobody_flushes_stays_small() -> None:
    written: list[str] = []
    telemetry = Telemetry(access_log=True, write=written.append)
    for _ in range(2500):
        telemetry.access(0.0, "id", "GET", "/", 200, "", "", 0, 0.0)
    telemetry.flush()
    lines = "".join(written).splitlines()
    assert len(lines) == 2001
    assert json.loads(lines[-1]) == {"access": "dropped", "lines": 500}


def test_counters_are_exported_by_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Metric:
        def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
            self.name = name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            sent.append((self.name, value, tags))

        set = inc

    exporter = Exporter()
    monkeypatch.setattr("ray.util.metrics.Counter", Metric)
    monkeypatch.setattr("ray.util.metrics.Gauge", Metric)
    counters = {("claydist_rows_total", (("model", "m"),)): 5.0}
    exporter.export(counters, [("claydist_queue_rows", (), 2)])
    counters["claydist_rows_total", (("model", "m"),)] = 8.0
    exporter.export(counters, [])
    exporter.export(counters, [])
    assert sent == [
        ("claydist_rows", 5.0, {"model": "m"}),
        ("claydist_queue_rows", 2, {}),
        ("claydist_rows", 3.0, {"model": "m"}),
        ("claydist_queue_rows", 0, {}),
    ]


def test_numbers_are_written_whole() -> None:
    telemetry = Telemetry(gauges=lambda: [("claydist_queue_rows", (), 12_345_718)])
    telemetry.count("claydist_rows_total", (), 12_345_718)
    telemetry.observe("parse", 1234567.125)
    lines = telemetry.text().splitlines()
    assert "claydist_rows_total 12345718" in lines
    assert "claydist_queue_rows 12345718" in lines
    assert 'claydist_stage_seconds_sum{stage="parse"} 1234567.125' in lines


class Told:
    """What Ray's exporter would show."""

    values: dict[Any, float]

    def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
        self.name = name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = (self.name, *tags.values())
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self.name, *tags.values()] = value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    Told.values = {}
    monkeypatch.setattr("ray.util.metrics.Counter", Told)
    monkeypatch.setattr("ray.util.metrics.Gauge", Told)
    return Told.values


def test_a_gauge_that_is_gone_is_zero_in_rays_exporter(told: dict[Any, float]) -> None:
    exporter = Exporter()
    for version in ("1", "2", "2"):
        exporter.export({}, [("claydist_model_info", (("version", version),), 1)])
    assert told == {("claydist_model_info", "1"): 0, ("claydist_model_info", "2"): 1}


def test_stages_reach_rays_exporter(told: dict[Any, float]) -> None:
    telemetry = Telemetry()
    telemetry._exporter = Exporter()
    for seconds in (0.003, 0.003, 99.0):
        telemetry.observe("parse", seconds)
        telemetry.flush()
    assert told["claydist_stage_seconds_bucket", "parse", "0.005"] == 2
    assert told["claydist_stage_seconds_bucket", "parse", "+Inf"] == 3
    assert told["claydist_stage_seconds_count", "parse"] == 3
    assert told["claydist_stage_seconds_sum", "parse"] == pytest.approx(99.006)
    assert ("claydist_stage_seconds_bucket", "parse", "0.0025") not in told


def test_a_log_that_failed_once_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry, n_flushed = Telemetry(), []

    def flush() -> None:
        n_flushed.append(1)
        if len(n_flushed) == 1:
            raise OSError(28, "No space left on device")

    async def run() -> None:
        monkeypatch.setattr(telemetry, "flush", flush)
        telemetry.start(None)
        while len(n_flushed) < 3:
            await asyncio.sleep(0.01)
        telemetry.close()

    monkeypatch.setattr("claydist.serving.telemetry._FLUSH_S", 0.001)
    asyncio.run(asyncio.wait_for(run(), 10))
