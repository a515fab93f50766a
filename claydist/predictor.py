"""Predictor: schema, features and model as one thing that predicts. The only prediction path of claydist.

Training's evaluation, batch scoring and serving all end in `Predictor.predict_arrays`, so that the same row gives the
same bits in every door. It needs no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from claydist.arrays import native_values
from claydist.errors import BundleError, DataError
from claydist.features import FeaturePlan
from claydist.models import MODELS, Model
from claydist.profile import infinite
from claydist.schema import Schema

FEATURES_FILE = "features.json"


@dataclass(frozen=True)
class Target:
    """What is predicted, and how an answer is written.

    Attributes
    ----------
    task : binary, multiclass, regression or ranking.
    column : the label's column.
    classes : the label's values in order; for binary (negative, positive). Empty for numbers.
    above : the threshold of a label made binary by it.
    quantiles : levels of a quantile model.
    """

    task: str
    column: str
    classes: tuple[Any, ...] = ()
    above: float | None = None
    quantiles: tuple[float, ...] = ()

    @property
    def output_columns(self) -> list[str]:
        """Names of the columns of a prediction (DESIGN section 6)."""
        if self.task == "binary":
            return ["prediction", "probability"]
        if self.task == "multiclass":
            return ["prediction", *(f"probability_{value}" for value in self.classes)]
        if self.task == "ranking":
            return ["score"]
        return [f"prediction_{q:g}" for q in self.quantiles] or ["prediction"]

    def score(self, values: np.ndarray) -> np.ndarray:
        """One number a row (n_rows,), by which distributions are watched.

        The probability, number or score itself; of classes the largest probability, of quantiles the middle one.
        """
        if values.ndim == 1:
            return values
        return values.max(axis=1) if self.task == "multiclass" else values[:, values.shape[1] // 2]

    def middle(self, values: np.ndarray) -> np.ndarray:
        """Of a model of quantiles (n_rows, n_quantiles) the output (n_rows,) that is nearest to the median."""
        return values[:, int(np.argmin(np.abs(np.asarray(self.quantiles) - 0.5)))]

    def columns(self, values: np.ndarray) -> dict[str, pa.Array]:
        """The columns of a prediction from the model's values, in the order of `output_columns`."""
        if self.task == "binary":
            labels = pa.array(list(self.classes)).take(pa.array((values >= 0.5).astype(np.int8)))
            return {"prediction": labels, "probability": pa.array(values)}
        if self.task == "multiclass":
            labels = pa.array(list(self.classes)).take(pa.array(values.argmax(axis=1)))
            shares = (pa.array(np.ascontiguousarray(values[:, j])) for j in range(values.shape[1]))
            return dict(zip(self.output_columns, [labels, *shares], strict=True))
        table = values[:, None] if values.ndim == 1 else values
        arrays = (pa.array(np.ascontiguousarray(table[:, j])) for j in range(table.shape[1]))
        return dict(zip(self.output_columns, arrays, strict=True))


@dataclass(frozen=True)
class Prediction:
    """A model's answer to a table.

    Attributes
    ----------
    values : (n_rows,) probability of the positive class, number or score; or (n_rows, n_outputs) probabilities of the
        classes or quantiles. float32 of boosted, float64 of linear models.
    unseen : number of categories not seen in training, by feature.
    """

    values: np.ndarray
    unseen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictor:
    """What a bundle holds: `predict(table)` takes raw columns and gives the columns of DESIGN section 6.

    Parameters
    ----------
    plan : the features, with the schema a table must fit (an offset column included).
    model : one of `models.MODELS`.
    target : what is predicted.
    offset : column added to the margin; None where there is none.
    """

    plan: FeaturePlan
    model: Model
    target: Target
    offset: str | None = None

    @property
    def schema(self) -> Schema:
        """The columns that a table must have, by name; others are ignored."""
        return self.plan.schema

    @property
    def task(self) -> str:
        """One of binary, multiclass, regression, ranking."""
        return self.target.task

    def predict(self, table: pa.Table | pd.DataFrame, where: str = "the table") -> pa.Table:
        """Predictions, one row for each row of the table, in its order.

        Parameters
        ----------
        table : has all columns of `schema` under their names, in any order.
        where : what the table is called in messages.

        Raises
        ------
        DataError : when a column is absent or of another type, a value is infinite, or a category unseen under
            `unseen: error`.
        """
        return pa.table(self.target.columns(self.predict_arrays(as_table(table), where).values))

    def predict_arrays(self, table: pa.Table, where: str = "the table") -> Prediction:
        """The model's values for a table, and what was unseen in it; errors as `predict`."""
        self.schema.check(table.schema, where)
        encoded = self.plan.encode(table)
        offset = None if self.offset is None else offset_values(table, self.offset, where)
        return Prediction(self.model.predict_encoded(self.plan, encoded, offset), encoded.unseen)

    def bad_rows(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Rows of a table of the right schema that `predict` would refuse: {reason: mask (n_rows,) bool}."""
        bad = self.plan.bad_rows(table)
        if self.offset is not None and (mask := _not_finite(_numbers(table, self.offset))).any():
            bad[f"null or infinite offset in {self.offset!r}"] = mask
        return bad

    def to_files(self) -> dict[str, bytes]:
        """The files of a bundle that hold this predictor."""
        target = {
            "task": self.target.task, "column": self.target.column, "classes": list(self.target.classes),
            "above": self.target.above, "quantiles": list(self.target.quantiles),
        }  # fmt: skip
        tree = {**self.plan.to_json(), "model": self.model.to_json(), "target": target, "offset": self.offset}
        text = json.dumps(tree, ensure_ascii=False, indent=1)
        return {FEATURES_FILE: text.encode(), **self.model.to_files()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Predictor:
        """The predictor that `to_files` gave; nothing in the files is executed.

        Raises
        ------
        BundleError : when a file is absent or does not say what it should.
        """
        try:
            tree = json.loads(files[FEATURES_FILE])
            target = tree["target"]
            goal = Target(
                target["task"], target["column"], tuple(target["classes"]), target["above"], tuple(target["quantiles"])
            )
            model = MODELS[tree["model"]["kind"]].from_files(tree["model"], files)
            return cls(FeaturePlan.from_json(tree), model, goal, tree["offset"])
        except (KeyError, TypeError, ValueError) as e:
            raise BundleError(f"{FEATURES_FILE} or a file it needs is damaged ({type(e).__name__}: {e})") from None


def offset_values(table: pa.Table, name: str, where: str) -> np.ndarray:
    """Offsets (n_rows,) float64 of a table.

    Raises
    ------
    DataError : for a null or an infinite value, with their number.
    """
    values = _numbers(table, name)
    if n_bad := int(np.count_nonzero(_not_finite(values))):
        raise DataError(
            f"offset column {name!r} has {n_bad} values in {where} that are null or infinite; expected finite numbers: "
            f"fill them, or leave the rows out"
        )
    return values


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return native_values(table.column(name)).astype(np.float64)


def _not_finite(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) | infinite(values)


def as_table(table: pa.Table | pd.DataFrame) -> pa.Table:
    """An Arrow table of the same columns; the index of a pandas frame is not a column."""
    if isinstance(table, pa.Table):
        return table
    return pa.Table.from_pandas(table, preserve_index=False)
