"""One Ray cluster for the whole session, and where the real tables are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from claydist.cluster import prepare_environment

# Otherwise ray.init() writes a token into the home folder; tests/test_jobs.py covers both.
os.environ["RAY_AUTH_MODE"] = "disabled"
prepare_environment()

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local cluster of four CPUs (on however many there are), for every test that needs Ray."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real tables beside the project; the test is skipped where they are absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared/data is absent")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_schemas() -> Path:
    """The protocol's and the CRDs' schemas beside the project; the test is skipped where they are absent."""
    if not (SHARED / "schemas").is_dir():
        pytest.skip("../shared/schemas is absent")
    return SHARED / "schemas"
