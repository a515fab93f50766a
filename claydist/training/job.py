"""What a training worker is given: everything is decided before it starts."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from claydist.arrays import native_values
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece, plan_groups, plan_shards
from claydist.dataset.split import hash_values
from claydist.dataset.statistics import Part
from claydist.features import Encoded, FeaturePlan, concat_encoded
from claydist.labels import label_values
from claydist.predictor import Target, offset_values
from claydist.schema import Roles
from claydist.spec import LinearSpec, XGBoostSpec
from claydist.storage import Store


@dataclass(frozen=True)
class ShardRows:
    """Where the rows of one worker are; of a ranking only those of its groups (sorted hashes, uint64) count."""

    pieces: tuple[Piece, ...]
    n_rows: int
    groups: np.ndarray | None = None


def plan_part(part: Part, n_workers: int) -> tuple[ShardRows, ...]:
    """The rows of each worker; ranking groups stay whole."""
    if part.groups is None:
        shards = plan_shards(part.counts, n_workers)
        return tuple(ShardRows(pieces, sum(piece.n_rows for piece in pieces)) for pieces in shards)
    return tuple(ShardRows(s.pieces, s.n_rows, s.groups) for s in plan_groups(part.groups, n_workers))


@dataclass(frozen=True)
class TrainJob:
    """One training, frozen: data, shards, features, model, and how it is laid out.

    Attributes
    ----------
    shards : by part, the rows of each worker.
    run : the directory of the run's checkpoints.
    cache_dir : where each node keeps remote bytes between passes.
    """

    run_id: str
    run: Store
    parts: Mapping[str, Part]
    shards: Mapping[str, tuple[ShardRows, ...]]
    plan: FeaturePlan
    target: Target
    roles: Roles
    model: XGBoostSpec | LinearSpec
    params: Mapping[str, Any]
    seed: int
    n_workers: int
    n_threads: int
    checkpoint_s: float
    cache_dir: str | None = None

    def contract(self) -> dict[str, Any]:
        """What all workers must agree on before round 0."""
        return {
            "names": self.plan.names,
            "kinds": self.plan.kinds,
            "schema": self.plan.schema.to_json(),
            "features": self.plan.to_json()["features"],
            "target": repr(self.target),
            "model": self.model.model_dump(mode="json"),
            "params": dict(self.params),
            "seed": self.seed,
            "inventory": self.parts["train"].inventory.fingerprint,
            "world size": self.n_workers,
            "threads": self.n_threads,
            "versions": versions(),
        }

    def shard(self, part: str, rank: int) -> Shard:
        """The rows of one worker."""
        shards = self.shards[part]
        return Shard(self, self.parts[part], shards[rank] if rank < len(shards) else ShardRows((), 0))


@dataclass(frozen=True)
class Batch:
    """Some rows as arrays; `w`, `offset` and `group` (hashes of the ranking query) are None where there are none."""

    encoded: Encoded
    y: np.ndarray
    w: np.ndarray | None
    offset: np.ndarray | None
    group: np.ndarray | None = None


@dataclass(frozen=True)
class Shard:
    """The rows of one part that one worker reads."""

    job: TrainJob
    part: Part
    rows: ShardRows

    @property
    def n_rows(self) -> int:
        """Number of rows in the shard."""
        return self.rows.n_rows

    def batches(self) -> Iterator[Batch]:
        """The rows in bounded batches, in the order of the input; no batch for no rows."""
        job, roles, inventory = self.job, self.job.roles, self.part.inventory
        source = ", ".join(sorted({inventory.files[p.file].url for p in self.rows.pieces})[:3])
        groups = None if self.rows.groups is None else (str(roles.group), self.rows.groups)
        for table in read_pieces(
            inventory, self.rows.pieces, roles.columns, self.part.selection, groups=groups, cache_dir=job.cache_dir
        ):
            yield Batch(
                job.plan.encode(table),
                label_values(job.target, table.column(roles.label), source),
                _numbers(table, roles.weight),
                None if roles.offset is None else offset_values(table, roles.offset, source),
                None if roles.group is None else hash_values(table.column(roles.group)),
            )

    def empty(self) -> Batch:
        """A batch of no rows, of the right types."""
        kinds = (np.int32 if f.kind == "categorical" else np.float64 for f in self.job.plan.features)
        nothing, roles = np.empty(0), self.job.roles
        return Batch(
            Encoded(0, tuple(np.empty(0, kind) for kind in kinds)),
            nothing,
            nothing if roles.weight else None,
            nothing if roles.offset else None,
            np.empty(0, np.uint64) if roles.group else None,
        )


def by_group(batches: Iterable[Batch]) -> Batch:
    """All rows as one batch, those of a ranking query together, in the order of the queries' hashes."""
    parts = list(batches)
    groups = np.concatenate([b.group for b in parts if b.group is not None])
    order = np.argsort(groups, kind="stable")
    encoded = concat_encoded([b.encoded for b in parts])

    def sort(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        known = [a for a in arrays if a is not None]
        return np.concatenate(known)[order] if known else None

    sorted_columns = tuple(column[order] for column in encoded.columns)
    y = np.concatenate([b.y for b in parts])[order]
    return Batch(
        Encoded(encoded.n_rows, sorted_columns, encoded.unseen),
        y, sort([b.w for b in parts]), sort([b.offset for b in parts]), groups[order],
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what decides on the bytes of a model."""
    import scipy
    import xgboost

    from claydist import __version__

    return {
        "claydist": __version__, "python": platform.python_version(), "numpy": np.__version__,
        "pyarrow": pa.__version__, "scipy": scipy.__version__, "xgboost": xgboost.__version__,
    }  # fmt: skip


def _numbers(table: pa.Table, name: str | None) -> np.ndarray | None:
    return None if name is None else native_values(table.column(name)).astype(np.float64)
