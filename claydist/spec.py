"""The YAML specs as frozen models: unknown keys fail, all problems at once, each with its path.

`specfile.load_spec(TrainSpec, source, overrides)` is the only way in; the classes hold no behaviour beyond checks. A
key described here is a promise to users: the reference in README is made from these descriptions.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
METRICS = (
    "auc", "average_precision", "logloss", "brier", "accuracy", "precision", "recall", "f1",
    "rmse", "mae", "r2", "mape", "pinball", "poisson_deviance", "ndcg", "map",
)  # fmt: skip

ColumnType = Literal["integer", "float", "string", "boolean", "timestamp", "category"]
CalendarPart = Literal["hour", "dayofweek", "day", "month"]
Task = Literal["binary", "multiclass", "regression", "ranking"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_min_length=1)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise ValueError(
            f"expected a name of a-z 0-9 . _ - that starts with a letter or digit, has no '..' "
            f"and at most 63 characters, found {name!r}"
        )
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class LabelSpec(_Frozen):
    """The column to predict."""

    column: str = Field(description="name of the label column")
    above: float | None = Field(None, description="makes the task binary: true where the column is above this number")
    positive: str | int | float | bool | None = Field(
        None, description="binary: the label whose probability is reported; by default the larger one"
    )


class DataSpec(_Frozen):
    """The training table, and what its columns are."""

    path: tuple[str, ...] = Field(min_length=1, description="URL, or list of URLs, of Parquet: file, directory, glob")
    format: Literal["parquet"] = Field("parquet", description="format of the table")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="options for fsspec; keep credentials in the environment"
    )
    label: LabelSpec = Field(description="the label's column, or {column, above, positive}")
    weight: str | None = Field(None, description="column of sample weights, not negative")
    offset: str | None = Field(None, description="column added to the margin (base margin)")
    group: str | None = Field(None, description="column of the ranking query; makes the task ranking")
    features: tuple[str, ...] | None = Field(None, description="exactly these columns are features")
    drop: tuple[str, ...] = Field((), description="columns that are not features")
    key: tuple[str, ...] = Field((), description="columns that identify a row; features unless dropped")
    types: dict[str, ColumnType] = Field(default_factory=dict, description="declared types of columns and Hive keys")
    calendar: dict[str, tuple[CalendarPart, ...]] = Field(
        default_factory=dict, description="parts of a timestamp that become features"
    )
    max_categories: int = Field(1000, ge=1, description="categories kept of one column; the rest is `other`")
    unseen: Literal["missing", "other", "error"] = Field(
        "missing", description="what a category not seen in training becomes"
    )
    where: str | None = Field(None, description="expression; rows where it is not true are left out")

    _paths = field_validator("path", mode="before", json_schema_input_type=str | tuple[str, ...])(_one_or_many)

    @field_validator("label", mode="before", json_schema_input_type=str | LabelSpec)
    @classmethod
    def _label_by_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _roles_are_distinct(self) -> DataSpec:
        roles = {"label": self.label.column, "weight": self.weight, "offset": self.offset, "group": self.group}
        taken: dict[str, str] = {}
        for role, column in roles.items():
            if column is None:
                continue
            if column in taken:
                raise ValueError(f"column {column!r} is both {taken[column]} and {role}; give each its own column")
            taken[column] = role
        if self.features is not None:
            if both := sorted(set(self.features) & set(taken)):
                raise ValueError(f"features names {both}, which have another role")
            if self.drop:
                raise ValueError("features and drop exclude each other; keep one")
            if len(set(self.features)) < len(self.features):
                raise ValueError("features names a column twice")
        return self


class SplitPart(_Frozen):
    """One held-out part: exactly one of its keys."""

    fraction: float | None = Field(None, gt=0, lt=1, description="this share of rows, by a seeded hash of the row")
    by: tuple[str, ...] | None = Field(
        None, min_length=1, description="with the default share of 0.2 (or `fraction`): no group on both sides"
    )
    where: str | None = Field(None, description="the rows where this expression is true")
    path: tuple[str, ...] | None = Field(None, min_length=1, description="a separate table")

    _paths = field_validator("path", "by", mode="before", json_schema_input_type=str | tuple[str, ...] | None)(
        _one_or_many
    )

    @model_validator(mode="after")
    def _one_way(self) -> SplitPart:
        ways = [way for way in ("by", "where", "path") if getattr(self, way) is not None]
        if self.fraction is not None and ways != ["by"]:
            ways.append("fraction")
        if len(ways) != 1:
            found = sorted(ways) or "none"
            raise ValueError(f"expected one of fraction, by (with or without fraction), where, path; found {found}")
        return self


class SplitSpec(_Frozen):
    """What is held out for early stopping (`valid`) and for the final judgement (`test`)."""

    valid: SplitPart | None = Field(None, description="rows for early stopping")
    test: SplitPart | None = Field(None, description="rows that nothing sees before the end")


class XGBoostSpec(_Frozen):
    """Gradient boosting with histograms."""

    kind: Literal["xgboost"] = Field(description="gradient boosting")
    task: Task | None = Field(None, description="inferred from the label where not given")
    rounds: int = Field(100, ge=1, description="boosting rounds at the most")
    early_stopping: int | None = Field(None, ge=1, description="stop after this many rounds without gain on valid")
    params: dict[str, Any] = Field(default_factory=dict, description="anything else of XGBoost's, passed through")
    objective: str | None = Field(None, description="in XGBoost's words; by task where not given")
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (), description="predict these quantiles (objective reg:quantileerror)"
    )
    monotone: dict[str, Literal[-1, 0, 1]] = Field(default_factory=dict, description="{column: 1 or -1}")
    interactions: tuple[tuple[str, ...], ...] = Field((), description="groups of columns that may interact")
    binning: Literal["exact", "sample"] = Field("exact", description="quantile cuts from all rows, or from a sample")

    @model_validator(mode="after")
    def _reserved_params(self) -> XGBoostSpec:
        reserved = {
            "nthread": "train.cpus_per_worker", "n_jobs": "train.cpus_per_worker", "seed": "seed",
            "random_state": "seed", "device": "train.device", "objective": "model.objective",
            "monotone_constraints": "model.monotone", "interaction_constraints": "model.interactions",
            "quantile_alpha": "model.quantiles", "n_estimators": "model.rounds", "num_boost_round": "model.rounds",
            "num_class": "the label's values", "early_stopping_rounds": "model.early_stopping",
        }  # fmt: skip
        if found := [f"params.{key} is set by {reserved[key]}" for key in sorted(self.params) if key in reserved]:
            raise ValueError("; ".join(found))
        if self.params.get("booster", "gbtree") not in ("gbtree", "dart"):
            raise ValueError("params.booster: expected gbtree or dart; for a linear model use kind: linear")
        if self.params.get("booster") == "dart" and self.early_stopping is not None:
            raise ValueError(
                "early_stopping with params.booster dart: each round changes the trees before it, so the best round "
                "cannot be had back; choose rounds, or leave dart out"
            )
        if self.params.get("tree_method", "hist") != "hist":
            raise ValueError("params.tree_method: claydist trains with hist; the others are not distributed exactly")
        return self


class LinearSpec(_Frozen):
    """Generalised linear models: squared, logistic, multinomial, Poisson."""

    kind: Literal["linear"] = Field(description="a generalised linear model")
    task: Task | None = Field(None, description="inferred from the label where not given")
    loss: Literal["squared", "poisson", "logistic"] | None = Field(None, description="by task where not given")
    l1: float = Field(0.0, ge=0, description="weight of the absolute values of the coefficients")
    l2: float = Field(1.0, ge=0, description="weight of the squares of the coefficients; 1/C of LogisticRegression")
    tolerance: float = Field(1e-8, gt=0, description="largest absolute gradient of the mean objective at the end")
    max_iter: int = Field(200, ge=1, description="iterations at the most")
    solver: Literal["auto", "newton", "lbfgs", "proximal"] = Field(
        "auto", description="auto: proximal with l1, newton for few coefficients, lbfgs for many"
    )
    missing_indicator: bool = Field(False, description="one more column for each numeric feature with nulls")

    @model_validator(mode="after")
    def _solver_fits(self) -> LinearSpec:
        if self.l1 > 0 and self.solver in ("newton", "lbfgs"):
            raise ValueError(f"solver {self.solver!r} cannot have l1 = {self.l1}; use proximal or auto")
        return self


ModelSpec = Annotated[XGBoostSpec | LinearSpec, Field(discriminator="kind")]


class TrainOptions(_Frozen):
    """How training uses the cluster; no key here changes what is learnt, but for workers and threads."""

    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="auto: one a node")
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="threads of one worker")
    memory_gb: float | None = Field(None, gt=0, description="memory asked of Ray for one worker")
    max_failures: int = Field(3, ge=0, description="restarts after a failed worker")
    timeout_s: float = Field(600, gt=0, description="a worker silent for so long is an error")
    wait_s: float = Field(600, ge=0, description="how long to wait for a busy cluster")
    checkpoint_s: float = Field(60, ge=0, description="least time between two checkpoints")
    device: Literal["cpu"] = Field("cpu", description="where to compute")


class Goal(_Frozen):
    """A bound on a metric, judged once at the end."""

    metric: str = Field(description=f"one of {', '.join(METRICS)}; ndcg and map with @k")
    at_least: float | None = Field(None, description="met when the metric is not below this")
    at_most: float | None = Field(None, description="met when the metric is not above this")
    slice: str | None = Field(None, description="expression: judged on these rows only")

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        base, _, depth = metric.partition("@")
        if base not in METRICS or (depth and (base not in ("ndcg", "map") or not depth.isdigit() or int(depth) < 1)):
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(METRICS)}"
            raise ValueError(f"unknown metric {metric!r}{hint}")
        return metric

    @model_validator(mode="after")
    def _one_bound(self) -> Goal:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("expected exactly one of at_least, at_most")
        return self


class TrainSpec(_Frozen):
    """Everything that training needs; the same spec and data give the same model."""

    name: Name = Field(description="the model's name in the registry")
    data: DataSpec = Field(description="the table and its columns")
    split: SplitSpec = Field(default_factory=SplitSpec, description="what is held out")
    model: ModelSpec = Field(description="the model and its settings, by kind")
    train: TrainOptions = Field(default_factory=TrainOptions, description="how training uses the cluster")
    goals: tuple[Goal, ...] = Field((), description="bounds that decide on promotion")
    slices: tuple[str, ...] = Field((), description="expressions; metrics are reported for each too")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of splits and of sampling")
    registry: str | None = Field(None, description="URL of the registry; ./registry where nothing says otherwise")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        problems = []
        if isinstance(self.model, XGBoostSpec) and self.model.early_stopping and self.split.valid is None:
            problems.append("model.early_stopping needs rows to watch: give split.valid, e.g. {fraction: 0.1}")
        fractions = [p.fraction for p in (self.split.valid, self.split.test) if p and p.fraction and not p.by]
        if sum(fractions) >= 1:
            problems.append(f"split: fractions {fractions} leave no training rows; their sum must be below 1")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Gate(_Frozen):
    """Limits of one publishing check; unset means off."""

    warn: float | None = Field(None, ge=0, description="above this: said in the manifest, published all the same")
    fail: float | None = Field(None, ge=0, description="above this: nothing is published, exit 5")


class GatesSpec(_Frozen):
    """Checks between scoring and publishing."""

    null_fraction: Gate = Field(Gate(fail=0.0), description="share of rows whose prediction is null or NaN")
    constant: Literal["off", "warn", "fail"] = Field("fail", description="all scores of 100 or more rows are equal")
    psi_training: Gate = Field(Gate(warn=0.25), description="PSI of scores against the training profile")
    psi_last: Gate = Field(Gate(warn=0.25), description="PSI of scores against the last published date")
    unseen_fraction: Gate = Field(Gate(warn=0.2), description="share of unseen categories in the worst feature")


class ScoreSpec(_Frozen):
    """Everything that a batch scoring run needs."""

    model: str = Field(description="reference of the model: name, name@alias, name:version, or a bundle's URL")
    registry: str | None = Field(None, description="URL of the registry; ./registry where nothing says otherwise")
    input: tuple[str, ...] = Field(min_length=1, description="URL, or list of URLs, of Parquet to score")
    output: str = Field(description="URL of the directory that dates are published in")
    date: str | dict[Literal["year", "month", "day"], str] | None = Field(
        None, description="column or Hive key of the date, or {year:, month:, day:}; without it one run is all"
    )
    key: tuple[str, ...] = Field((), description="columns kept beside the prediction")
    where: str | None = Field(None, description="expression; rows where it is not true are not scored")
    format: Literal["parquet"] = Field("parquet", description="format of the output")
    gates: GatesSpec = Field(default_factory=GatesSpec, description="checks before publishing")
    max_quarantined: float = Field(
        0, ge=0, description="rows that may break the contract: a number, or a fraction below 1"
    )
    require: str | None = Field(None, description="a date waits for this name, e.g. _SUCCESS, in its input folder")
    max_cpus: int | None = Field(None, ge=1, description="CPUs used at the most")
    types: dict[str, ColumnType] = Field(default_factory=dict, description="declared types of Hive keys")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, repr=False, description="options for fsspec; keep credentials in the environment"
    )

    _paths = field_validator("input", mode="before", json_schema_input_type=str | tuple[str, ...])(_one_or_many)

    @model_validator(mode="after")
    def _fits_together(self) -> ScoreSpec:
        problems = []
        if isinstance(self.date, dict) and (
            set(self.date) != {"year", "month", "day"} or len(set(self.date.values())) < 3
        ):
            problems.append(f"date: expected year, month and day, each a column of its own, found {dict(self.date)}")
        if isinstance(self.date, dict) and "dt" in self.key:
            problems.append("key names 'dt', which is what the date is published under; rename it in the input")
        if twice := sorted({name for name in self.key if self.key.count(name) > 1}):
            problems.append(f"key names {twice} more than once")
        if self.max_quarantined > 1 and self.max_quarantined != int(self.max_quarantined):
            problems.append(
                f"max_quarantined: expected a whole number of rows, or a fraction below 1, found {self.max_quarantined}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
