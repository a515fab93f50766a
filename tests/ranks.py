"""A function in several real processes under one tracker of XGBoost, for what only happens between processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

from claydist.collective import Collective

LIMIT_S = 60


def run_ranks(
    work: Callable[..., Any], arguments: Sequence[Any], *, timeout_s: int = 30, limit_s: float = LIMIT_S
) -> list[Any]:
    """What `work(collective, argument)` gave in a process for each argument, by rank: a result or an exception.

    A process that was killed gives its exit code as a ProcessLookupError; one that hangs is killed after
    `limit_s` and gives a TimeoutError.

    Parameters
    ----------
    work : a function of a module, for processes find it by name.
    timeout_s : seconds after which XGBoost gives up on a silent peer.
    limit_s : seconds that all of them have.
    """
    from xgboost.tracker import RabitTracker

    n_workers = len(arguments)
    tracker = RabitTracker(n_workers=n_workers, host_ip="127.0.0.1", sortby="task")
    tracker.start()
    threading.Thread(target=tracker.wait_for, daemon=True).start()
    started = [_start(work, a, tracker.worker_args(), rank, n_workers, timeout_s) for rank, a in enumerate(arguments)]
    deadline = time.monotonic() + limit_s
    try:
        return [_result(process, pipe, deadline) for process, pipe in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def die() -> None:
    """End this process as the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def _start(work: Any, argument: Any, given: Mapping[str, Any], rank: int, n_workers: int, timeout_s: int) -> Any:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _context().Process(
        target=_in_process, args=(theirs, work, argument, given, rank, n_workers, timeout_s), daemon=True
    )
    process.start()
    theirs.close()
    return process, ours


def _result(process: Any, pipe: Connection, deadline: float) -> Any:
    if not wait([pipe], timeout=max(0.0, deadline - time.monotonic())):
        return TimeoutError("still running at the limit")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return ProcessLookupError(process.exitcode)


def _in_process(
    pipe: Connection, work: Any, argument: Any, given: Mapping[str, Any], rank: int, n_workers: int, timeout_s: int
) -> None:
    from xgboost.collective import CommunicatorContext

    try:
        with CommunicatorContext(**given, dmlc_task_id=f"{rank:08}", dmlc_timeout=timeout_s):
            try:
                result = work(Collective(n_workers, rank), argument)
            except Exception as e:
                result = e
            # Before the context ends: it raises an error of its own where a peer is gone.
            pipe.send(result)
    except Exception as e:
        pipe.send(e)


@cache
def _context() -> Any:
    """Processes are forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["claydist.training.boosting", "claydist.training.worker", "pandas"])
    atexit.register(_stop_server)
    return context


def _stop_server() -> None:
    from multiprocessing.forkserver import _forkserver

    _forkserver._stop()  # type: ignore[attr-defined]
