# ruff: noqa: E402  Ray reads its environment at import
"""Kill scoring runs at random moments on a cluster of two nodes, rerun each, and watch the output by two readers.

    python -m tests.benchmarks.score_kill --kills 24

In every round another model is to replace what is published of three dates. The driver, a worker or the raylet of the
second node gets SIGKILL; then the same command runs to its end. All the while one reader polls by `read_scores` and one
globs `**/*.parquet`; each of their answers must be a date of the old or of the new model, whole. The end prints how
many runs were killed, how many answers were read, and how many were a clean not-found.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

os.environ["RAY_AUTH_MODE"] = "disabled"

from claydist.cluster import prepare_environment

prepare_environment()

from claydist.errors import ClaydistError
from claydist.registry import open_registry
from claydist.scoring.readers import read_scores
from tests.scoring.support import FIRST, make_predictor, make_registry, make_rows, make_spec

WORKERS = ("ray::score_task", "ray::warm_up", "ray::IDLE")
N_DAYS, N_FILES, ROWS_PER_FILE = 3, 6, 50_000
FAST_HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
    "health_check_timeout_ms": 500, "health_check_failure_threshold": 3,
}  # fmt: skip


def drive(folder: str, version: str, address: str) -> int:
    """One scoring run, as the command does it; the exit code."""
    import ray

    from claydist.display import Plain
    from claydist.scoring.run import score

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    spec = make_spec(folder, model=f"late:{version}")
    try:
        summary = score(spec, open_registry(None, spec.registry), Plain(), replace_stale=True)
    except ClaydistError as e:
        print(e, flush=True)
        return e.exit_code
    print(json.dumps({"stages": summary.summary["stages"]}), flush=True)
    return summary.exit_code


class Watcher(threading.Thread):
    """A reader that never stops, and what it has seen."""

    def __init__(self, read: Any, versions: list[dict[date, pa.Table]]) -> None:
        super().__init__(daemon=True)
        self.read, self.versions = read, versions
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stopped = False

    def run(self) -> None:
        days = sorted(self.versions[0])
        while not self.stopped:
            day = random.choice(days)
            time.sleep(0.02)
            try:
                table = self.read(day)
            except (FileNotFoundError, ClaydistError) as e:
                self.seen[f"not found ({type(e).__name__})"] += 1
                continue
            if table is None:
                self.seen["nothing there"] += 1
                continue
            version = next((i for i, v in enumerate(self.versions) if table.equals(v[day])), None)
            self.seen["wrong" if version is None else f"version {version + 1}"] += 1
            if version is None:
                self.wrong.append(f"{day}: {table.num_rows} rows")


def by_manifest(output: str) -> Any:
    def read(day: date) -> pa.Table:
        return read_scores(output, day).drop_columns("dt")

    return read


def by_glob(output: str) -> Any:
    published: set[date] = set()

    def read(day: date) -> pa.Table | None:
        paths = sorted(p for p in _walk(output) if f"dt={day}" in p)
        if not paths:
            # Before the first publication there is nothing; afterwards an empty answer would be a part.
            return pa.table({}) if day in published else None
        table = _read(paths)
        published.add(day)
        return table

    return read


def _read(paths: list[str]) -> pa.Table:
    return pa.concat_tables([pq.read_table(p, partitioning=None).replace_schema_metadata(None) for p in paths])


def _walk(output: str) -> list[str]:
    """What `**/*.parquet` finds in DuckDB: hidden folders too."""
    return glob.glob(f"{output}/**/*.parquet", recursive=True, include_hidden=True)  # noqa: PTH207  pathlib shows no hidden ones


def descendants(pid: int) -> dict[int, str]:
    """Processes below one, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            parents[int(entry.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    below, found = {pid}, {}
    while more := {p for p, parent in parents.items() if parent in below and p not in below}:
        below |= more
    for p in below - {pid}:
        found[p] = names.get(p, "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--victims", default="driver,worker,raylet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=3, metavar=("FOLDER", "VERSION", "ADDRESS"))
    args = parser.parse_args()
    if args.drive:
        sys.exit(drive(*args.drive))
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as name:
        _rounds(Path(name), args.kills, args.victims.split(","))


def _prepare(folder: Path) -> list[dict[date, pa.Table]]:
    """Input, registry with two models, and what each must give by date."""
    predictors = [make_predictor(), make_predictor(seed=40)]
    versions: list[dict[date, pa.Table]] = [{}, {}]
    for predictor in predictors:
        make_registry(folder / "registry", predictor)
    for number in range(N_DAYS):
        day = FIRST + timedelta(days=number)
        tables = []
        for file in range(N_FILES):
            rows = make_rows(ROWS_PER_FILE, seed=number * N_FILES + file)
            place = folder / "in" / f"dt={day}" / f"part-{file}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, place, row_group_size=10_000)
            tables.append(rows)
        rows = pa.concat_tables(tables)
        for predictor, version in zip(predictors, versions, strict=True):
            scored = predictor.predict(rows)
            version[day] = pa.table({"id": rows["id"], **dict(zip(scored.column_names, scored.columns, strict=True))})
    return versions


def _rounds(folder: Path, n_kills: int, victims: list[str]) -> None:
    from ray.cluster_utils import Cluster

    versions = _prepare(folder)
    options = {"num_cpus": 1, "include_dashboard": False, "_system_config": FAST_HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    second = cluster.add_node(num_cpus=1)
    output = f"{folder}/out"
    watchers = [Watcher(by_manifest(output), versions), Watcher(by_glob(output), versions)]
    for watcher in watchers:
        watcher.start()
    killed: Counter[str] = Counter()
    took = 12.0
    number = -1
    while sum(killed[victim] for victim in victims) < n_kills:
        number += 1
        version = number % 2
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.score_kill",
            "--drive",
            str(folder),
            str(version + 1),
            cluster.address,
        ]
        began = time.monotonic()
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        victim = victims[number % len(victims)]
        time.sleep(random.uniform(0.3, 0.85) * took)
        alive = driver.poll() is None
        if victim == "driver" and alive:
            driver.send_signal(signal.SIGKILL)
        elif victim == "worker" and alive:
            workers: list[int] = []
            while not workers and driver.poll() is None:  # they start after the driver has planned
                time.sleep(0.05)
                workers = [pid for pid, line in descendants(os.getpid()).items() if line.startswith(WORKERS)]
            alive = bool(workers)
            if workers:
                time.sleep(random.uniform(0, 2))
                with suppress(ProcessLookupError):
                    os.kill(random.choice(workers), signal.SIGKILL)
        elif alive:
            cluster.remove_node(second, allow_graceful=False)
            second = cluster.add_node(num_cpus=1)
        killed[victim if alive else f"{victim}, too late"] += 1
        said = driver.communicate(timeout=300)[0]
        code = driver.returncode
        if code == 0 and not alive:
            took = time.monotonic() - began  # nothing was killed, so it says how long a run takes now
        n_reruns = 0
        while code != 0:
            n_reruns += 1
            assert n_reruns < 5, said
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
            code, said = done.returncode, done.stdout
        for day, wanted in versions[version].items():
            assert read_scores(output, day).drop_columns("dt").equals(wanted), f"round {number}, {day}"
            paths = sorted(p for p in _walk(output) if f"dt={day}" in p)
            assert (
                pa.concat_tables([pq.read_table(p, partitioning=None) for p in paths])
                .replace_schema_metadata(None)
                .equals(wanted)
            )
        print(f"round {number}: {victim}{'' if alive else ' (too late)'}, {n_reruns} reruns; "
              f"readers: {[dict(w.seen) for w in watchers]}", flush=True)  # fmt: skip
        assert not any(w.wrong for w in watchers), [w.wrong[:5] for w in watchers]
    for watcher in watchers:
        watcher.stopped = True
        watcher.join()
    print(json.dumps({"killed": killed, "read_scores": watchers[0].seen, "glob": watchers[1].seen}))
    cluster.shutdown()


if __name__ == "__main__":
    main()
