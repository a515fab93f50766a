"""Ray Train's XGBoost backend with a timeout: a hung worker becomes an error instead of half an hour of silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ray.train.xgboost.config import XGBoostConfig, _get_xgboost_args, _XGBoostRabitBackend
from xgboost.collective import CommunicatorContext


class _PromptBackend(_XGBoostRabitBackend):
    """Does not wait 5 s for the tracker's thread, which never ends after a kill; it dies with the controller."""

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if self._wait_thread is not None:
            self._wait_thread.join(timeout=0.2)


@dataclass
class TimedXGBoostConfig(XGBoostConfig):
    """XGBoostConfig whose workers give up on a silent peer.

    Parameters
    ----------
    timeout_s : seconds a collective may take; XGBoost's own default is 1800.
    """

    timeout_s: int = 600

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """The context that each worker's loop runs in."""
        timeout_s = self.timeout_s

        @contextmanager
        def communicator() -> Iterator[None]:
            with CommunicatorContext(**_get_xgboost_args(), dmlc_timeout=timeout_s):
                yield

        return communicator

    @property
    def backend_cls(self) -> type[_XGBoostRabitBackend]:
        """The backend that starts the tracker."""
        return _PromptBackend
