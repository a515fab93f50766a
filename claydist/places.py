"""What places mean where there are several nodes: paths that all must see, and the registry of a spec."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claydist import cluster
from claydist.errors import DataError, SpecError, StorageError
from claydist.registry import Registry, open_registry, registry_url
from claydist.runs import FILE
from claydist.spec import ScoreSpec, TrainSpec
from claydist.storage import Store


def registry_of(spec: TrainSpec, flag: str | None = None) -> Registry:
    """The registry to train into; on storage of the same kind as the data it takes the data's storage options.

    Raises
    ------
    SpecError : for a relative local path inside a Ray job or on several nodes.
    """
    return _registry(registry_url(flag, spec.registry), spec.data.path, spec.data.storage_options)


def scoring_registry(spec: ScoreSpec, flag: str | None = None) -> Registry:
    """The registry to score from; storage options and errors as `registry_of`."""
    return _registry(registry_url(flag, spec.registry), spec.input, spec.storage_options)


def _registry(url: str, paths: Sequence[str], options: Mapping[str, Any]) -> Registry:
    check_paths([url])
    protocols = {path.partition("://")[0] for path in paths if "://" in path}
    return open_registry(url, options=options if url.partition("://")[0] in protocols else None)


def check_paths(paths: Any) -> None:
    """Pass when every node would find the same files under these paths.

    Raises
    ------
    SpecError : for a relative local path inside a Ray job or on several nodes.
    """
    relative = [p for p in paths if "://" not in str(p) and not Path(p).is_absolute()]
    if relative and (cluster.is_inside_job() or len(cluster.living_nodes()) > 1):
        raise SpecError(
            f"relative paths {sorted(relative)} mean another place inside a Ray job or on another node; "
            f"give absolute paths that every node sees, or storage URLs (s3://, gs://)"
        )


def check_same_sizes(local: Mapping[str, int]) -> None:
    """Pass when every node sees these local files, by path, with these sizes in bytes.

    Raises
    ------
    DataError : with the nodes that do not, and what they see.
    """
    if problems := _differences(local):
        raise DataError("local files are not the same on every node; use a shared folder or storage URLs", problems)


def check_shared(run: Store) -> None:
    """Pass when every node sees the folder of a run, in which workers leave checkpoints that others go on from.

    Raises
    ------
    StorageError : with the nodes that do not.
    """
    if run.is_local and (problems := _differences({run.join(FILE).path: run.join(FILE).info().size})):
        raise StorageError("the registry is not the same on every node; use a shared folder or a storage URL", problems)


def _differences(sizes: Mapping[str, int]) -> list[str]:
    """What nodes see of local files that is not so; looked for only where there are several machines."""
    if not sizes or len({node.address for node in cluster.living_nodes()}) < 2:
        return []
    return [problem for seen in cluster.run_on_every_node(_differing_sizes, sizes) for problem in seen[:5]]


def _differing_sizes(expected: Mapping[str, int]) -> list[str]:
    found = {path: Path(path).stat().st_size if Path(path).exists() else None for path in expected}
    host = socket.gethostname()
    return [
        f"{path} on {host}: expected {expected[path]} bytes, found {'no such file' if size is None else size}"
        for path, size in found.items()
        if size != expected[path]
    ]
