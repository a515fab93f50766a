from __future__ import annotations

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
    ]
