"""The application as a Ray Serve deployment: each replica holds all models and answers by itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ray import serve

from claydist.errors import SpecError
from claydist.registry import open_registry
from claydist.serving.application import Application
from claydist.serving.edge import Edge
from claydist.serving.keys import ENVIRONMENT, KeyRing
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Shelf
from claydist.serving.telemetry import Exporter
from claydist.specfile import load_spec

NAME = "claydist"
# Overload is answered by the application, in JSON; Serve's own limits only stop what could never be answered.
_ONGOING_PER_QUEUED = 4


class Server:
    """One replica. Serve calls the application that `__serve_build_asgi_app__` gives for each request."""

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        _log_to_stderr()
        spec = load_spec(ServeSpec, settings)
        keys = KeyRing.open(spec.keys_file, spec.limits.per_key_per_s)
        if spec.require_keys and not keys:
            raise SpecError(
                f"require_keys is set, and there is no key: give keys_file, or ${ENVIRONMENT} in the replica"
            )
        registry = open_registry(spec.registry)
        shelf = Shelf(spec.models, registry, poll_s=spec.poll_s)
        self._application = Application(spec, shelf, keys, adds_request_id=False, exporter=Exporter())
        self._application.start()
        Edge.has_gates = True

    async def refresh(self) -> list[str]:
        """Look all aliases up now; for `handle.broadcast("refresh")`, which reaches every replica."""
        return await self._application.shelf.refresh()

    def __serve_build_asgi_app__(self) -> Application:
        return self._application


def _log_to_stderr() -> None:
    """Swaps and failures on the replica's own standard error, one line each, at once."""
    logger = logging.getLogger("claydist.serving")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def build(args: Mapping[str, Any]) -> serve.Application:
    """The Serve Application of these settings; they are checked here, before anything is started.

    Raises
    ------
    SpecError : with every problem.
    """
    spec = load_spec(ServeSpec, dict(args))
    options: dict[str, Any] = {"num_replicas": spec.replicas}
    if spec.autoscaling is not None:
        options = {"autoscaling_config": spec.autoscaling.model_dump()}
    deployment = serve.deployment(
        serve.ingress()(Server),
        name=NAME,
        max_ongoing_requests=_ONGOING_PER_QUEUED * spec.limits.queue_requests,
        ray_actor_options={"num_cpus": spec.cpus_per_replica},
        health_check_period_s=5,
        logging_config={"enable_access_log": False, "encoding": "JSON"},
        **options,
    )
    return deployment.bind(spec.model_dump(mode="json"))
