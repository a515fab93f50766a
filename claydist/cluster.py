"""Join or start Ray; what fits on it; what is free."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from claydist.errors import ClusterError

T = TypeVar("T")
R = TypeVar("R")

QUIET_S = 3.0
PROBE_S = 15.0
IDLE_S = 60.0

# Read by Ray when it is imported or a trainer starts; set by whoever wants otherwise.
_ENVIRONMENT = {
    # Under `uv run` Ray would start every worker as `uv run ... python` in a copy of the project.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A report waits for the poll, and the newest checkpoint of a killed run is lost with the default of 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def prepare_environment() -> None:
    """Set what Ray reads from the environment; must be called before Ray is imported first."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Node:
    """One node that can run work: its CPUs, those free now, and its memory in bytes."""

    node_id: str
    address: str
    n_cpus: int
    n_free_cpus: int
    memory: int


@dataclass(frozen=True)
class Layout:
    """How training is laid over the cluster; `scales` says that the autoscaler must add nodes for it first."""

    n_workers: int
    n_threads: int
    scales: bool = False


@contextmanager
def connected(address: str | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of the block: the one initialised already, else one to join, else a new local one.

    Only a cluster that was started here is stopped at the end.

    Parameters
    ----------
    address : of the cluster; `local` starts a new one, whatever is there.

    Raises
    ------
    ClusterError : when the cluster cannot be reached, or does not take our token, within PROBE_S seconds.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    given = address or os.environ.get("RAY_ADDRESS")
    target = given or _running_address()
    try:
        if target and target != "local":
            if not target.startswith("ray://"):
                _probe(target, was_found=not given or given == "auto")
            ray.init(target, **options)
        else:
            ray.init("local", include_dashboard=False, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ClusterError(
            f"cannot reach Ray at {target or 'a new local cluster'}: {first}; "
            f"check --address and RAY_ADDRESS, and that the cluster's token is in RAY_AUTH_TOKEN_PATH"
        ) from e
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str, *, was_found: bool) -> None:
    """Pass when the cluster answers and takes our token; Ray itself tries for seven minutes and more.

    A cluster that was found on this machine is asked with the token in the home folder, as `ray.init("auto")` does.
    """
    from ray._private.authentication import authentication_token_setup as authentication
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    if was_found:
        authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    # Ray's C++ layer ends the process where the token is absent.
    authentication.ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    failures: list[Exception] = []

    def ask() -> None:
        try:
            GcsClient(address=canonicalize_bootstrap_address(address)).internal_kv_keys(b"", None, timeout=PROBE_S)
        except Exception as e:  # of Ray's C++ layer; any of them means that we cannot join
            failures.append(e)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    if thread.is_alive() or failures:
        said = str(failures[0]).splitlines()[0] if failures else f"no answer that lets us in for {PROBE_S:g} s"
        raise ConnectionError(f"{said}; `--address local` starts a cluster of its own instead")


def _running_address() -> str | None:
    """The address that `ray start` left behind on this machine; None where there is none, or nobody listens there.

    `ray stop` takes the address away, and a crash does not. Ray's own "auto" would also find the private cluster of
    another command, which ends with that command.
    """
    from ray._private.services import find_bootstrap_address

    try:
        address = find_bootstrap_address(None) or None
    except OSError:  # another user's, which we may not read
        return None
    if address and _is_refused(address):
        print(f"the cluster that `ray start` began at {address} is gone; `ray stop` forgets it", file=sys.stderr)
        return None
    return address


def _is_refused(address: str) -> bool:
    """True where the machine answers that nobody listens; one that does not answer may only be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def nodes() -> list[Node]:
    """Nodes that are alive and have CPUs, in the order of their ids."""
    return [node for node in living_nodes() if node.n_cpus]


def living_nodes() -> list[Node]:
    """Nodes that are alive, in the order of their ids; a head may have no CPUs, and drivers run on it all the same."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    found = [
        Node(
            n["NodeID"], n["NodeManagerAddress"], int(n["Resources"].get("CPU", 0)),
            int(free.get(n["NodeID"], {}).get("CPU", 0)), int(n["Resources"].get("memory", 0)),
        )
        for n in ray.nodes() if n["Alive"]
    ]  # fmt: skip
    return sorted(found, key=lambda n: n.node_id)


def autoscaler_cpus() -> int:
    """CPUs that the cluster's autoscaler may come to at the most; 0 where there is none that says."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    return int(most.get("CPU", 0))


def plan_layout(
    found: Sequence[Node],
    workers: Literal["auto"] | int,
    cpus_per_worker: Literal["auto"] | int,
    *,
    memory_per_worker: int = 0,
    autoscaler_cpus: int = 0,
) -> Layout:
    """Workers and threads for the cluster as it is; pure.

    `auto` workers are one on each node that has room; `auto` threads are the smallest number of CPUs that a worker's
    node can give each of its workers.

    Raises
    ------
    ClusterError : when the nodes could not hold the workers even if nothing else ran, nor those that the autoscaler
        may add; with the numbers and a setting that works.
    """
    if not found and not autoscaler_cpus:
        raise ClusterError("the cluster has no node with a CPU; start one with `ray start --head --num-cpus N`")
    n_cpus = 1 if cpus_per_worker == "auto" else cpus_per_worker
    eligible = [node for node in found if _room(node, n_cpus, memory_per_worker) > 0]
    n_workers = (len(eligible) or 1) if workers == "auto" else workers
    if cpus_per_worker == "auto" and workers == "auto":
        n_cpus = min((max(node.n_free_cpus, 1) for node in eligible), default=1)
    elif cpus_per_worker == "auto":
        n_cpus = max(1, min(n.n_cpus for n in found) // math.ceil(n_workers / len(found))) if found else 1
    room = sum(_room(node, n_cpus, memory_per_worker) for node in found)
    if room >= n_workers:
        return Layout(n_workers, n_cpus)
    if autoscaler_cpus >= n_workers * n_cpus:
        return Layout(n_workers, n_cpus, scales=True)
    raise _refusal(found, n_workers, n_cpus, memory_per_worker, room)


def _room(node: Node, n_cpus: int, memory: int) -> int:
    """How many workers the node could ever hold."""
    by_memory = node.memory // memory if memory else node.n_cpus
    return min(node.n_cpus // n_cpus, by_memory)


def _refusal(found: Sequence[Node], n_workers: int, n_cpus: int, memory: int, room: int) -> ClusterError:
    have = f"{len(found)} nodes with {', '.join(str(n.n_cpus) for n in found)} CPUs"
    if memory:
        have += f" and {', '.join(f'{n.memory / 2**30:.1f}' for n in found)} GiB"
    want = f"{n_workers} workers of {n_cpus} CPUs" + (f" and {memory / 2**30:.1f} GiB" if memory else "")
    by_cpu = sum(n.n_cpus // n_cpus for n in found)
    if room:
        cure = f"set train.workers={room}"
    elif by_cpu and memory:
        cure = f"set train.memory_gb={max(n.memory for n in found) / 2**30:.1f} or less, or add nodes with more memory"
    else:
        cure = f"set train.cpus_per_worker={max((n.n_cpus for n in found), default=1)}"
    return ClusterError(f"the cluster can never hold {want}: it has {have}, room for {room}; {cure}, or add nodes")


def wait_for_room(layout: Layout, wait_s: float, say: Callable[[str], None]) -> None:
    """Return once so many CPUs are free; the cluster could hold the workers, it is merely busy.

    Where the autoscaler must add nodes there is nothing to wait for: only Ray Train's own request makes it act.

    Raises
    ------
    ClusterError : when it is still busy after `wait_s` seconds.
    """
    if layout.scales:
        return
    started = time.monotonic()
    deadline = started + wait_s
    said = False
    while True:
        room = sum(n.n_free_cpus // layout.n_threads for n in nodes())
        if room >= layout.n_workers:
            return
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"the cluster was busy for {wait_s:g} s: room for {room} of {layout.n_workers} workers of "
                f"{layout.n_threads} CPUs; wait longer (train.wait_s), or ask for less (train.workers)"
            )
        # A task that has just ended holds its CPU for a moment.
        if not said and time.monotonic() - started > QUIET_S:
            say(f"the cluster is busy: room for {room} of {layout.n_workers} workers; waiting up to {wait_s:g} s")
            said = True
        time.sleep(0.1)


def run_tasks(
    function: Callable[..., R],
    items: Sequence[T],
    shared: Any = None,
    *,
    max_cpus: int | None = None,
    on_done: Callable[[int, R], None] | None = None,
    on_idle: Callable[[int, float], None] | None = None,
    max_retries: int = 5,
) -> list[R]:
    """Results of `function(item)`, or `function(item, shared)`, each by a Ray task of one CPU, in the order of items.

    Parameters
    ----------
    shared : what every task needs; it is sent to each node once.
    max_cpus : tasks under way at once at the most; as many as the cluster has CPUs and twice over, where not given.
    on_done : called on this thread with index and result as each ends.
    on_idle : called with the number of tasks under way or waiting for a CPU, and the seconds since one has ended, every
        IDLE_S of these seconds.

    Raises
    ------
    Whatever a task raised (claydist's own errors as they are), after the others were cancelled.
    ClusterError : when workers died on one item more than `max_retries` times.
    """
    prepare_environment()
    import ray

    remote = ray.remote(num_cpus=1, max_retries=max_retries)(function)
    more = () if shared is None else (ray.put(shared),)
    width = max_cpus or max(2, 2 * sum(n.n_cpus for n in nodes()))
    results: list[Any] = [None] * len(items)
    pending: dict[Any, int] = {}
    waiting = iter(enumerate(items))
    idle_s = 0.0
    try:
        while True:
            while len(pending) < width and (following := next(waiting, None)) is not None:
                pending[remote.remote(following[1], *more)] = following[0]
            if not pending:
                return results
            done, _ = ray.wait(list(pending), num_returns=1, timeout=IDLE_S)
            idle_s = 0.0 if done else idle_s + IDLE_S
            if on_idle and not done:
                on_idle(len(pending), idle_s)
            for ref in done:
                index = pending.pop(ref)
                results[index] = ray.get(ref)
                if on_done:
                    on_done(index, results[index])
    except ray.exceptions.RayTaskError as e:
        raise _cause(e) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as e:
        raise ClusterError(
            f"a worker process died {max_retries + 1} times on one task ({type(e).__name__}); "
            f"most often memory: use fewer CPUs at once, or smaller row groups"
        ) from e
    finally:
        for ref in pending:
            ray.cancel(ref, force=False)


def run_on_every_node(function: Callable[[T], R], item: T) -> list[R]:
    """Results of `function(item)`, run once on each node that is alive, in the order of `living_nodes()`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    refs = []
    for node in living_nodes():
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        refs.append(ray.remote(num_cpus=0, scheduling_strategy=there)(function).remote(item))
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as e:
        raise _cause(e) from None


def _cause(error: Any) -> BaseException:
    """The error that the task itself raised."""
    cause = error.cause if getattr(error, "cause", None) is not None else error
    return cause if isinstance(cause, BaseException) else error


def is_inside_job() -> bool:
    """True in the driver of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
