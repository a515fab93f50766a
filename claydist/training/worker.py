"""What each Ray Train worker runs: check the contract, then the loop of the model's kind."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

from claydist.collective import Collective
from claydist.errors import ContractError, MetricError, SpecError
from claydist.spec import XGBoostSpec
from claydist.training.job import TrainJob
from claydist.training.progress import Reporter


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The result of one worker; rank 0's is the run's.

    An error on which all workers agree is returned, not raised: Ray Train would start again, to fail again.
    """
    from ray import train

    job: TrainJob = config["job"]
    board = config["board"]
    context = train.get_context()
    rank = context.get_world_rank()
    reporter = Reporter(rank, board.tell.remote)
    board.started.remote(rank)
    return run_worker(job, Collective(context.get_world_size(), rank), reporter)


def run_worker(job: TrainJob, collective: Collective, reporter: Reporter) -> dict[str, Any]:
    """The worker's loop without Ray: under any communicator of `xgboost.collective`."""
    reporter.tell(force=True, stage="start")
    with PeakMemory() as memory:
        try:
            collective.check_world()
            collective.check_contract(job.contract())
            result = _loop(job)(job, collective, reporter)
        except (ContractError, MetricError, SpecError) as e:
            return {"error": e}
    peaks = collective.total_objects(memory.peak_mb)
    if collective.rank:
        return {}
    return {**result, "peak_mb": max(peaks)}


def _loop(job: TrainJob) -> Any:
    # A worker imports only what its kind needs: each import costs every worker process.
    if isinstance(job.model, XGBoostSpec):
        from claydist.training.boosting import boost

        return boost
    from claydist.training.linear import fit

    return fit


class PeakMemory:
    """The largest PSS of this process within the block, in MB (10^6 bytes), looked at four times a second."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_mb = max(self.peak_mb, pss_mb())

    def _watch(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self.peak_mb = max(self.peak_mb, pss_mb())
            # Reading the map of a large process takes its time: at most a twentieth of ours.
            self._stop.wait(max(0.25, 20 * (time.monotonic() - began)))


def pss_mb() -> float:
    """Proportional set size of this process in MB; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)
