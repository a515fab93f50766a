"""What is predicted: the task by the label's values, labels as numbers, the constant model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from claydist.arrays import native_values
from claydist.errors import DataError, SpecError
from claydist.predictor import Target
from claydist.profile import MAX_LABEL_VALUES, ColumnSums
from claydist.schema import NUMERIC, Column, type_of
from claydist.spec import DataSpec, TrainSpec, XGBoostSpec

# XGBoost's labels are float32: what is nearer to an open end may be rounded to it.
_ABOVE_0, _ABOVE_MINUS_1 = (float(np.nextafter(np.float32(end), np.float32(1))) for end in (0, -1))
BOUNDS = {
    "count:poisson": (0.0, np.inf, "labels of 0 or more"),
    "poisson": (0.0, np.inf, "labels of 0 or more"),
    "reg:tweedie": (0.0, np.inf, "labels of 0 or more"),
    "reg:gamma": (_ABOVE_0, np.inf, "labels above 0"),
    "reg:squaredlogerror": (_ABOVE_MINUS_1, np.inf, "labels above -1"),
    "reg:logistic": (0.0, 1.0, "labels from 0 to 1"),
    "relevance": (0.0, 31.0, "grades from 0 to 31"),
}
"""By XGBoost's objective, or the loss of a linear model: the least and the greatest label it takes, and in words."""

_CLASSES = ("integer", "float", "boolean", "string")


def decide_target(spec: TrainSpec, label: Column, sums: ColumnSums) -> Target:
    """The task and the label's classes (DESIGN section 4).

    Parameters
    ----------
    sums : of the label over all rows, by its own values.

    Raises
    ------
    SpecError : when the spec's task, or `data.label.positive`, does not fit the label.
    DataError : when the label has one value only, or more classes than can be told apart.
    """
    data = spec.data
    values: Mapping[Any, int] = sums.counts or {}
    if not values:
        raise DataError(f"label column {label.name!r} has no value in {sums.n_rows} rows; nothing to learn")
    task = _task(spec, label, values)
    _require_positive_used(data, task)
    quantiles = spec.model.quantiles if isinstance(spec.model, XGBoostSpec) else ()
    if task in ("regression", "ranking"):
        _require_numbers(label, task)
        if len(values) < 2 and task == "regression":
            raise DataError(f"label column {label.name!r} is {next(iter(values))!r} in every row; nothing to learn")
        return Target(task, label.name, quantiles=quantiles)
    if data.label.above is not None:
        _require_numbers(label, "a label with `above`")
        _require_both_sides(data, values)
        return Target("binary", label.name, (False, True), above=data.label.above)
    if label.type not in _CLASSES:
        raise DataError(f"a class is text, a boolean or a number; label column {label.name!r} is {label.describe()}")
    if len(values) > MAX_LABEL_VALUES:
        raise DataError(f"label column {label.name!r} has more than {MAX_LABEL_VALUES} values; is it a regression?")
    classes = sorted(values)
    if len(classes) < 2:
        raise DataError(
            f"label column {label.name!r} is {classes[0]!r} in every row; a model needs two values at least"
        )
    if task == "binary":
        classes = _positive_last(data, classes)
    return Target(task, label.name, tuple(classes))


def label_values(target: Target, column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Labels (n_rows,) float64 as the models take them: 0 or 1, the index of the class, or the number.

    Raises
    ------
    DataError : for a column of another type, a null, or a class that training has not seen.
    """
    kind = type_of(column.type)
    takes = NUMERIC if not target.classes or target.above is not None else _readable(target.classes)
    if kind not in takes:
        raise DataError(
            f"label column {target.column!r} is {column.type} in {where}, expected {' or '.join(takes)}; cast it"
        )
    if n_null := _count_nulls(column):
        raise DataError(f"label column {target.column!r} has {n_null} nulls in {where}; leave the rows out")
    if target.above is not None:
        return (native_values(column).astype(np.float64) > target.above).astype(np.float64)
    if not target.classes:
        return native_values(column).astype(np.float64)
    # Numbers are compared as numbers, whatever their width; integers beyond 2^53 only as integers.
    is_exact = kind == "string" or (kind == "integer" and all(type(value) is int for value in target.classes))
    values = _plain(column) if is_exact else pa.array(native_values(column), pa.float64())
    classes = pa.array(list(target.classes) if is_exact else [float(value) for value in target.classes])
    values = values.cast(classes.type)
    if len(classes) == 2 and kind != "string":
        # A binary label of numbers is read in every pass over the rows, and looking up takes 20 times as long.
        numbers = values.to_numpy(zero_copy_only=False)
        is_last = numbers == classes[1].as_py()
        if (is_last | (numbers == classes[0].as_py())).all():
            return is_last.astype(np.float64)
    codes = pc.index_in(values, value_set=classes)
    if codes.null_count:
        unseen = codes.is_null()
        first = column.filter(pa.chunked_array([unseen]))[0].as_py()
        raise DataError(
            f"label column {target.column!r} has {codes.null_count} values in {where} that training has not seen, "
            f"the first is {first!r}; expected one of {list(target.classes)}"
        )
    return codes.to_numpy(zero_copy_only=False).astype(np.float64)


def _readable(classes: Sequence[Any]) -> tuple[str, ...]:
    return ("string",) if isinstance(classes[0], str) else NUMERIC


def _count_nulls(column: pa.ChunkedArray) -> int:
    """Nulls, and NaN, which is how pandas writes them."""
    return int(pc.sum(pc.is_null(column, nan_is_null=True)).as_py() or 0)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array without a dictionary."""
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    return pa.concat_arrays(plain.chunks) if plain.num_chunks else pa.array([], plain.type)


def check_bounds(objective: str | None, target: Target, sums: ColumnSums) -> None:
    """Pass when the objective takes all labels; else it would only be found out on the workers.

    Raises
    ------
    DataError : with the column, the objective, what it takes, and the label that is furthest out.
    """
    low, high, words = BOUNDS.get(objective or "", (-np.inf, np.inf, ""))
    outside = [value for value in (sums.minimum, sums.maximum) if value is not None and not low <= value <= high]
    if outside:
        raise DataError(
            f"label column {target.column!r} has the value {outside[0]!r}, and {objective} takes {words}; "
            f"change the label or the objective, or leave the rows out with data.where"
        )


def prior(target: Target, numbers: ColumnSums, weights: Mapping[Any, float]) -> list[float]:
    """The constant model that `metrics.constant_outcome` takes, from the labels of the training rows.

    Parameters
    ----------
    numbers : weighted sums of a numeric label; of being above, where `above` makes it binary.
    weights : weight of the rows by label value, where there are few values.
    """
    if target.task == "ranking":
        return []
    if not target.classes:
        sketch = numbers.sketch
        found = [sketch.quantile(q) for q in target.quantiles] if sketch else []
        return [numbers.moments.mean, *(q for q in found if q is not None)]
    if target.above is not None:
        return [numbers.moments.mean]
    shares = [weights.get(value, 0.0) for value in target.classes]
    total = sum(shares) or 1.0
    return [share / total for share in shares][-1 if target.task == "binary" else 0 :]


def _task(spec: TrainSpec, label: Column, values: Mapping[Any, int]) -> str:
    data, declared = spec.data, spec.model.task
    if data.group is not None:
        if declared not in (None, "ranking"):
            raise SpecError(f"model.task is {declared!r}, and data.group makes it a ranking; drop one")
        return "ranking"
    if declared == "ranking":
        raise SpecError("model.task is 'ranking'; name the column of the query in data.group")
    if data.label.above is not None:
        if declared not in (None, "binary"):
            raise SpecError(f"data.label.above makes the task binary, and model.task is {declared!r}; drop one")
        return "binary"
    if declared == "binary" and len(values) != 2:
        raise DataError(
            f"model.task is 'binary' and label column {label.name!r} has {len(values)} values, expected 2; "
            f"use data.label.above, or task multiclass"
        )
    return declared or _task_of_values(label, values)


def _task_of_values(label: Column, values: Mapping[Any, int]) -> str:
    if label.type in ("string", "boolean"):
        return "binary" if len(values) == 2 else "multiclass"
    return "binary" if label.type == "integer" and set(values) == {0, 1} else "regression"


def _positive_last(data: DataSpec, classes: list[Any]) -> list[Any]:
    positive = data.label.positive
    if positive is None:
        return classes
    if positive not in classes:
        raise DataError(f"data.label.positive is {positive!r}; the label's values are {classes}")
    # The data's own value: True is 1 to Python, and not to a column.
    return [v for v in classes if v != positive] + [v for v in classes if v == positive]


def _require_positive_used(data: DataSpec, task: str) -> None:
    positive = data.label.positive
    if positive is None:
        return
    if data.label.above is not None:
        raise SpecError(f"data.label.positive is {positive!r}, and data.label.above decides what is true; drop one")
    if task != "binary":
        raise SpecError(
            f"data.label.positive is {positive!r}, and the task is {task!r} by the label's values; "
            f"drop it, or set model.task to binary"
        )


def _require_numbers(label: Column, what: str) -> None:
    if label.type not in ("integer", "float", "decimal"):
        raise DataError(f"{what} needs numbers; label column {label.name!r} is {label.describe()}")


def _require_both_sides(data: DataSpec, values: Mapping[Any, int]) -> None:
    above = data.label.above
    if len(values) <= MAX_LABEL_VALUES and len({value > above for value in values}) < 2:
        raise DataError(f"label column {data.label.column!r} is on one side of above: {above:g} in every row")
