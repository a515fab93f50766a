"""On an object store a publisher that was overtaken while it slept publishes nothing and removes nothing."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from claydist.errors import Locked
from claydist.scoring.publish import PROTOCOL, _commit_remote, look
from claydist.storage import Store, open_store

FOLDER = "dt=2026-11-21"


def manifest(sequence: int, name: str) -> dict[str, Any]:
    file = {"name": f"{name}.parquet", "rows": 1}
    return {"protocol": PROTOCOL, "sequence": sequence, "published_by": name, "rows": 1, "quarantined": 0,
            "files": [file], "quarantine": [], "state": {}}  # fmt: skip


def publish(output: Store, sequence: int, name: str) -> None:
    staged = output.join("_staging", name)
    staged.write(name.encode())
    _commit_remote(output, FOLDER, [(staged, f"{name}.parquet")], manifest(sequence, name))


def test_an_overtaken_publisher_is_locked_out() -> None:
    output = open_store(f"memory://{uuid.uuid4().hex}/out")
    publish(output, 1, "a")
    publish(output, 2, "c")  # removes the record of a, so that its number is free again
    with pytest.raises(Locked):
        publish(output, 1, "b")
    current = look(output, FOLDER)
    assert current.manifest is not None
    assert current.manifest["published_by"] == "c"
    assert output.join(FOLDER, "c.parquet").read() == b"c"
