"""How much memory a training worker will need, from the footers: rows, features, workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from claydist import cluster
from claydist.arrays import native_type
from claydist.dataset.reader import batch_rows_of
from claydist.errors import ClusterError
from claydist.features import is_categorical
from claydist.preparation import Prepared
from claydist.schema import column_of
from claydist.spec import DataSpec, TrainSpec, XGBoostSpec

# What a worker process holds before it has read a row: Ray, numpy, pyarrow, xgboost and what they import.
BASE_MB = 300
# Of each cell of a batch: as it is read, encoded, and as the model takes it.
BATCH_CELL_BYTES = 12
# Fitted to the measured PSS of XGBoost 3.2: two copies of the bin index (by row and by column), and for each row
# label, prediction, gradient pair and its places in the partition of the tree.
INDEX_COPIES = 2
ROW_BYTES = 73
# For each output beyond the first (of a class or quantile): gradient pair, prediction, and its copy for the metric.
OUTPUT_BYTES = 16
# The histogram of a node: two doubles for each bin of each feature. XGBoost keeps those of a tree's nodes until it is
# grown, and at most so many (max_cached_hist_node, doc/parameter.rst).
HISTOGRAM_BYTES = 16
CACHED_NODES = 65_536
# Where depth does not bound them: a node for so many rows in deep trees of noise. Labels that follow the features
# closely make three times as many, and skewed ones a third.
NODE_ROWS = 14
HESSIAN_COPIES = 3
# Of a ranking's encoded rows while they are put in the order of their queries: batches, concatenated, sorted.
RANKING_COPIES = 3


def estimate_mb(spec: TrainSpec, columns: Sequence[pa.Field], n_rows: int, n_workers: int, n_classes: int = 1) -> float:
    """Estimated peak PSS of one training worker in MB (10^6 bytes).

    Of a ranking all encoded rows are held besides while they are binned; a linear model keeps each column in the width
    that it is computed with. Deep trees hold histograms of as many nodes as the labels make of the rows, which nobody
    knows before.

    Parameters
    ----------
    columns : of the features, as they are in the input.
    n_classes : of a multiclass model; 1 for another, or before the data are read.
    """
    rows = n_rows / n_workers
    widths = [width for column in columns for width in _widths(column, spec.data)]
    cells = rows * len(widths)
    batches = BATCH_CELL_BYTES * min(rows, batch_rows_of(column.type for column in columns)) * len(widths)
    if isinstance(spec.model, XGBoostSpec):
        width = 1 if n_bins(spec.model) <= 256 else 2
        # The matrix is made when the first two copies are gone, and is not larger.
        kept = RANKING_COPIES * rows * sum(widths) if spec.data.group is not None else 0
        row = ROW_BYTES + OUTPUT_BYTES * (max(n_classes, len(spec.model.quantiles), 1) - 1)
        histograms = HISTOGRAM_BYTES * n_nodes(spec.model, n_rows) * min(n_bins(spec.model), n_rows) * len(widths)
        return BASE_MB + (INDEX_COPIES * width * cells + kept + row * rows + batches + histograms) / 1e6
    hessian = HESSIAN_COPIES * 8 * len(widths) ** 2 if spec.model.solver == "newton" else 0
    return BASE_MB + (rows * (sum(widths) + 32) + batches + hessian) / 1e6


def n_bins(model: XGBoostSpec) -> int:
    """Bins of a feature; XGBoost's own number where the spec's is none, which is told elsewhere."""
    return _number(model.params.get("max_bin"), 256)


def n_nodes(model: XGBoostSpec, n_rows: int) -> float:
    """Nodes whose histograms a worker holds while a tree grows; of all workers' rows, for all grow the same tree."""
    given = model.params
    depth, leaves = _number(given.get("max_depth"), 6), _number(given.get("max_leaves"), 0)
    by_rows = n_rows / max(NODE_ROWS, _number(given.get("min_child_weight"), 1))
    cached = _number(given.get("max_cached_hist_node"), CACHED_NODES)
    return min(2 ** min(depth, 30) if depth else math.inf, 2 * leaves or math.inf, by_rows, cached)


def _number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else default


def _widths(field: pa.Field, data: DataSpec) -> list[int]:
    """Bytes a row of each feature that comes of a column: codes are int32, a timestamp may give several parts."""
    column = column_of(field, "the input")
    if is_categorical(column, data):
        return [4]
    if column.type in ("timestamp", "date"):
        return [8] * len(data.calendar.get(column.name, ("seconds",)))
    return [native_type(field.type).byte_width]


def check_memory(spec: TrainSpec, prepared: Prepared, layout: Mapping[str, int]) -> None:
    """Pass when the nodes' memory holds the workers by the estimate; `train.memory_gb` overrides it.

    Raises
    ------
    ClusterError : with the estimate, what the nodes have, and what to do.
    """
    if spec.train.memory_gb:
        return
    n_workers = layout["n_workers"]
    schema = prepared.parts["train"].inventory.schema
    columns = [schema.field(name) for name in prepared.roles.features]
    n_rows = sum(prepared.parts[name].n_rows for name in prepared.trained_parts)
    n_classes = len(prepared.target.classes) if prepared.target.task == "multiclass" else 1
    needed_mb = estimate_mb(spec, columns, n_rows, n_workers, n_classes)
    found = cluster.nodes()
    room = sum(int(node.memory / 1e6 // needed_mb) for node in found)
    if room < n_workers:
        largest = max(node.memory for node in found) / 1e6
        raise ClusterError(
            f"{n_workers} workers would need about {needed_mb:,.0f} MB each, and the nodes have room for {room} of "
            f"them (the largest has {largest:,.0f} MB): add nodes, take fewer features, or set train.memory_gb to "
            f"what you know a worker needs"
        )
