"""What a replica counts: its own Prometheus text, the same counters for Ray's exporter, and the access log.

A call into `ray.util.metrics` costs as much as a tenth of a request, so numbers are summed here and handed to Ray once
a second, from the event loop's idle time.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import orjson

logger = logging.getLogger("claydist.serving")

STAGES = ("read", "parse", "predict", "write", "total")
BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FLUSH_S = 1.0
_MOST_LINES = 2000

Labels = tuple[tuple[str, str], ...]

_HELP = {
    "claydist_requests_total": "requests by model, door and HTTP status",
    "claydist_rows_total": "rows predicted, by model and version",
    "claydist_unseen_categories_total": "categories not seen in training, by feature",
    "claydist_missing_values_total": "missing values, by feature",
    "claydist_batches_total": "predictions run; rows by batches is the size of a batch",
    "claydist_batch_rows_total": "rows of the predictions run",
    "claydist_stage_seconds_bucket_total": "requests whose stage took `le` seconds at the most",
    "claydist_stage_seconds_sum_total": "seconds of a stage, of all requests",
    "claydist_stage_seconds_count_total": "requests that passed a stage",
    "claydist_swaps_total": "versions that took the place of another",
    "claydist_requests_in_progress": "requests at work or waiting",
    "claydist_queue_rows": "rows waiting for a prediction",
    "claydist_model_info": "1 for each version that answers, in front or kept warm",
    "claydist_follow_errors": "1 while a reference cannot follow its alias",
}


class Histogram:
    """Counts of seconds by bucket."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds


class Telemetry:
    """All counters of a replica, and its access log.

    Parameters
    ----------
    access_log : write a line of JSON for each request.
    gauges : gives name, labels and value of what is looked up and not counted.
    """

    def __init__(
        self,
        *,
        access_log: bool = False,
        gauges: Callable[[], Iterable[tuple[str, Labels, float]]] = lambda: (),
        write: Callable[[str], Any] | None = None,
    ) -> None:
        self._counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self._stages = {stage: Histogram() for stage in STAGES}
        self._access_log = access_log
        self._lines: list[tuple[Any, ...]] = []
        self._n_dropped = 0
        self._gauges = gauges
        self._write = write or _write_out
        self._exporter: Exporter | None = None
        self._task: asyncio.Task[None] | None = None

    def count(self, name: str, labels: Labels, amount: float = 1) -> None:
        """Add to a counter."""
        self._counters[name, labels] += amount

    def count_each(self, name: str, labels: Labels, amounts: Mapping[str, int]) -> None:
        """Add to one counter for each feature."""
        for feature, amount in amounts.items():
            self._counters[name, (*labels, ("feature", feature))] += amount

    def observe(self, stage: str, seconds: float) -> None:
        """Count a latency of a stage."""
        self._stages[stage].observe(seconds)

    def access(self, *line: Any) -> None:
        """Remember a request for the log: when, request id, method, path, status, model, version, rows, seconds."""
        if not self._access_log:
            return
        if len(self._lines) < _MOST_LINES:
            self._lines.append(line)
        else:
            self._n_dropped += 1

    def start(self, exporter: Exporter | None = None) -> None:
        """Begin to write the log, and to export, in this event loop."""
        if self._task is None:
            self._exporter = exporter
            self._task = asyncio.get_running_loop().create_task(self._flush_forever())

    def close(self) -> None:
        """Write what is left, and stop."""
        if self._task is not None:
            self._task.cancel()
        self.flush()

    def flush(self) -> None:
        """Write the log's lines, and export the counters."""
        if self._lines:
            lines, self._lines = self._lines, []
            self._write("".join(_line(line) for line in lines))
        if self._n_dropped:
            self._write(f'{{"access":"dropped","lines":{self._n_dropped}}}\n')
            self._n_dropped = 0
        if self._exporter is not None:
            self._exporter.export({**self._counters, **self._stage_counters()}, self._gauges())

    def text(self) -> str:
        """Everything in Prometheus's text format."""
        families: dict[str, list[str]] = defaultdict(list)
        for (name, labels), value in [*self._counters.items(), *(((n, la), v) for n, la, v in self._gauges())]:
            families[name].append(f"{name}{_labels(labels)} {_number(value)}")
        lines = []
        for name, samples in sorted(families.items()):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {_HELP.get(name, name)}", f"# TYPE {name} {kind}", *sorted(samples)]
        lines += self._histogram_lines("claydist_stage_seconds")
        return "\n".join(lines) + "\n"

    def _histogram_lines(self, name: str) -> list[str]:
        lines = [f"# HELP {name} seconds of each stage of a request", f"# TYPE {name} histogram"]
        for stage, histogram in self._stages.items():
            total = 0
            for bound, n in zip([*map(str, BUCKETS_S), "+Inf"], histogram.counts, strict=True):
                total += n
                lines.append(f'{name}_bucket{{stage="{stage}",le="{bound}"}} {total}')
            lines += [
                f'{name}_sum{{stage="{stage}"}} {_number(histogram.total)}',
                f'{name}_count{{stage="{stage}"}} {total}',
            ]
        return lines

    def _stage_counters(self) -> dict[tuple[str, Labels], float]:
        """The histograms as counters: to hand each latency to Ray would cost more than the request."""
        counters: dict[tuple[str, Labels], float] = {}
        for stage, histogram in self._stages.items():
            at = ("stage", stage)
            n_until = accumulate(histogram.counts)
            for bound, n in zip([*map(str, BUCKETS_S), "+Inf"], n_until, strict=True):
                counters["claydist_stage_seconds_bucket_total", (at, ("le", bound))] = n
            counters["claydist_stage_seconds_sum_total", (at,)] = histogram.total
            counters["claydist_stage_seconds_count_total", (at,)] = sum(histogram.counts)
        return counters

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                self.flush()
            except Exception:  # of the log's disk or of Ray: the next lines may go out again
                logger.exception("the access log or the metrics could not be written")


class Exporter:
    """Hands counters and gauges to Ray, which exports them with those of the cluster."""

    def __init__(self) -> None:
        self._sent: dict[tuple[str, Labels], float] = {}
        self._shown: set[tuple[str, Labels]] = set()
        self._metrics: dict[str, Any] = {}

    def export(self, counters: Mapping[tuple[str, Labels], float], gauges: Iterable[tuple[str, Labels, float]]) -> None:
        """Send what has been added since the last time."""
        for key, value in counters.items():
            if (added := value - self._sent.get(key, 0.0)) > 0:
                self._metric(*key).inc(added, dict(key[1]))
                self._sent[key] = value
        gone = self._shown
        self._shown = set()
        for name, labels, value in gauges:
            self._metric(name, labels).set(value, dict(labels))
            self._shown.add((name, labels))
        # Ray shows a gauge for ever: what is not there any more is 0.
        for name, labels in gone - self._shown:
            self._metric(name, labels).set(0, dict(labels))

    def _metric(self, name: str, labels: Labels) -> Any:
        if name not in self._metrics:
            from ray.util import metrics

            kind = metrics.Counter if name.endswith("_total") else metrics.Gauge
            # Ray's exporter adds the `_total` of Prometheus by itself.
            self._metrics[name] = kind(name.removesuffix("_total"), _HELP.get(name, name), tuple(k for k, _ in labels))
        return self._metrics[name]


def _write_out(text: str) -> None:
    # Serve puts its own logger, which keeps a thousand lines back, in the place of sys.stdout.
    out = sys.__stdout__ or sys.stdout
    out.write(text)
    out.flush()


def _line(line: tuple[Any, ...]) -> str:
    when, request_id, method, path, status, model, version, rows, seconds = line
    tree = {
        "time": datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds"), "request_id": request_id,
        "method": method, "path": path, "status": status, "model": model, "version": version, "rows": rows,
        "ms": round(seconds * 1000, 3),
    }  # fmt: skip
    return orjson.dumps(tree).decode() + "\n"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escape(value)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
