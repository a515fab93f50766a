"""The driver's side of training: start Ray Train, show what the workers do, give back what rank 0 made."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from claydist.cluster import prepare_environment
from claydist.collective import reason
from claydist.errors import ClaydistError, TrainingError
from claydist.spec import TrainOptions
from claydist.storage import redact
from claydist.training.job import TrainJob
from claydist.training.progress import Board

OnProgress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes
    ----------
    outcome : rank 0's result: the model, its history, seconds by stage.
    n_restarts : how often the group of workers was started again.
    peak_mb : largest PSS of a worker.
    seconds : of the whole Ray Train run.
    """

    outcome: dict[str, Any]
    n_restarts: int
    peak_mb: float
    seconds: float


def train_on_ray(job: TrainJob, options: TrainOptions, memory: int, on_progress: OnProgress) -> TrainResult:
    """Train by Ray Train on the connected cluster.

    Parameters
    ----------
    memory : bytes that Ray is asked for by worker; 0 for none.
    on_progress : called twice a second with what the workers do (`progress.Board.read`).

    Raises
    ------
    TrainingError : when a worker failed once more than `max_failures` allows, with the ranks of each failure.
    ClaydistError : what the workers found together, such as a broken contract.
    """
    prepare_environment()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    began = time.monotonic()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Board).remote()
    result = _fit(_trainer(job, board, options, memory), board, on_progress)
    try:
        words = ray.get(board.read.remote(), timeout=5)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        words = {"starts": 1}  # the board is only for show: a model does not depend on it
    outcome = result.return_value
    if error := outcome.pop("error", None):
        raise error
    n_restarts = max(0, words["starts"] - 1)
    return TrainResult(outcome, n_restarts, outcome.pop("peak_mb"), time.monotonic() - began)


def _trainer(job: TrainJob, board: Any, options: TrainOptions, memory: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from claydist.training.backend import TimedXGBoostConfig
    from claydist.training.worker import train_worker

    # A process that is stopped does not even answer a poll; the default is 600 s.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(options.timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(max(60.0, options.wait_s))
    filesystem, path = job.run.arrow()
    resources = {"CPU": job.n_threads, **({"memory": memory} if memory else {})}
    failures = options.max_failures
    return DataParallelTrainer(
        train_worker,
        train_loop_config={"job": job, "board": board},
        backend_config=TimedXGBoostConfig(timeout_s=max(1, round(options.timeout_s))),
        scaling_config=ScalingConfig(num_workers=job.n_workers, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray_train",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=failures, controller_failure_limit=failures),
        ),
    )


def _fit(trainer: Any, board: Any, on_progress: OnProgress) -> Any:
    """The result of `trainer.fit()`, run on a thread of its own while this one shows progress and hears Ctrl-C."""
    import ray

    done: dict[str, Any] = {}

    def fit() -> None:
        try:
            done["result"] = trainer.fit()
        except BaseException as e:
            done["error"] = e

    thread = threading.Thread(target=fit, daemon=True, name="claydist-fit")
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
        try:
            on_progress(ray.get(board.read.remote(), timeout=5))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
            continue  # the board is only for show
    if "error" in done:
        raise _explain(done["error"]) from done["error"]
    return done["result"]


def _explain(error: BaseException) -> BaseException:
    """One message for the same failure on many ranks."""
    from ray.train import TrainingFailedError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        ranks: dict[str, list[int]] = {}
        for rank, failure in sorted(error.worker_failures.items()):
            cause = getattr(failure, "cause", None) or failure
            if isinstance(cause, ClaydistError) and not isinstance(cause, TrainingError):
                return cause
            ranks.setdefault(redact(f"{type(cause).__name__}: {reason(cause)[:300]}"), []).append(rank)
        problems = [f"rank {', '.join(map(str, r))}: {text}" for text, r in sorted(ranks.items())]
        return TrainingError("training failed more often than train.max_failures allows; the last failure", problems)
    if isinstance(error, TrainingFailedError):
        return TrainingError(f"Ray Train failed: {redact(str(error)).strip().splitlines()[0][:500]}")
    return error
