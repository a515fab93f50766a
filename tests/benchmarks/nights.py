"""A team's nights on a cluster of two nodes that asks for a token, by `ray job submit` alone; prints a log of it.

    python -m tests.benchmarks.nights [--data ../shared/data/flights13]

Trains the flights, scores three dates, submits a date twice (under its id, and under another one), backfills a range,
stops a training and a scoring by `ray job stop` in the middle, and submits them again. Every step says what was asked,
how the job ended, how long it took, and what its JSON said. Ends with an error at the first step that is not as wanted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from claydist.scoring.readers import read_scores
from tests.clusters import ROOT, Cluster, cluster_of_jobs

CHECK_S = 0.25


def last_object(text: str) -> dict[str, Any]:
    """The last JSON object among the lines of a job's log."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def told(tree: dict[str, Any]) -> str:
    """What an operator looks for in the JSON of a run."""
    if "error" in tree:
        return f"{tree['error']['kind']}: {tree['error']['message'][:160]}"
    if "dates" in tree:
        statuses = Counter(d["status"] for d in tree["dates"])
        rows = sum(d["rows"] for d in tree["dates"])
        return f"{dict(statuses)}, {rows:,} rows, {tree['seconds']} s"
    kept = {name: tree[name] for name in ("version", "rows", "promoted", "workers", "threads", "restarts", "resumed")}
    return f"{kept}, test auc {tree['metrics']['test']['auc']:.5f}"


class Nights:
    """The steps, each by `ray job submit`, and what they left behind."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.registry, self.output = str(folder / "registry"), str(folder / "scores")

    def job(self, title: str, script: str, identity: str, *arguments: str, wanted: str) -> dict[str, Any]:
        """Submit, wait, print; the JSON of the run. Fails unless the job ended as wanted."""
        began = time.monotonic()
        done = self.cluster.submit(script, *arguments, "--json", options=("--submission-id", identity))
        status = self.status(identity)
        tree = last_object(done.stdout)
        took = f"{time.monotonic() - began:.1f} s"
        print(
            f"{title}\n  {script} --submission-id {identity}: {status}, ray job submit exits {done.returncode}, {took}"
        )
        print(f"  {told(tree) if tree else done.stdout[-300:]}", flush=True)
        assert status == wanted, done.stdout[-3000:] + done.stderr[-3000:]
        return tree

    def train(self, title: str, identity: str, *more: str, wanted: str = "SUCCEEDED") -> dict[str, Any]:
        """Train the flights."""
        given = (f"data.path={self.data}", "train.workers=2", "train.cpus_per_worker=1")
        settings = [text for one in given for text in ("--set", one)]
        spec = ("flights.yaml", *settings, "--registry", self.registry)
        return self.job(title, "train.py", identity, *spec, *more, wanted=wanted)

    def score(self, title: str, identity: str, *more: str, wanted: str = "SUCCEEDED") -> dict[str, Any]:
        """Score dates of the flights."""
        settings = ("--set", f"input={self.data}", "--set", f"output={self.output}", "--registry", self.registry)
        return self.job(title, "score.py", identity, "score-flights.yaml", *settings, *more, wanted=wanted)

    def ray_job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of `ray job`."""
        return self.cluster.run("ray", "job", words[0], "--address", self.cluster.jobs_url, *words[1:])

    def status(self, identity: str) -> str:
        """How Ray says that the job stands: SUCCEEDED, FAILED, STOPPED, RUNNING, ..."""
        said = self.ray_job("status", identity)
        words = ("succeeded", "failed", "stopped", "running", "pending")
        found = [w for w in words if f"Job '{identity}' {w}" in said.stdout or f"was {w}" in said.stdout]
        found += [w for w in words if w.upper() in said.stdout]
        return found[0].upper() if found else said.stdout[-200:] + said.stderr[-200:]

    def stop_in_the_middle(self, identity: str, is_there: Any) -> None:
        """`ray job stop`, as soon as a run has come so far."""
        deadline = time.monotonic() + 300
        while not is_there():
            assert time.monotonic() < deadline, "the run did not come so far"
            time.sleep(CHECK_S)
        said = self.ray_job("stop", identity)
        print(f"  ray job stop {identity}: exits {said.returncode}", flush=True)

    def submit_and_stop(self, title: str, script: str, identity: str, given: tuple[str, ...], is_there: Any) -> None:
        """A job that is stopped before its end."""
        options = ("--submission-id", identity, "--no-wait")
        began = time.monotonic()
        assert self.cluster.submit(script, *given, "--json", options=options).returncode == 0
        print(title, flush=True)
        self.stop_in_the_middle(identity, is_there)
        status = self.status(identity)
        listed = self.cluster.run("claydist", "runs", "list", "--registry", self.registry)
        print(f"  {script}: {status} after {time.monotonic() - began:.1f} s; `claydist runs list` says:", flush=True)
        print("\n".join(f"    {line}" for line in listed.stdout.splitlines()[-3:]), flush=True)
        assert status == "STOPPED", status

    def run(self) -> None:
        """All steps."""
        trained = self.train("1. Train on both nodes", "train-1", wanted="SUCCEEDED")
        assert trained["promoted"]
        assert trained["workers"] == 2
        for day in (1, 2, 3):
            self.score(f"2. The night of 2013-01-0{day}", f"score-2013-01-0{day}", "--date", f"2013-01-0{day}")
        again = self.cluster.submit(
            "score.py", "score-flights.yaml", "--date", "2013-01-03", options=("--submission-id", "score-2013-01-03")
        )
        said = next((n for n in (again.stdout + again.stderr).splitlines() if "already exists" in n), "no reason")
        print(f"3. The same id again: ray job submit exits {again.returncode}: {said.strip()[:200]}", flush=True)
        assert again.returncode != 0
        repeated = self.score("3. The same date under another id", "score-2013-01-03-b", "--date", "2013-01-03")
        assert [d["status"] for d in repeated["dates"]] == ["already"]
        year = ("--from", "2013-01-01", "--to", "2013-03-31")
        filled = self.score("4. A backfill of three months", "backfill", *year)
        assert Counter(d["status"] for d in filled["dates"]) == {"published": 87, "already": 3}
        self._stop_training()
        self._stop_scoring()

    def _stop_training(self) -> None:
        given = (
            "flights.yaml", "--registry", self.registry, "--set", f"data.path={self.data}", "--set", "train.workers=2",
            "--set", "train.cpus_per_worker=1", "--set", "train.checkpoint_s=1", "--set", "model.early_stopping=null",
        )  # fmt: skip
        runs = Path(self.registry, "_runs")
        before = set(runs.glob("*/checkpoint.json"))

        def has_a_checkpoint() -> bool:
            return set(runs.glob("*/checkpoint.json")) > before

        self.submit_and_stop(
            "5. A training, stopped after a checkpoint", "train.py", "train-2", given, has_a_checkpoint
        )
        resumed = self.job("5. Submitted again with --resume", "train.py", "train-3", *given, "--resume",
                           wanted="SUCCEEDED")  # fmt: skip
        assert resumed["resumed"]

    def _stop_scoring(self) -> None:
        given = (
            "score-flights.yaml", "--set", f"input={self.data}", "--set", f"output={self.output}", "--registry",
            self.registry, "--from", "2013-04-01", "--to", "2013-12-31", "--set", "model=flight-delay:1",
        )  # fmt: skip

        def has_begun() -> bool:
            return len(list(Path(self.output).glob("dt=2013-0[4-9]-*"))) >= 3

        self.submit_and_stop("6. A backfill, stopped in the middle", "score.py", "year-1", given, has_begun)
        n_published = len(list(Path(self.output).glob("dt=*/_manifest.json")))
        filled = self.job("6. Submitted again", "score.py", "year-2", *given, wanted="SUCCEEDED")
        counts = Counter(d["status"] for d in filled["dates"])
        assert counts["published"] + counts["already"] == 275, counts
        assert counts["already"] >= n_published - 90
        n_rows = len(read_scores(self.output))
        print(f"7. read_scores: {n_rows:,} rows of 336,776 flights in 365 dates", flush=True)
        assert n_rows == 336_776


def main() -> None:
    """Start the cluster, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/flights13")
    data = parser.parse_args().data.resolve()
    with tempfile.TemporaryDirectory() as name, cluster_of_jobs(n_cpus=1) as cluster:
        cluster.add_node(n_cpus=1)
        Nights(cluster, Path(name), data).run()


if __name__ == "__main__":
    main()
