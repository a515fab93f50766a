"""A registry with models, and the application over it without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from serving_models import boosted, flights, linear, register

from claydist.registry import Registry, open_registry
from claydist.serving.application import Application
from claydist.serving.keys import KeyRing
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Shelf

MODELS = ("trees", "classes", "numbers", "linear")


@pytest.fixture(scope="session")
def table() -> pa.Table:
    return flights(1500)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> Registry:
    registry = open_registry(str(tmp_path_factory.mktemp("registry")))
    register(registry, "trees", boosted(table), table)
    register(registry, "classes", boosted(table, "multiclass"), table)
    register(registry, "numbers", boosted(table, "regression"), table)
    register(registry, "linear", linear(table), table)
    return registry


@pytest.fixture(scope="session")
def shelf(registry: Registry) -> Shelf:
    return Shelf(MODELS, registry)


@pytest.fixture
def make_app(registry: Registry, shelf: Shelf) -> Callable[..., Application]:
    """An application over the session's models; its arguments are keys of ServeSpec."""

    def make(keys: KeyRing | None = None, **settings: Any) -> Application:
        spec = ServeSpec(models=MODELS, registry=registry.store.url, access_log=False, **settings)
        return Application(spec, shelf, keys or KeyRing())

    return make
