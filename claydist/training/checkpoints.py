"""Checkpoints of a run: payload first, then the pointer with its digest; found again after any crash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from claydist.storage import Store, sha256

POINTER = "checkpoint.json"


def save_checkpoint(run: Store, payload: bytes, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one before is removed only after this one can be found.

    Parameters
    ----------
    state : JSON-able; `round` names the checkpoint.
    """
    name = f"checkpoint-{state['round']:06d}.ubj"
    run.join(name).write(payload)
    pointer = {**state, "file": name, "sha256": sha256(payload)}
    run.join(POINTER).write(json.dumps(pointer).encode())
    for other in run.list():
        if other.startswith("checkpoint-") and other != name:
            run.join(other).remove()


def find_checkpoint(run: Store) -> tuple[dict[str, Any], bytes] | None:
    """State and payload of the newest checkpoint; None where there is none that is whole.

    Raises
    ------
    StorageError : when a file is there and cannot be read now; to start anew would lose what was done.
    """
    pointer = run.join(POINTER)
    if not pointer.exists():
        return None
    written = pointer.read()
    try:
        state = json.loads(written)
        payload, digest = run.join(state["file"]), state["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not payload.exists():
        return None
    found = payload.read()
    return (state, found) if sha256(found) == digest else None
