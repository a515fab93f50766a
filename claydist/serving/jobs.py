"""Batch scoring by HTTP: a scoring run as a Ray job, over places that the operator allows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from claydist.errors import ClaydistError, SpecError
from claydist.serving.refusals import Refusal, refuse
from claydist.serving.settings import ServeSpec
from claydist.serving.shelf import Served
from claydist.spec import ScoreSpec
from claydist.specfile import load_spec
from claydist.storage import open_store, split_glob

logger = logging.getLogger("claydist.serving")

_ID = re.compile(r"claydist-score-[0-9a-f]{20}(-[0-9]{1,9})?")
_RANGE = ("from", "to", "replace", "replace_stale")
# What reaches storage with options of the caller's choosing could be pointed at anything the cluster can reach.
_OPERATORS = ("model", "registry", "storage_options")


class BatchJobs:
    """Submits, follows and stops scoring runs.

    Parameters
    ----------
    spec : roots, registry and the address of the Jobs API.
    """

    def __init__(self, spec: ServeSpec) -> None:
        self._spec = spec
        self._client: Any = None

    def submit(self, served: Served, tree: Any) -> dict[str, Any]:
        """The run that scores as `tree` says: a new one, or the same one where it is waiting or at work.

        A run that has ended is run again: what it published stays as it is, and there may be more to score by now.

        Parameters
        ----------
        tree : a scoring spec without model and registry; `from`, `to` (dates), `replace`, `replace_stale` beside.

        Raises
        ------
        Refusal : 400 for a spec that is wrong or places that are not allowed, 503 where the Jobs API does not answer.
        """
        self.require_roots()
        command, spec = self._checked(served, tree)
        client = self._connected()
        text = json.dumps([served.digest, command, spec.model_dump(mode="json")], sort_keys=True)
        base = f"claydist-score-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        job_id, status = _attempt(client, base)
        if status is None:
            _submit(client, job_id, _entrypoint(spec, command), served)
        return {"id": job_id, "status": status or "PENDING", **served.identity()}

    def look(self, job_id: str) -> dict[str, Any]:
        """Status of a run, and what `claydist score --json` said where it has ended."""
        client = self._connected()
        info = self._info(client, job_id)
        tree: dict[str, Any] = {"id": job_id, "status": str(info.status.value), **_metadata(info)}
        tree["started_at_ms"], tree["ended_at_ms"] = info.start_time, info.end_time
        if info.status.is_terminal():
            try:
                tree["result"] = _last_json(client.get_job_logs(job_id))
            except (RuntimeError, OSError) as e:  # they may be gone with their node
                logger.warning("Ray gave no logs of %s: %s", job_id, e)
                tree["result"] = None
        return tree

    def stop(self, job_id: str) -> dict[str, Any]:
        """Stop a run; one that has ended stays as it is."""
        client = self._connected()
        info = self._info(client, job_id)
        if not info.status.is_terminal():
            _ask(client.stop_job, job_id)
        return {"id": job_id, "status": str(_ask(client.get_job_status, job_id).value), **_metadata(info)}

    def _checked(self, served: Served, tree: Any) -> tuple[list[str], ScoreSpec]:
        """Arguments beside the spec, and the spec with the version that answers now."""
        if not isinstance(tree, dict):
            raise Refusal(400, "expected a JSON object: a scoring spec without model and registry")
        if named := sorted(set(_OPERATORS) & tree.keys()):
            raise Refusal(400, f"{', '.join(named)}: the operator's to say, not the request's", field=named[0])
        arguments = _arguments({key: tree[key] for key in _RANGE if key in tree})
        rest = {key: value for key, value in tree.items() if key not in _RANGE}
        version = f"{served.name}:{served.version}"
        try:
            spec = load_spec(ScoreSpec, {**rest, "model": version, "registry": self._registry_url()})
        except SpecError as e:
            raise Refusal(400, "the scoring spec is wrong", problems=e.problems or [e.message]) from None
        _require_below(spec.input, self._spec.batch.input_roots, "input")
        _require_below([spec.output], self._spec.batch.output_roots, "output")
        return arguments, spec

    def _registry_url(self) -> str:
        from claydist.registry import open_registry

        return open_registry(self._spec.registry).store.url

    def require_roots(self) -> None:
        """Pass where the operator allows batch scoring; a Refusal 503 where not."""
        if not (self._spec.batch.input_roots and self._spec.batch.output_roots):
            off = "batch scoring is off: the operator has given no batch.input_roots and batch.output_roots"
            raise Refusal(503, off, kind="batch_is_off")

    def _connected(self) -> Any:
        self.require_roots()
        if self._client is None:
            self._client = _open_client(self._spec.batch.address)
        return self._client

    def _info(self, client: Any, job_id: str) -> Any:
        missing = Refusal(404, "no such run; POST /batch/{model} gives the id", field="id")
        if not _ID.fullmatch(job_id):
            raise missing
        try:
            return client.get_job_info(job_id)
        except (RuntimeError, OSError) as e:
            if isinstance(e, RuntimeError) and re.search("404|does not exist", str(e)):
                raise missing from None
            raise _no_answer(e) from None


def _ask(call: Callable[[str], Any], job_id: str) -> Any:
    try:
        return call(job_id)
    except (RuntimeError, OSError) as e:
        raise _no_answer(e) from None


def _no_answer(error: Exception) -> Refusal:
    logger.warning("Ray's Jobs API: %s", error)
    return Refusal(503, "Ray's Jobs API does not answer; ask again a little later")


def normalised(url: str) -> str:
    """A URL or path as it is compared: absolute, links followed, no wildcard, no `..`; ends with `/`.

    Raises
    ------
    Refusal : 400 for what cannot be opened, or climbs with `..`.
    """
    root, pattern = split_glob(url)
    steps = f"{root}/{pattern or ''}".replace("\\", "/").split("/")
    if ".." in steps or "%" in url or "\0" in url:
        raise Refusal(400, f"expected a plain URL without '..' and '%', found {url[:100]!r}")
    try:
        store = open_store(root)
    except ClaydistError as e:
        raise refuse(e) from None
    place = os.path.realpath(store.path) if store.is_local else store.url
    return place.rstrip("/") + "/"


def _require_below(urls: Sequence[str], roots: Sequence[str], field: str) -> None:
    allowed = [normalised(root) for root in roots]
    for url in urls:
        place = normalised(url)
        if not any(place.startswith(root) for root in allowed):
            raise Refusal(400, f"{field}: {url[:100]!r} is not below a place that the operator allows", field=field)


def _arguments(given: Mapping[str, Any]) -> list[str]:
    arguments = []
    for key, value in given.items():
        if key in ("from", "to"):
            if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                raise Refusal(400, f"{key}: expected a date like 2026-11-21", field=key)
            arguments += [f"--{key}", value]
        elif not isinstance(value, bool):
            raise Refusal(400, f"{key}: expected true or false", field=key)
        elif value:
            arguments.append(f"--{key.replace('_', '-')}")
    return arguments


def _entrypoint(spec: ScoreSpec, arguments: Sequence[str]) -> str:
    """The job's command line: the spec goes in by a pipe, so that no file has to reach the head node."""
    text = json.dumps(spec.model_dump(mode="json", exclude_defaults=True))
    # Every node of a Ray cluster has the same environment; `python` may be another one.
    command = [sys.executable, "-m", "claydist", "score", "/dev/stdin", "--json", *arguments]
    return f"printf %s {shlex.quote(text)} | {shlex.join(command)}"


def _open_client(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address or _dashboard_address())
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise Refusal(
            503, f"batch scoring needs Ray's Jobs API, which this cluster does not offer ({first[:120]}); "
            "serve on a cluster that `ray start --head` began", kind="no_jobs_api",
        ) from None  # fmt: skip


def _dashboard_address() -> str | None:
    """The dashboard of the cluster that this process is part of, None to let Ray find one."""
    import ray

    if not ray.is_initialized():
        return None
    url = ray._private.worker.global_worker.node.webui_url if ray._private.worker.global_worker.node else None
    if not url:
        raise ConnectionError("it runs without a dashboard")
    return f"http://{url}"


def _attempt(client: Any, base: str) -> tuple[str, str | None]:
    """Id and status of the attempt that is waiting or at work, else the next id, which no attempt has; one request."""
    try:
        jobs = client.list_jobs()
    except (RuntimeError, OSError) as e:
        logger.warning("Ray did not list its jobs: %s", e)
        raise Refusal(503, "Ray did not list its jobs; ask again a little later") from None
    # A job that was not submitted by the Jobs API has no submission id.
    matches = ((re.fullmatch(rf"{base}(?:-(\d+))?", job.submission_id or ""), job) for job in jobs)
    attempts = {int(match[1] or 0): job for match, job in matches if match}
    for job in attempts.values():
        if not job.status.is_terminal():
            return job.submission_id, str(job.status.value)
    # Ray never takes an id twice.
    return (f"{base}-{max(attempts) + 1}" if attempts else base), None


def _status(client: Any, job_id: str) -> str | None:
    try:
        return str(client.get_job_status(job_id).value)
    except (RuntimeError, OSError):
        return None


def _submit(client: Any, job_id: str, entrypoint: str, served: Served) -> None:
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job_id, metadata=served.identity())
    except (RuntimeError, OSError) as e:
        # Two equal requests at once: the other one was first.
        if _status(client, job_id) is None:
            logger.warning("Ray did not take %s: %s", job_id, e)
            raise Refusal(503, "Ray did not take the job; ask again a little later") from None


def _metadata(info: Any) -> dict[str, str]:
    return {key: str((info.metadata or {}).get(key, "")) for key in ("model", "version", "digest")}


def _last_json(logs: str) -> Any:
    """The last line that is a JSON object: what `--json` prints, and no traceback."""
    for line in reversed(logs.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None
