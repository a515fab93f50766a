"""Gradient boosting by XGBoost: parameters from the spec, and the model that predicts.

The distributed loop is in `training`; here is what one process knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import xgboost as xgb

from claydist.errors import BundleError, SpecError
from claydist.features import Encoded, FeaturePlan
from claydist.spec import XGBoostSpec

MODEL_FILE = "model.ubj"
BLOCK_ROWS = 65_536
OBJECTIVES = {
    "binary": "binary:logistic",
    "multiclass": "multi:softprob",
    "regression": "reg:squarederror",
    "ranking": "rank:ndcg",
}
# Exact sums over workers by XGBoost itself (AUC is not: it averages the workers' AUCs).
EVAL_METRICS = {"binary": "logloss", "multiclass": "mlogloss", "regression": "rmse", "ranking": "ndcg"}
TASK_OBJECTIVES = {
    "binary": ("binary:logistic",),
    "multiclass": ("multi:softprob",),
    "regression": (
        "reg:squarederror", "reg:squaredlogerror", "reg:pseudohubererror", "reg:absoluteerror", "reg:quantileerror",
        "reg:gamma", "reg:tweedie", "reg:logistic", "count:poisson",
    ),
    "ranking": ("rank:ndcg", "rank:map", "rank:pairwise"),
}  # fmt: skip
OBJECTIVE_METRICS = {
    "count:poisson": "poisson-nloglik", "reg:quantileerror": "quantile", "reg:absoluteerror": "mae",
    "reg:squaredlogerror": "rmsle", "reg:gamma": "gamma-nloglik", "reg:pseudohubererror": "mphe",
    "rank:map": "map",
}  # fmt: skip
# Their leaves are refreshed with a quantile of the residuals, which XGBoost 3.2 averages over workers
# (doc/parameter.rst): a model of another kind, so they train on one worker.
# With these alone a booster that goes on gives the same bytes as one that is loaded and goes on (XGBoost 3.2, tested).
DRAWS_NOTHING = frozenset((
    "tree_method", "objective", "eval_metric", "nthread", "num_class", "quantile_alpha", "max_depth", "eta",
    "learning_rate", "lambda", "reg_lambda", "alpha", "reg_alpha", "gamma", "min_split_loss", "min_child_weight",
    "max_delta_step", "max_bin", "max_leaves", "grow_policy", "scale_pos_weight", "base_score", "max_cat_to_onehot",
    "max_cat_threshold", "monotone_constraints", "interaction_constraints", "num_parallel_tree",
    "tweedie_variance_power", "huber_slope",
))  # fmt: skip
ONE_WORKER_OBJECTIVES = ("reg:absoluteerror", "reg:quantileerror")


def objective_of(spec: XGBoostSpec, task: str) -> str:
    """XGBoost's objective for this spec and task.

    Raises
    ------
    SpecError : when the objective and the task, or the quantiles, do not fit each other.
    """
    objective = spec.objective or ("reg:quantileerror" if spec.quantiles else OBJECTIVES[task])
    if objective not in TASK_OBJECTIVES[task]:
        raise SpecError(
            f"model.objective: {objective!r} does not fit the task {task!r}; "
            f"expected one of {', '.join(TASK_OBJECTIVES[task])}, or another model.task"
        )
    if (objective == "reg:quantileerror") != bool(spec.quantiles):
        raise SpecError("model.quantiles and objective reg:quantileerror go together; give both, or quantiles alone")
    return objective


def booster_params(spec: XGBoostSpec, task: str, plan: FeaturePlan, n_classes: int, n_threads: int) -> dict[str, Any]:
    """Parameters of the booster, without the seed, which changes by segment.

    Raises
    ------
    SpecError : for a constraint that names no feature, or an order of one that has none.
    """
    objective = objective_of(spec, task)
    params: dict[str, Any] = {
        "tree_method": "hist",
        "objective": objective,
        "eval_metric": OBJECTIVE_METRICS.get(objective, EVAL_METRICS[task]),
        "nthread": n_threads,
        **spec.params,
    }
    if task == "multiclass":
        params["num_class"] = n_classes
    if spec.quantiles:
        params["quantile_alpha"] = list(spec.quantiles)
    if spec.monotone:
        known = _known(plan, spec.monotone, "model.monotone")
        codes = sorted(f.name for f in plan.features if f.kind == "categorical" and spec.monotone.get(f.name))
        if codes:
            raise SpecError(f"model.monotone names {codes}, which are categories and have no order; leave them out")
        # As text with positions: names are only translated when a booster is made, not when it is loaded.
        params["monotone_constraints"] = str(tuple(spec.monotone.get(name, 0) for name in known))
    if spec.interactions:
        for group in spec.interactions:
            _known(plan, group, "model.interactions")
        groups = [[plan.names.index(name) for name in group] for group in spec.interactions]
        params["interaction_constraints"] = json.dumps(groups)
    return params


def is_random(params: Mapping[str, Any]) -> bool:
    """False when XGBoost surely draws no random number with these parameters."""
    return not set(params) <= DRAWS_NOTHING


def position_names(plan: FeaturePlan) -> list[str]:
    """What XGBoost calls the features: f0, f1, ...; it refuses names with `[`, `]` or `<`, which columns may have."""
    return [f"f{j}" for j in range(len(plan.features))]


def _known(plan: FeaturePlan, names: Any, key: str) -> Sequence[str]:
    if unknown := sorted(set(names) - set(plan.names)):
        raise SpecError(f"{key} names {unknown}, which are not features; features: {', '.join(plan.names)}")
    return plan.names


@dataclass(frozen=True)
class XGBoostModel:
    """A boosted model that predicts.

    Parameters
    ----------
    raw : the booster as XGBoost's UBJSON.
    task : binary, multiclass, regression or ranking.
    """

    raw: bytes
    task: str
    _booster: xgb.Booster = field(init=False, repr=False, compare=False)

    kind: ClassVar[str] = "xgboost"

    def __post_init__(self) -> None:
        booster = xgb.Booster()
        try:
            # XGBoost 3.2 reads beyond the end of an empty or truncated model, and may end the process.
            if not (self.raw.startswith(b"{") and self.raw.endswith(b"}")):
                raise xgb.core.XGBoostError("it is empty, or cut off")
            booster.load_model(bytearray(self.raw))
        except xgb.core.XGBoostError as e:
            raise BundleError(f"{MODEL_FILE} is not a model of XGBoost {xgb.__version__}: {str(e)[:200]}") from None
        booster.set_param({"nthread": 1})
        object.__setattr__(self, "_booster", booster)

    def set_threads(self, n_threads: int) -> None:
        """Predict with so many threads from now on; the answer does not depend on it."""
        self._booster.set_param({"nthread": n_threads})

    def predict(self, X: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
        """Predictions float32 of X (n_rows, n_features) float32.

        (n_rows,) for binary (probability), regression and ranking (score); (n_rows, n_outputs) for classes
        and quantiles.
        """
        if X.shape[0] == 0:
            shape = self._booster.inplace_predict(np.zeros((1, X.shape[1]), np.float32), validate_features=False).shape
            return np.empty((0, *shape[1:]), np.float32)
        margin = None if offset is None else offset.astype(np.float32)
        return self._booster.inplace_predict(X, base_margin=margin, validate_features=False)

    def predict_encoded(self, plan: FeaturePlan, encoded: Encoded, offset: np.ndarray | None) -> np.ndarray:
        """Predictions of an encoded table, as `predict`; by blocks, whose matrices stay in the processor's cache."""
        if encoded.n_rows <= BLOCK_ROWS:
            return self.predict(plan.tree_matrix(encoded), offset)
        blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, encoded.n_rows, BLOCK_ROWS)]
        offsets = [None if offset is None else offset[rows] for rows in blocks]
        parts = [self.predict(plan.tree_matrix(encoded[b]), o) for b, o in zip(blocks, offsets, strict=True)]
        return np.concatenate(parts)

    @property
    def n_rounds(self) -> int:
        """Number of boosting rounds in the model."""
        return self._booster.num_boosted_rounds()

    def importance(self, plan: FeaturePlan) -> list[dict[str, Any]]:
        """Share of the total gain by feature, largest first; features never used have 0."""
        gains = self._booster.get_score(importance_type="total_gain")
        total = sum(gains.values()) or 1.0
        pairs = zip(plan.names, position_names(plan), strict=True)
        rows = [{"feature": name, "gain": float(gains.get(position, 0.0)) / total} for name, position in pairs]
        return sorted(rows, key=lambda row: -row["gain"])

    def to_files(self) -> dict[str, bytes]:
        """The model as files of a bundle."""
        return {MODEL_FILE: self.raw}

    def to_json(self) -> dict[str, Any]:
        """What is not in the files."""
        return {"kind": self.kind, "task": self.task}

    @classmethod
    def from_files(cls, tree: Mapping[str, Any], files: Mapping[str, bytes]) -> XGBoostModel:
        """The model that `to_json` and `to_files` gave."""
        return cls(files[MODEL_FILE], tree["task"])
