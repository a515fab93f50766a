"""The worker's loop for linear models: keep the shard in compact form, fit together with the others.

A restart fits anew from the start: it takes few passes, and the same bytes come out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from claydist.collective import Collective
from claydist.features import FeaturePlan
from claydist.models.linear import fit_linear
from claydist.spec import LinearSpec
from claydist.training.job import Batch, TrainJob
from claydist.training.progress import Reporter

LOSSES: Mapping[str, tuple[str, ...]] = {
    "binary": ("logistic",),
    "multiclass": ("logistic",),
    "regression": ("squared", "poisson"),
}


@dataclass(frozen=True)
class LinearChunk:
    """Some rows in the types they came in; the float64 block is made anew for each pass and not kept."""

    plan: FeaturePlan
    batch: Batch

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.batch.encoded.n_rows

    @property
    def y(self) -> np.ndarray:
        """Labels (n_rows,) float64."""
        return self.batch.y

    @property
    def w(self) -> np.ndarray | None:
        """Weights (n_rows,) float64, or None."""
        return self.batch.w

    @property
    def offset(self) -> np.ndarray | None:
        """Offsets (n_rows,) float64, or None."""
        return self.batch.offset

    @cached_property
    def codes(self) -> np.ndarray:
        """One-hot positions (n_rows, n_categoricals) int32, -1 for none."""
        return self.plan.onehot(self.batch.encoded)

    def dense(self) -> np.ndarray:
        """Imputed and standardised block (n_rows, n_dense) float64, column-major."""
        return self.plan.dense(self.batch.encoded)


def fit(job: TrainJob, collective: Collective, reporter: Reporter) -> dict[str, Any]:
    """Fit on this worker's shard together with the others; the same model on all.

    Returns
    -------
    model (arrays by name), history, n_rounds (iterations), converged, seconds by stage.
    """
    spec = job.model
    assert isinstance(spec, LinearSpec)
    started = time.monotonic()
    shard = job.shard("train", collective.rank)
    chunks = []
    n_rows = 0
    for batch in shard.batches():
        chunks.append(LinearChunk(job.plan, batch))
        n_rows += batch.encoded.n_rows
        reporter.tell(stage="read", part="train", rows=n_rows, of=shard.n_rows)
    read = time.monotonic()

    def progress(n_iter: int, objective: float) -> None:
        pace = job.parts["train"].n_rows * n_iter / max(time.monotonic() - read, 1e-9)
        reporter.tell(
            stage="fit", round=n_iter, of=spec.max_iter, metric="objective", values={"train": objective},
            rows_per_s=pace,
        )  # fmt: skip

    fitted = fit_linear(
        chunks,
        spec=spec,
        loss=str(job.params["loss"]),
        n_dense=job.plan.n_dense,
        n_onehot=job.plan.n_onehot,
        n_outputs=int(job.params["n_outputs"]),
        total=collective.total,
        n_threads=job.n_threads,
        progress=progress,
    )
    return {
        "model": fitted.model.to_arrays(),
        "history": {"metric": "objective", "train": list(fitted.history), "best_round": None},
        "n_rounds": fitted.n_iter,
        "converged": fitted.converged,
        "gradient_max": fitted.gradient_max,
        "seconds": {"read": read - started, "fit": time.monotonic() - read},
    }
