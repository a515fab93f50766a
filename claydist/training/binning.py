"""From a worker's shard to the quantile matrices that XGBoost boosts on: batches, passes over them, and the cuts."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xgboost as xgb

from claydist.errors import SpecError
from claydist.features import Encoded, FeaturePlan
from claydist.models.boosted import position_names
from claydist.spec import XGBoostSpec
from claydist.training.job import Batch, Shard, ShardRows, TrainJob, by_group
from claydist.training.progress import Reporter
from claydist.training.spill import Spill, has_room

SAMPLED_ROWS = 200_000
SAMPLED_GROUPS = 16
SAMPLED_SHARE = 10
# Of label, weight, offset and query beside the matrix.
ROW_BYTES = 32


def bin_parts(job: TrainJob, rank: int, reporter: Reporter) -> dict[str, xgb.QuantileDMatrix]:
    """The quantile matrix of each part; the others take their cuts from train, and train from a sample if so asked."""
    matrices: dict[str, xgb.QuantileDMatrix] = {}
    cuts = _sample_matrix(job, rank) if isinstance(job.model, XGBoostSpec) and job.model.binning == "sample" else None
    for part in job.parts:
        shard = job.shard(part, rank)
        n_bytes = shard.n_rows * (4 * len(job.plan.features) + ROW_BYTES)
        rows = ShardIter(partial(shard_inputs, shard, reporter, part), n_bytes)
        matrices[part] = _quantile_matrix(job, rows, matrices.get("train", cuts))
        del rows
        gc.collect()
    return matrices


def _sample_matrix(job: TrainJob, rank: int) -> xgb.QuantileDMatrix:
    """A small matrix of rows from all shards, to take quantile cuts from."""
    shard = job.shard("train", rank)
    if job.roles.group:
        raise SpecError("model.binning 'sample' cannot sample whole queries; use 'exact' for a ranking")
    n_sample = max(1, SAMPLED_ROWS * shard.n_rows // job.parts["train"].n_rows)
    sample = sampled_inputs(shard, n_sample)
    return _quantile_matrix(job, ShardIter(lambda: iter(sample), math.inf), None)


def _quantile_matrix(job: TrainJob, rows: ShardIter, cuts: xgb.QuantileDMatrix | None) -> xgb.QuantileDMatrix:
    options = bin_options(job.params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ee]mpty dataset.*")
        return xgb.QuantileDMatrix(rows, ref=cuts, nthread=job.n_threads, enable_categorical=True, **options)


def bin_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a quantile matrix must know as the booster does."""
    return {"max_bin": int(params["max_bin"])} if "max_bin" in params else {}


class ShardIter(xgb.DataIter):
    """The batches of a shard as XGBoost passes over them, four times for a quantile matrix.

    They are made on XGBoost's own thread: its other threads wait at the end of each step for the slowest, so that one
    beside them, which takes a core from them, costs more than it saves.

    Parameters
    ----------
    make : the batches of one pass, as arguments of XGBoost's `input_data`.
    n_bytes : of all their arrays; where there is room for them the first pass is written to a file for the others.
        Infinity for batches that are in memory already.
    """

    def __init__(self, make: Callable[[], Iterator[dict[str, Any]]], n_bytes: float) -> None:
        super().__init__(release_data=True)
        self._make = make
        self._has_room = has_room(n_bytes)
        self._spill: Spill | None = None
        self._batches: Iterator[dict[str, Any]] = iter(())

    def reset(self) -> None:
        """Start the next pass."""
        self._batches = self._first_pass() if self._spill is None else self._spill.read()

    def next(self, input_data: Callable[..., Any]) -> bool:
        """Hand over the next batch; False at the end of a pass."""
        batch = next(self._batches, None)
        if batch is None:
            return False
        input_data(**batch)
        return True

    def _first_pass(self) -> Iterator[dict[str, Any]]:
        spill = Spill() if self._has_room else None
        for batch in self._make():
            if self._has_room and spill is not None:
                try:
                    spill.write(batch)
                except OSError:  # somebody else has filled the disk: the other passes make them anew
                    self._has_room = False
            yield batch
        self._spill = spill if self._has_room else None


def shard_inputs(shard: Shard, reporter: Reporter, part: str) -> Iterator[dict[str, Any]]:
    """The shard's rows as arguments of XGBoost's `input_data`; one batch of no rows for an empty shard."""
    job, n_seen = shard.job, 0
    batches = shard.batches() if shard.n_rows else iter([shard.empty()])
    if job.roles.group:
        batches = iter([by_group(batches)])
    for batch in batches:
        yield _as_input(job.plan, batch)
        n_seen += batch.encoded.n_rows
        reporter.tell(stage="read", part=part, rows=n_seen, of=shard.n_rows)


def _as_input(plan: FeaturePlan, batch: Batch) -> dict[str, Any]:
    given: dict[str, Any] = {"data": plan.tree_matrix(batch.encoded), "label": batch.y}
    if batch.group is not None:
        queries, qid = np.unique(batch.group, return_inverse=True)
        given["qid"] = qid
        if batch.w is not None:
            # XGBoost weighs whole queries.
            given["weight"] = np.bincount(qid, batch.w, len(queries)) / np.bincount(qid, minlength=len(queries))
    elif batch.w is not None:
        given["weight"] = batch.w
    if batch.offset is not None:
        given["base_margin"] = batch.offset
    return {**given, "feature_names": position_names(plan), "feature_types": plan.kinds}


def sampled_inputs(shard: Shard, n_sample: int) -> list[dict[str, Any]]:
    """About `n_sample` of the shard's rows, evenly spread, as `shard_inputs`, without offsets, and one row of codes.

    Of many row groups only some are read, evenly spread too, unless these know nothing of a column. The last row holds
    the largest code of every category: XGBoost 3.2 takes a code beyond those it made its cuts from for the last one.
    The same rows for the same job.
    """
    pieces, job = shard.rows.pieces, shard.job
    n_groups = max(SAMPLED_GROUPS, SAMPLED_SHARE * n_sample * len(pieces) // max(1, shard.n_rows))
    every = max(1, len(pieces) // n_groups)
    sample = list(_every(shard, every, n_sample))
    if every > 1 and np.all([np.isnan(part["data"]).all(axis=0) for part in sample], axis=0).any():
        sample = list(_every(shard, 1, n_sample))
    codes = tuple(
        np.array([f.n_codes - 1], np.int32) if f.kind == "categorical" else np.full(1, np.nan)
        for f in job.plan.features
    )
    w = np.zeros(1) if job.roles.weight else None
    return [*sample, _as_input(job.plan, Batch(Encoded(1, codes), np.zeros(1), w, None))]


def _every(shard: Shard, step_groups: int, n_sample: int) -> Iterator[dict[str, Any]]:
    """About so many rows of one row group in so many."""
    rng = np.random.default_rng((shard.job.seed, 1))
    pieces = shard.rows.pieces[int(rng.integers(step_groups)) :: step_groups]
    some = replace(shard, rows=ShardRows(pieces, sum(piece.stop - piece.start for piece in pieces)))
    step = max(1, some.n_rows // n_sample)
    for batch in some.batches():
        at = np.arange(int(rng.integers(step)), batch.encoded.n_rows, step)
        if len(at):
            columns = tuple(column[at] for column in batch.encoded.columns)
            w = None if batch.w is None else batch.w[at]
            yield _as_input(shard.job.plan, Batch(Encoded(len(at), columns), batch.y[at], w, None))
