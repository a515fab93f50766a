"""Runs: what was started from this registry, how far it came and why it ended; one folder each under `_runs`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from claydist import alive
from claydist.errors import RegistryError, StorageError
from claydist.registry import Registry
from claydist.spec import ScoreSpec, TrainSpec
from claydist.storage import Store, redact

FOLDER = "_runs"
FILE = "run.json"
LEASE = "lease.json"
KEEP_ENDED = 100
RESUMABLE_S = 14 * 24 * 3600.0
"""What `--resume` goes on from is kept for so long after a run has failed, was stopped or lost."""
# How a run goes about its work; a run may be resumed under others of these.
_OPERATIONAL = {"max_failures", "timeout_s", "wait_s", "checkpoint_s"}


@dataclass(frozen=True)
class Run:
    """One run; `facts` is what run.json said when it was read or last written."""

    store: Store
    facts: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """The run's name, unique in its registry."""
        return str(self.facts["id"])

    @property
    def state(self) -> str:
        """running, finished, failed, interrupted; or lost: it says running, and its process is gone.

        On this host that is seen at once, elsewhere when the run's lease is over, a minute after its end.
        """
        state = str(self.facts["state"])
        return "lost" if state == "running" and not self._is_alive() else state

    @property
    def is_mine(self) -> bool:
        """True when this process wrote itself down as the run's."""
        return all(self.facts.get(name) == value for name, value in process_facts().items())

    def kept_alive(self) -> alive.Renewed:
        """A context in which others see that the run goes on."""
        return alive.Renewed(self._lease)

    @property
    def _lease(self) -> Store:
        return self.store.join(LEASE)

    def _is_alive(self) -> bool:
        if self.facts.get("host") == alive.here() and self.facts.get("process_start"):
            return alive.started(int(self.facts["pid"])) == self.facts.get("process_start")
        # Between its first words and its lease a run is as alive as with a lease of that moment.
        written = datetime.fromisoformat(str(self.facts["updated_at"])).timestamp()
        return max(written + alive.LEASE_S, alive.lease_end(self._lease) or 0.0) > time.time()

    def update(self, **facts: Any) -> Run:
        """The run after its file was replaced with these facts added."""
        merged = {**self.facts, **facts, "updated_at": _now()}
        self.store.join(FILE).write(json.dumps(merged, indent=1, default=str).encode())
        return Run(self.store, merged)

    def finish(self, **facts: Any) -> Run:
        """The run after it ended well; checkpoints and Ray Train's own files are removed."""
        run = self.update(state="finished", ended_at=_now(), **facts)
        run.strip()
        return run

    def strip(self) -> None:
        """Remove all but what says what the run was."""
        for name in self.store.list():
            if name != FILE:
                self.store.join(name).remove(recursive=True)

    def fail(self, error: BaseException) -> Run:
        """The run after it ended badly; its checkpoints stay, for `--resume`."""
        state = "failed" if isinstance(error, Exception) else "interrupted"
        return self.update(state=state, ended_at=_now(), error=redact(f"{type(error).__name__}: {error}")[:4000])


def process_facts() -> dict[str, Any]:
    """What run.json says of this process."""
    return {"host": alive.here(), "pid": os.getpid(), "process_start": alive.my_start()}


def spec_digest(spec: TrainSpec | ScoreSpec) -> str:
    """SHA-256 of what decides on the result in a spec, as hexadecimal text; URLs without users and queries."""
    tree = public_spec(spec)
    tree.pop("registry", None)
    if "train" in tree:
        tree["train"] = {k: v for k, v in tree["train"].items() if k not in _OPERATIONAL}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def public_spec(spec: TrainSpec | ScoreSpec) -> dict[str, Any]:
    """The spec as JSON-able mapping, without what may hold credentials: storage options, users and queries of URLs."""
    tree = spec.model_dump(mode="json")
    tree.pop("storage_options", None)
    if "data" in tree:
        tree["data"].pop("storage_options", None)
    return {name: _redacted(value) for name, value in tree.items()}


def _redacted(value: Any) -> Any:
    """`value` with each string that is a URL redacted; labels, and URLs within an expression, are values of rows."""
    if isinstance(value, Mapping):
        return {name: part if name == "label" else _redacted(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) and re.match(r"\s*[\w+.:-]+://", value) else value


def start_run(
    registry: Registry, kind: str, spec: TrainSpec | ScoreSpec, name: str, inventory: str | None = None
) -> Run:
    """A new run, written down before it does anything, so that a night that fails at its input is seen too.

    Parameters
    ----------
    kind : train or score.
    inventory : fingerprint of the input, where it is known already; a run without one is never resumed.
    """
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S}-{name}-{secrets.token_hex(3)}"
    facts = {
        "id": run_id, "kind": kind, "name": name, "state": "running", "stage": "start", "started_at": now.isoformat(),
        **process_facts(), "spec_digest": spec_digest(spec), "inventory": inventory,
        "spec": public_spec(spec),
    }  # fmt: skip
    return Run(registry.store.join(FOLDER, run_id), facts).update()


def list_runs(registry: Registry) -> list[Run]:
    """All runs of the registry, the oldest first; folders without a readable run.json are left out."""
    folder = registry.store.join(FOLDER)
    runs = []
    for run_id in folder.list():
        try:
            runs.append(_read(folder.join(run_id)))
        except (StorageError, ValueError):
            continue
    # Ids tell seconds; within one of them their order is by chance.
    return sorted(runs, key=lambda run: str(run.facts.get("started_at")))


def show_run(registry: Registry, run_id: str) -> Run:
    """The run of this id.

    Raises
    ------
    RegistryError : when there is none; with the newest ids.
    """
    known = registry.store.join(FOLDER).list()
    if run_id not in known:
        raise RegistryError(f"no run {run_id!r} in {registry.store.url}; the newest: {', '.join(known[-5:]) or 'none'}")
    return _read(registry.store.join(FOLDER, run_id))


def find_unfinished(registry: Registry, kind: str, digest: str, inventory: str) -> Run | None:
    """The newest run of the same spec and inventory that did not finish."""
    same = [
        run for run in list_runs(registry)
        if (run.facts["kind"], run.facts["spec_digest"], run.facts["inventory"]) == (kind, digest, inventory)
        and run.facts["state"] != "finished"
    ]  # fmt: skip
    return same[-1] if same else None


def clean_runs(registry: Registry) -> None:
    """Remove the oldest ended runs beyond KEEP_ENDED, and checkpoints of those that nobody resumed in RESUMABLE_S."""
    now = datetime.now(UTC)
    ended = []
    for run in list_runs(registry):
        age = (now - datetime.fromisoformat(str(run.facts["updated_at"]))).total_seconds()
        if run.facts["state"] == "finished":
            ended.append(run)
        elif age > RESUMABLE_S and run.state != "running":
            ended.append(run)
            with suppress(StorageError):
                run.strip()
    for run in ended[:-KEEP_ENDED]:
        with suppress(StorageError):  # another run may tidy up at the same moment
            run.store.remove(recursive=True)


def _read(store: Store) -> Run:
    return Run(store, store.join(FILE).read_json())


def _now() -> str:
    return datetime.now(UTC).isoformat()
