"""The worker's loop for boosted models: boost in segments, stop early, checkpoint.

A segment is a run of rounds at whose end there may be a checkpoint. Its bounds are a function of the round alone, so
the model does not depend on the clock, and a run that resumes at a bound gives the same bytes as one that was never
disturbed. Where XGBoost draws random numbers (subsample, dart, ...) each segment has a fresh booster that continues the
one before, seeded by (seed, segment), for the random state is not in the model (dmlc/xgboost#10324). Where nothing is
drawn one booster goes through, and need not predict all rows anew at each bound.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xgboost as xgb

from claydist.collective import Collective
from claydist.errors import MetricError, SpecError
from claydist.features import FeaturePlan
from claydist.models.boosted import is_random
from claydist.spec import XGBoostSpec
from claydist.storage import Store
from claydist.training.binning import bin_options, bin_parts
from claydist.training.checkpoints import find_checkpoint, save_checkpoint
from claydist.training.job import TrainJob
from claydist.training.progress import Reporter

FIRST_SEGMENT = 25
# The metric of the training rows is for the eye: beyond so many rows only every 25th round is looked at.
TRAIN_METRIC_ROWS = 200_000
TRAIN_METRIC_EVERY = 25
# Summed exactly over workers by XGBoost; the others (auc, aucpr, custom ones) are averages of the workers' values.
SUMMED_METRICS = (
    "logloss", "mlogloss", "error", "merror", "rmse", "rmsle", "mae", "mape", "mphe", "poisson-nloglik",
    "gamma-nloglik", "gamma-deviance", "tweedie-nloglik", "quantile",
)  # fmt: skip
# Sums over queries; without queries XGBoost takes each worker's rows as one.
SUMMED_BY_QUERY = ("ndcg", "map", "pre")


def segment_end(done: int, rounds: int) -> int:
    """The round at which the segment that starts at `done` ends: 25, 50, 100, 200, ... and at last `rounds`."""
    bound = FIRST_SEGMENT
    while bound <= done:
        bound *= 2
    return min(bound, rounds)


def segment_seed(seed: int, done: int) -> int:
    """The seed of the segment that starts at `done`, below 2^31."""
    return int(np.random.SeedSequence((seed, done)).generate_state(1)[0] >> 1)


@dataclass
class History:
    """The evaluation metric round by round, and whether boosting should stop.

    Attributes
    ----------
    metric : XGBoost's name.
    values : by part, one value a round; None where train was not looked at.
    """

    metric: str
    values: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, line: str, parts: Iterable[str]) -> None:
        """Take XGBoost's line of a round: `[7]`, then `train-rmse:1.5` and the like, with tabs between."""
        found: dict[str, float] = {}
        for item in line.split("\t")[1:]:
            name, _, value = item.rpartition(":")
            found[name.partition("-")[0]] = float(value)
        for part in parts:
            self.values.setdefault(part, []).append(found.get(part))

    def latest(self) -> dict[str, float]:
        """The newest value of each part."""
        known = {part: [v for v in values if v is not None] for part, values in self.values.items()}
        return {part: values[-1] for part, values in known.items() if values}

    @property
    def rises(self) -> bool:
        """True where larger is better."""
        return self.metric.partition("@")[0] in SUMMED_BY_QUERY

    def best_round(self) -> int | None:
        """The first round with the best value on valid; None where valid is not watched."""
        watched = np.array(self.values.get("valid", []), np.float64)
        if np.isnan(watched).all():
            return None
        return int(np.nanargmax(watched) if self.rises else np.nanargmin(watched))

    def is_over(self, patience: int | None) -> bool:
        """True when valid has not gained for `patience` rounds.

        Raises
        ------
        MetricError : when the newest value is no number: which round is best cannot be told any more.
        """
        valid = self.values.get("valid")
        if patience is None or not valid:
            return False
        if valid[-1] is None or np.isnan(valid[-1]):
            raise MetricError(
                f"{self.metric} on valid is not a number in round {len(valid)}, and model.early_stopping cannot go by "
                f"it; look for labels or predictions that it does not take, or set another model.params.eval_metric"
            )
        best = self.best_round()
        return best is not None and len(valid) - 1 - best >= patience


def boost(job: TrainJob, collective: Collective, reporter: Reporter) -> dict[str, Any]:
    """Train on this worker's shard together with the others; the same model on all.

    Returns
    -------
    model (UBJSON bytes), history, n_rounds, resumed_at, seconds by stage.
    """
    spec = job.model
    assert isinstance(spec, XGBoostSpec)
    started = time.monotonic()
    matrices = bin_parts(job, collective.rank, reporter)
    binned = time.monotonic()
    history = History(str(job.params["eval_metric"]))
    raw, done = _resume(job.run, collective, history)
    resumed_at, saved = done, time.monotonic()
    booster = _booster(job, matrices, raw, done)
    while done < spec.rounds and not history.is_over(spec.early_stopping):
        end = segment_end(done, spec.rounds)
        if done > resumed_at and is_random(job.params):
            raw = _raw(booster)
            # It holds several numbers for each row: there should be one at a time.
            del booster
            booster = _booster(job, matrices, raw, done)
        done = _segment(job, booster, matrices, (done, end), history, reporter)
        due = time.monotonic() - saved >= job.checkpoint_s
        if collective.rank == 0 and due and done == end < spec.rounds:
            save_checkpoint(job.run, _raw(booster), {"round": done, "history": history.values})
            saved = time.monotonic()
    raw = _raw(booster)
    best = history.best_round()
    n_rounds = best + 1 if spec.early_stopping and best is not None else done
    if n_rounds < done:
        raw = _raw(_load(raw)[:n_rounds])
    return {
        "model": raw,
        "history": {"metric": history.metric, **history.values, "best_round": best},
        "n_rounds": n_rounds,
        "resumed_at": resumed_at,
        "seconds": {"read and bin": binned - started, "boost": time.monotonic() - binned},
    }


def summed_metrics(objective: str) -> tuple[str, ...]:
    """Metrics that XGBoost sums exactly over workers, and that may stop the boosting, for this objective."""
    return SUMMED_METRICS + (SUMMED_BY_QUERY if objective.startswith("rank:") else ())


def check_params(params: Mapping[str, Any], plan: FeaturePlan) -> None:
    """Pass when XGBoost takes the parameters, tried on eight rows in this process.

    Raises
    ------
    SpecError : in XGBoost's words, for a value it refuses or a name it does not know.
    """
    metric = str(params["eval_metric"])
    summed = summed_metrics(str(params["objective"]))
    if metric.partition("@")[0] not in summed:
        raise SpecError(
            f"model.params.eval_metric: {metric!r} is an average of workers' values in XGBoost, not a sum; "
            f"choose one of {', '.join(summed)}; claydist reports exact auc and the others at the end"
        )
    rng = np.random.default_rng(0)
    n_classes = int(params.get("num_class", 2))
    X = rng.integers(0, 2, (8, len(plan.names))).astype(np.float32)
    ranking = {"qid": np.zeros(8)} if str(params["objective"]).startswith("rank:") else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # A gamma distribution has no zero.
            y = np.ones(8) if params["objective"] == "reg:gamma" else np.arange(8) % n_classes
            options = {**ranking, **bin_options(params)}
            Xy = xgb.QuantileDMatrix(X, y, feature_types=plan.kinds, enable_categorical=True, nthread=1, **options)
            xgb.train({**params, "nthread": 1, "validate_parameters": True}, Xy, 1)
        except (xgb.core.XGBoostError, ValueError, TypeError) as e:
            lines = [line.strip() for line in str(e).splitlines() if line.strip() and "Stack trace" not in line]
            raise SpecError(
                f"model.params: XGBoost refuses them: {lines[0][:300] if lines else type(e).__name__}"
            ) from e
    unused = [str(w.message) for w in caught if "are not used" in str(w.message)]
    if unused:
        names = unused[0].partition("Parameters: {")[2].partition("}")[0].strip()
        raise SpecError(f"model.params: XGBoost {xgb.__version__} does not use {names}; take it out, or mend the name")


def _booster(job: TrainJob, matrices: Mapping[str, xgb.QuantileDMatrix], raw: bytes, done: int) -> xgb.Booster:
    """A booster that goes on from a model (empty bytes for none) of so many rounds."""
    params = {**job.params, "seed": segment_seed(job.seed, done), "validate_parameters": False}
    booster = xgb.Booster(params, list(matrices.values()))
    if raw:
        booster.load_model(bytearray(raw))
        booster.set_param(params)
    return booster


def _segment(
    job: TrainJob,
    booster: xgb.Booster,
    matrices: Mapping[str, xgb.QuantileDMatrix],
    bounds: tuple[int, int],
    history: History,
    reporter: Reporter,
) -> int:
    """Number of rounds after those in [bounds[0], bounds[1]), or fewer when valid stops gaining."""
    assert isinstance(job.model, XGBoostSpec)
    n_rows = job.parts["train"].n_rows
    every = 1 if n_rows <= TRAIN_METRIC_ROWS else TRAIN_METRIC_EVERY
    for done in range(*bounds):
        began = time.monotonic()
        booster.update(matrices["train"], iteration=done)
        look = done % every == every - 1 or done == 0
        watched = [(matrix, part) for part, matrix in matrices.items() if look or part != "train"]
        history.add(booster.eval_set(watched, done) if watched else "", matrices)
        took = max(time.monotonic() - began, 1e-9)
        reporter.tell(
            stage="boost",
            round=done + 1,
            of=job.model.rounds,
            metric=history.metric,
            values=history.latest(),
            rows_per_s=n_rows / took,
            eta_s=took * (job.model.rounds - done - 1),
        )
        if history.is_over(job.model.early_stopping):
            break
    return booster.num_boosted_rounds()


def _resume(run: Store, collective: Collective, history: History) -> tuple[bytes, int]:
    """The model of the newest checkpoint and its rounds; all workers must have found the same one."""
    found = find_checkpoint(run)
    collective.check_contract({"checkpoint": found[0]["sha256"] if found else None})
    if found is None:
        return b"", 0
    state, raw = found
    history.values.update({part: list(values) for part, values in state["history"].items()})
    return raw, int(state["round"])


def _load(raw: bytes) -> xgb.Booster:
    booster = xgb.Booster()
    booster.load_model(bytearray(raw))
    return booster


def _raw(booster: xgb.Booster) -> bytes:
    return bytes(booster.save_raw("ubj"))
