"""Training without Ray Train: the pipeline's own job, run by its own worker loop in as many processes as asked for."""

from __future__ import annotations

import atexit
import multiprocessing
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from claydist import cluster, pipeline
from claydist.cluster import Node, run_tasks
from claydist.collective import Collective
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece
from claydist.dataset.statistics import Part
from claydist.evaluate import Evaluation, EvaluationPlan, evaluate
from claydist.predictor import Predictor
from claydist.preparation import Prepared, open_tables, prepare
from claydist.registry import Registry
from claydist.runs import start_run
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from claydist.storage import open_store
from claydist.training.driver import TrainResult
from claydist.training.job import TrainJob
from claydist.training.progress import Reporter
from claydist.training.worker import run_worker

MOST_WORKERS = 3


@dataclass(frozen=True)
class Training:
    """A training that ended: what it was given, and what came out."""

    spec: TrainSpec
    prepared: Prepared
    job: TrainJob
    result: TrainResult
    predictor: Predictor

    @property
    def outcome(self) -> Mapping[str, Any]:
        """What rank 0 gave back."""
        return self.result.outcome


def prepare_job(tree: Mapping[str, Any], folder: Path, n_workers: int, n_threads: int = 1) -> tuple[Any, ...]:
    """Spec, Prepared and TrainJob for so many workers, made as the pipeline makes them; needs the session's Ray."""
    spec = load_spec(TrainSpec, tree)
    tables = open_tables(spec)
    prepared = prepare(spec, tables)
    run = start_run(Registry(open_store(str(folder / "runs"))), "train", spec, spec.name, tables.fingerprint)
    run = run.update(layout={"n_workers": n_workers, "n_threads": n_threads})
    return spec, prepared, pipeline._job(spec, prepared, run, str(folder / "cache"))


def train_here(tree: Mapping[str, Any], folder: Path, n_workers: int) -> Training:
    """The training of a spec by so many processes."""
    spec, prepared, job = prepare_job(tree, folder, n_workers)
    result = run_job(job)
    predictor = Predictor(prepared.plan, pipeline._model(result, spec, prepared), prepared.target, spec.data.offset)
    return Training(spec, prepared, job, result, predictor)


def run_job(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
    """What `train_on_ray` gives, by processes of this machine; takes its arguments, for tests that put it in place."""
    outcomes = run_ranks(_work, [job] * job.n_workers)
    outcome = outcomes[0]
    if error := outcome.pop("error", None):
        raise error
    return TrainResult(outcome, 0, outcome.pop("peak_mb"), 0.0)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline run on one node of 2 CPUs that is this process: tasks here, workers by `run_job`."""

    def tasks(function: Any, items: Sequence[Any], shared: Any = None, **_: Any) -> list[Any]:
        return [function(item) if shared is None else function(item, shared) for item in items]

    monkeypatch.setattr(cluster, "run_tasks", tasks)
    monkeypatch.setattr(evaluate, "__defaults__", (tasks,))
    monkeypatch.setattr(cluster, "living_nodes", lambda: [Node("a", "a", 2, 2, 20 * 10**9)])
    monkeypatch.setattr(cluster, "autoscaler_cpus", lambda: 0)
    monkeypatch.setattr(cluster, "run_on_every_node", lambda function, item: [function(item)])
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)


def run_ranks(work: Any, arguments: list[Any]) -> list[Any]:
    """Results of `work(argument, collective)` by rank, each in a process of its own; one alone runs here."""
    n_workers = len(arguments)
    if n_workers == 1:
        return [work(arguments[0], Collective(1, 0))]
    from xgboost.tracker import RabitTracker

    tracker = RabitTracker(n_workers=n_workers, host_ip="127.0.0.1", sortby="task")
    tracker.start()
    threading.Thread(target=tracker.wait_for, daemon=True).start()
    given = tracker.worker_args()
    futures = [
        _processes().submit(_in_process, work, argument, given, rank, n_workers)
        for rank, argument in enumerate(arguments)
    ]
    return [future.result(timeout=120) for future in futures]


def evaluate_by_file(predictor: Predictor, part: Part, **options: Any) -> Evaluation:
    """What `evaluate` gives when each file is a task of its own, however few its rows."""

    def run(function: Any, tasks: Sequence[Any], plan: EvaluationPlan) -> list[Evaluation]:
        each = [((file, groups),) for task in tasks for file, groups in task]
        assert len(each) == sum(any(counts) for counts in part.counts)
        return run_tasks(function, each, plan)

    return evaluate(EvaluationPlan(predictor, part, **options), run)


def part_table(part: Part, columns: list[str]) -> pa.Table:
    """All rows of a part in the order of the input, read as training reads them."""
    pieces = [Piece(f, g, 0, rows) for f, counts in enumerate(part.counts) for g, rows in enumerate(counts) if rows]
    return pa.concat_tables(read_pieces(part.inventory, pieces, columns, part.selection))


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in units of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _work(job: TrainJob, collective: Collective) -> dict[str, Any]:
    return run_worker(job, collective, Reporter(collective.rank))


def _in_process(work: Any, argument: Any, given: Mapping[str, Any], rank: int, n_workers: int) -> Any:
    from xgboost.collective import CommunicatorContext

    with CommunicatorContext(**given, dmlc_task_id=f"{rank:08}", dmlc_timeout=60):
        return work(argument, Collective(n_workers, rank))


@cache
def _processes() -> ProcessPoolExecutor:
    """Processes that stay for the session: each costs seconds of imports."""
    pool = ProcessPoolExecutor(MOST_WORKERS, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown, wait=False, cancel_futures=True)
    return pool
