"""Where the behaviour suites run: a local folder, fsspec's memory, and an S3 made of moto on loopback.

A module imports the fixtures `s3_options` and `store`, and each test with the argument `store` runs over all three.
"""

from __future__ import annotations

import atexit
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest

from claydist.storage import Store, open_store

PLACES = ("local", "memory", "s3")
BUCKET = "claydist"


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """moto looks for the object and then stores it, two steps; S3 does both in one, and so must its stand-in."""
    lock = threading.Lock()

    @wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    return locked


@cache
def _start_s3() -> str:
    """URL of an S3 that runs until the tests end; every module has its own fixture, and all share this server."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    S3Response.put_object = _one_at_a_time(S3Response.put_object)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """Options for fsspec of an S3 on loopback that has the bucket `claydist`; dummy credentials in the environment."""
    pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        options = {"endpoint_url": _start_s3()}
        open_store(f"s3://{BUCKET}", options).fs.makedirs(BUCKET, exist_ok=True)
        yield options


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty place of each kind."""
    if request.param == "local":
        yield open_store(tmp_path / "store")
    elif request.param == "memory":
        place = open_store(f"memory://{uuid.uuid4().hex}")
        yield place
        if place.exists():
            place.remove(recursive=True)
    else:
        yield open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}", request.getfixturevalue("s3_options"))
