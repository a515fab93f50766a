"""Two runs of one date at the same moment, and one that is killed, as processes; no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from claydist.errors import DataError
from claydist.scoring.publish import look
from claydist.scoring.readers import read_scores
from claydist.storage import open_store
from tests.scoring.support import FIRST, expected, make_predictor, make_registry, write_days
from tests.stores import s3_options

__all__ = ["s3_options"]

ROOT = Path(__file__).parent.parent.parent
DRIVER = """
import json, sys, time
from pathlib import Path
from claydist.errors import ClaydistError
from claydist.registry import open_registry
from claydist.scoring import publish
from tests.scoring.support import Loop, make_spec, run_score
folder, name, told = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def stop(at):
    if told["stop"] == at:
        (folder / f"{name}-is-there").touch()
        while not (folder / f"{name}-may-go").exists():
            time.sleep(0.02)

class Stopping(Loop):
    def ready(self):
        stop("ready")
        return True

    def map(self, function, items, on_done=None):
        def then_stop(index, result):
            stop("scored")
            on_done(index, result)
        return super().map(function, items, then_stop if on_done else None)

if told["stop"] == "copied":
    real = publish.records.create
    publish.records.create = lambda *args: (stop("copied"), real(*args))[1]
try:
    registry = open_registry(str(folder / "registry"))
    spec = make_spec(folder, **told["spec"])
    summary = run_score(spec, registry, Stopping(), date="2026-11-01", **told["choice"])
except ClaydistError as e:
    print(e)
    sys.exit(e.exit_code)
print(summary.summary["dates"][0]["status"])
"""


class Runs:
    """Runs that stop where they are told to, and are let go or killed; none outlives its test."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, stop: str = "", **choice: Any) -> None:
        told = json.dumps({"stop": stop, "spec": self.spec, "choice": choice})
        command = [sys.executable, "-c", DRIVER, str(self.folder), name, told]
        self.processes[name] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 240
        while stop and not (self.folder / f"{name}-is-there").exists():
            assert self.processes[name].poll() is None, self.processes[name].communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def go(self, name: str) -> None:
        (self.folder / f"{name}-may-go").touch()

    def kill(self, name: str) -> None:
        os.kill(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].communicate(timeout=60)

    def end(self, name: str) -> tuple[int, str]:
        said = self.processes[name].communicate(timeout=240)[0]
        return self.processes[name].returncode, said.strip()


@pytest.fixture
def runs_of(tmp_path: Path) -> Iterator[Callable[..., Runs]]:
    made: list[Runs] = []

    def make(**spec: Any) -> Runs:
        made.append(Runs(tmp_path, spec))
        return made[-1]

    yield make
    for runs in made:
        for process in runs.processes.values():
            if process.poll() is None:
                process.kill()
                process.communicate()


def test_one_publishes_and_the_other_gives_up_or_waits(tmp_path: Path, runs_of: Callable[..., Runs]) -> None:
    make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    runs = runs_of()
    runs.start("first", stop="ready")
    runs.start("second")
    runs.start("third", wait=True)
    code, said = runs.end("second")
    assert (code, "locked by run" in said) == (4, True), said
    runs.go("first")
    assert runs.end("first") == (0, "published")
    assert runs.end("third") == (0, "already")
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))


def test_a_killed_run_leaves_a_lock_that_is_free_at_once(tmp_path: Path, runs_of: Callable[..., Runs]) -> None:
    make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    runs = runs_of()
    runs.start("first", stop="ready")
    runs.kill("first")
    runs.start("second")
    assert runs.end("second") == (0, "published")
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))


class Reader(threading.Thread):
    """Polls `read_scores` until it is stopped, and counts what it sees; anything but a version is wrong."""

    def __init__(self, read: Callable[[], pa.Table], versions: list[pa.Table]) -> None:
        super().__init__(daemon=True)
        self.read, self.versions = read, versions
        self.seen: Counter[str] = Counter()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.01):
            try:
                table = self.read()
            except DataError as e:
                self.seen["nothing" if "nothing is published" in str(e) else str(e)] += 1
                continue
            found = next((n for n, version in enumerate(self.versions, 1) if table.equals(version)), None)
            self.seen["wrong" if found is None else f"version {found}"] += 1

    def end(self) -> Counter[str]:
        self.stopped.set()
        self.join(60)
        return self.seen


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "replacing"), [("scored", False), ("copied", True)])
def test_on_s3_a_killed_run_and_two_at_once(
    tmp_path: Path, s3_options: dict[str, Any], runs_of: Callable[..., Runs], stop: str, replacing: bool
) -> None:
    predictors = [make_predictor(), make_predictor(seed=1)]
    for predictor in predictors:
        make_registry(tmp_path / "registry", predictor)
    days = write_days(tmp_path / "in", n_days=1)
    versions = [expected(predictor, days) for predictor in predictors]
    options = {**s3_options, "key": "testing", "secret": "testing"}
    url = f"s3://claydist/{uuid.uuid4().hex}/out"
    output = open_store(url, options)
    spec = {"output": url, "storage_options": options}
    if replacing:
        before = runs_of(**spec, model="late:1")
        before.start("before")
        assert before.end("before") == (0, "published")
    reader = Reader(lambda: read_scores(url, storage_options=options), versions)
    reader.start()
    runs = runs_of(**spec, model="late:2")
    runs.start("killed", stop=stop, replace_stale=True)
    runs.kill("killed")
    # What is staged is not scored again, so that only a run before its work can be held there.
    runs.start("first", stop="ready" if stop == "scored" else stop, replace_stale=True)
    runs.start("second", replace_stale=True)
    code, said = runs.end("second")
    assert (code, "locked by run" in said) == (4, True), said
    runs.go("first")
    assert runs.end("first") == (0, "published")
    while not reader.seen["version 2"]:
        assert reader.is_alive()
        time.sleep(0.05)
    seen = reader.end()
    assert set(seen) <= {"version 1" if replacing else "nothing", "version 2"}, seen
    current = look(output, f"dt={FIRST}")
    assert current.is_settled
    assert current.manifest is not None
    parquet = [f.path for f in output.files() if f.path.endswith(".parquet")]
    assert parquet == [f"dt={FIRST}/{file['name']}" for file in current.manifest["files"]]
    assert output.join("_staging").list() == []
