"""How much memory a training worker will need, from the footers: rows, features, workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from claydist import cluster
from claydist.errors import ClusterError
from claydist.features import is_categorical
from claydist.preparation import Prepared
from claydist.schema import Column
from claydist.spec import TrainSpec, XGBoostSpec
from claydist.training.job import KEEP_BYTES

# What a worker process holds before it has read a row: Ray, numpy, pyarrow, xgboost and what they import.
BASE_MB = 300
BATCH_ROWS = 131_072
# Fitted to the measured PSS of XGBoost 3.2: two copies of the bin index (by row and by column), and for each row
# label, prediction, gradient pair and its places in the partition of the tree.
INDEX_COPIES = 2
ROW_BYTES = 73


def estimate_mb(spec: TrainSpec, columns: Sequence[Column], n_rows: int, n_workers: int) -> float:
    """Estimated peak PSS of one training worker in MB (10^6 bytes).

    A boosted model's shard of up to KEEP_BYTES is held besides while it is binned; a linear model keeps each column in
    the width of its type.
    """
    rows = n_rows / n_workers
    cells = rows * len(columns)
    batches = 12 * BATCH_ROWS * len(columns)
    if isinstance(spec.model, XGBoostSpec):
        width = 1 if int(spec.model.params.get("max_bin", 256)) <= 256 else 2
        matrix = 4 * cells
        kept = matrix if matrix <= KEEP_BYTES else 0
        return BASE_MB + (INDEX_COPIES * width * cells + kept + ROW_BYTES * rows + batches) / 1e6
    widths = sum(4 if is_categorical(c, spec.data) else 8 for c in columns)
    return BASE_MB + (rows * (widths + 32) + batches) / 1e6


def check_memory(spec: TrainSpec, prepared: Prepared, layout: Mapping[str, int]) -> None:
    """Pass when the nodes' memory holds the workers by the estimate; `train.memory_gb` overrides it.

    Raises
    ------
    ClusterError : with the estimate, what the nodes have, and what to do.
    """
    if spec.train.memory_gb:
        return
    n_workers = layout["n_workers"]
    columns = prepared.plan.schema.columns
    n_rows = sum(prepared.parts[name].n_rows for name in prepared.trained_parts)
    needed_mb = estimate_mb(spec, columns, n_rows, n_workers)
    found = cluster.nodes()
    room = sum(int(node.memory / 1e6 // needed_mb) for node in found)
    if room < n_workers:
        largest = max(node.memory for node in found) / 1e6
        raise ClusterError(
            f"{n_workers} workers would need about {needed_mb:,.0f} MB each, and the nodes have room for {room} of "
            f"them (the largest has {largest:,.0f} MB): add nodes, take fewer features, or set train.memory_gb to "
            f"what you know a worker needs"
        )
