"""How tasks reach the cluster; tests put a plain loop in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from claydist import cluster
from claydist.scoring.worker import ModelFiles, warm_up

T = TypeVar("T")
R = TypeVar("R")


class Work(Protocol):
    """What scoring needs of a cluster."""

    def share(self, files: Mapping[str, bytes]) -> Any:
        """The files, or what stands for them in a task."""
        ...

    def warm(self, model: ModelFiles) -> None:
        """Begin to build the model in the processes that will score, without waiting."""
        ...

    def ready(self) -> bool:
        """Return once they have; False when they wait for a CPU."""
        ...

    def map(
        self, function: Callable[[T], R], items: Sequence[T], on_done: Callable[[int, R], None] | None = None
    ) -> list[R]:
        """Results in the order of the items; `on_done` is called with index and result as each ends."""
        ...


@dataclass
class RayWork:
    """Ray tasks of one CPU each.

    Parameters
    ----------
    max_cpus : tasks at once at the most.
    say : told every minute in which no task ends.
    """

    max_cpus: int | None = None
    say: Callable[[str], None] = lambda text: None
    _warming: list[Any] = field(default_factory=list)

    def share(self, files: Mapping[str, bytes]) -> Any:
        """A reference to the files in Ray's object store: a process fetches them once, and not with every task."""
        import ray

        return ray.put(dict(files))

    def warm(self, model: ModelFiles) -> None:
        """Start one task for each CPU that is free; imports take seconds, in which the driver plans."""
        import ray

        free = sum(node.n_free_cpus for node in cluster.nodes())
        task = ray.remote(num_cpus=1, max_retries=0)(warm_up)
        self._warming = [task.remote(model) for _ in range(min(free, self.max_cpus or free))]

    def ready(self) -> bool:
        """Wait for the tasks of `warm`; one that failed is no harm, the first real task says why."""
        import ray

        if self._warming:
            ray.wait(self._warming, num_returns=len(self._warming), timeout=60)
        is_ready = bool(self._warming) or any(node.n_free_cpus for node in cluster.nodes())
        self._warming = []
        return is_ready

    def map(
        self, function: Callable[[T], R], items: Sequence[T], on_done: Callable[[int, R], None] | None = None
    ) -> list[R]:
        """Results by `cluster.run_tasks`, however long the cluster is busy; that is said, and SIGTERM ends it."""
        return cluster.run_tasks(function, items, max_cpus=self.max_cpus, on_done=on_done, on_idle=self._say_idle)

    def _say_idle(self, n_pending: int, seconds: float) -> None:
        self.say(
            f"no task has ended for {seconds / 60:.0f} min: {n_pending} wait for a CPU of the cluster, or are under "
            f"way; Ctrl-C or SIGTERM gives up, and the same command goes on later"
        )
