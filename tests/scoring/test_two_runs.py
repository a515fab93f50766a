"""Two runs of one date at the same moment, as two processes; no Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from claydist.scoring.readers import read_scores
from tests.scoring.support import expected, make_predictor, make_registry, write_days

ROOT = Path(__file__).parent.parent.parent
DRIVER = """
import sys, time
from pathlib import Path
from claydist.errors import ClaydistError
from claydist.registry import open_registry
from tests.scoring.support import Loop, make_spec, run_score
folder, wait = Path(sys.argv[1]), sys.argv[2] == "wait"

class Slow(Loop):
    def ready(self):
        (folder / f"ready-{sys.argv[3]}").touch()
        time.sleep(1.5)
        return True

try:
    registry = open_registry(str(folder / "registry"))
    summary = run_score(make_spec(folder), registry, Slow(), date="2026-11-01", wait=wait)
except ClaydistError as e:
    print(e)
    sys.exit(e.exit_code)
print(summary.summary["dates"][0]["status"])
"""


def start(folder: Path, wait: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(folder), wait, name]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_publishes_and_the_other_gives_up_or_waits(tmp_path: Path) -> None:
    make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    first = start(tmp_path, "no", "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready-first").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    others = [start(tmp_path, "no", "second"), start(tmp_path, "wait", "third")]
    said = [process.communicate(timeout=60)[0] for process in (first, *others)]
    codes = [process.returncode for process in (first, *others)]
    assert (codes[0], codes[2]) == (0, 0), said
    assert said[0].strip() == "published"
    assert said[2].strip() == "already"
    # Imports may take the second so long that the first has ended.
    assert (codes[1], "locked by run" in said[1]) in ((4, True), (0, False)), said
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))


def test_a_killed_run_leaves_a_lock_that_is_free_at_once(tmp_path: Path) -> None:
    make_registry(tmp_path / "registry")
    days = write_days(tmp_path / "in", n_days=1)
    first = start(tmp_path, "no", "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready-first").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    second = start(tmp_path, "no", "second")
    said = second.communicate(timeout=60)[0]
    assert (second.returncode, said.strip()) == (0, "published")
    assert read_scores(str(tmp_path / "out")).equals(expected(make_predictor(), days))
