from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost as xgb

from claydist.errors import DataError, SpecError
from claydist.labels import BOUNDS, check_bounds, decide_target, label_values, prior
from claydist.models.boosted import TASK_OBJECTIVES
from claydist.predictor import Target
from claydist.profile import ColumnSums, label_sums, numeric_sums
from claydist.schema import column_of
from claydist.spec import TrainSpec
from claydist.specfile import load_spec


def spec(label: Any = "y", model: dict[str, Any] | None = None, **data: Any) -> TrainSpec:
    return load_spec(TrainSpec, {
        "name": "m", "data": {"path": "x", "label": label, **data}, "model": {"kind": "xgboost", **(model or {})},
    })  # fmt: skip


def decide(values: pa.Array, checked: TrainSpec | None = None) -> Target:
    sums = label_sums(pa.chunked_array([values]))
    return decide_target(checked or spec(), column_of(pa.field("y", values.type), "x"), sums)


@pytest.mark.parametrize(("values", "task", "classes"), [
    (pa.array(["no", "yes", "no"]), "binary", ("no", "yes")),
    (pa.array(["no", "yes"]).dictionary_encode(), "binary", ("no", "yes")),
    (pa.array(["c", "a", "b"]), "multiclass", ("a", "b", "c")),
    (pa.array([True, False]), "binary", (False, True)),
    (pa.array([0, 1, 1]), "binary", (0, 1)), (pa.array([0, 1], pa.uint8()), "binary", (0, 1)),
    (pa.array([1, 2]), "regression", ()), (pa.array([0, 1, 2]), "regression", ()),
    (pa.array([-1, 1]), "regression", ()),
    (pa.array([0.0, 1.0]), "regression", ()), (pa.array([0.5, 1.5]), "regression", ()),
    (pa.array([Decimal("0.5"), Decimal("1.0")]), "regression", ()),
], ids=lambda value: str(value)[:40].replace("\n", ""))  # fmt: skip
def test_task_by_the_labels_values(values: pa.Array, task: str, classes: tuple[Any, ...]) -> None:
    assert decide(values) == Target(task, "y", classes)


def test_above_makes_numbers_binary() -> None:
    for values in (pa.array([3, 20, 15]), pa.array([3.0, 20.5]), pa.array([0, 1, 16])):
        target = decide(values, spec({"column": "y", "above": 15}))
        assert target == Target("binary", "y", (False, True), above=15.0)
    values = pa.chunked_array([[15, 16], [14]])
    np.testing.assert_array_equal(label_values(target, values, "x"), [0, 1, 0])


def test_a_group_makes_it_ranking() -> None:
    assert decide(pa.array([0, 1, 2]), spec(group="q")) == Target("ranking", "y")
    assert decide(pa.array([0, 1]), spec(group="q", model={"task": "ranking"})).task == "ranking"


@pytest.mark.parametrize(("task", "values", "classes"), [
    ("multiclass", [3, 1, 2], (1, 2, 3)), ("multiclass", [0, 1], (0, 1)), ("binary", [2, 5], (2, 5)),
    ("regression", [0, 1], ()), ("multiclass", [0.5, 1.5], (0.5, 1.5)),
])  # fmt: skip
def test_the_specs_task_is_taken(task: str, values: list[Any], classes: tuple[Any, ...]) -> None:
    assert decide(pa.array(values), spec(model={"task": task})) == Target(task, "y", classes)


def test_positive_is_last() -> None:
    assert decide(pa.array(["a", "b"]), spec({"column": "y", "positive": "a"})).classes == ("b", "a")
    assert decide(pa.array([0, 1]), spec({"column": "y", "positive": 0})).classes == (1, 0)
    assert decide(pa.array([True, False]), spec({"column": "y", "positive": False})).classes == (True, False)
    with pytest.raises(DataError, match=r"data\.label\.positive is 'c'; the label's values are \['a', 'b'\]"):
        decide(pa.array(["a", "b"]), spec({"column": "y", "positive": "c"}))


@pytest.mark.parametrize(("values", "positive", "classes"), [
    ([0, 1], True, (0, 1)), ([0, 1], False, (1, 0)), ([0, 1], 0.0, (1, 0)), ([False, True], 0, (True, False)),
])  # fmt: skip
def test_positive_of_another_type_is_the_datas_own_value(
    values: list[Any], positive: Any, classes: tuple[Any, ...]
) -> None:
    target = decide(pa.array(values), spec({"column": "y", "positive": positive}))
    assert [(type(c), c) for c in target.classes] == [(type(c), c) for c in classes]
    assert label_values(target, pa.chunked_array([classes]), "x").tolist() == [0, 1]


@pytest.mark.parametrize(("values", "label", "model", "text"), [
    ([1, 9], {"above": 5, "positive": True}, {}, "positive is True, and data.label.above decides"),
    (["a", "b", "c"], {"positive": "a"}, {}, "positive is 'a', and the task is 'multiclass'"),
    ([0, 1], {"positive": 1}, {"task": "multiclass"}, "the task is 'multiclass'"),
    ([0.0, 1.0], {"positive": 1}, {}, "the task is 'regression' .* set model.task to binary"),
])  # fmt: skip
def test_positive_where_it_would_be_ignored_is_an_error(
    values: list[Any], label: dict[str, Any], model: dict[str, Any], text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        decide(pa.array(values), spec({"column": "y", **label}, model))


def test_quantiles_go_with_the_target() -> None:
    target = decide(pa.array([0.5, 2]), spec(model={"quantiles": [0.1, 0.9]}))
    assert (target.task, target.quantiles) == ("regression", (0.1, 0.9))


@pytest.mark.parametrize(("values", "checked", "error", "text"), [
    (["a", "a"], spec(), DataError, "'a' in every row; a model needs two values"),
    ([True], spec(), DataError, "True in every row"),
    ([2.5, 2.5], spec(), DataError, "2.5 in every row; nothing to learn"),
    (["a", "b"], spec(model={"task": "regression"}), DataError, "regression needs numbers; label column 'y' is string"),
    (["a", "b"], spec(group="q"), DataError, "ranking needs numbers"),
    (["a", "b"], spec({"column": "y", "above": 1}), DataError, "`above` needs numbers"),
    ([1, 2], spec({"column": "y", "above": 5}), DataError, "on one side of above: 5 in every row"),
    ([1, 2, 3], spec(model={"task": "binary"}), DataError, "has 3 values, expected 2"),
    ([1, 2], spec(group="q", model={"task": "binary"}), SpecError, "data.group makes it a ranking"),
    ([1, 2], spec(model={"task": "ranking"}), SpecError, "name the column of the query in data.group"),
    ([1, 2], spec({"column": "y", "above": 1}, {"task": "regression"}), SpecError, "above makes the task binary"),
    ([Decimal(1), Decimal(2)], spec(model={"task": "multiclass"}), DataError, "a class is text, a boolean or a number"),
    (list(map(str, range(1500))), spec(), DataError, "more than 1000 values"),
])  # fmt: skip
def test_labels_that_cannot_be_learnt(values: list[Any], checked: TrainSpec, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text.replace("(", r"\(")):
        decide(pa.array(values), checked)


def test_a_label_without_any_value_is_an_error() -> None:
    for kind in (pa.string(), pa.int64()):
        with pytest.raises(DataError, match="label column 'y'"):
            decide(pa.array([None, None], kind))


@pytest.mark.parametrize(("target", "values", "expected"), [
    (Target("binary", "y", ("no", "yes")), pa.array(["yes", "no"]), [1, 0]),
    (Target("binary", "y", ("yes", "no")), pa.array(["yes", "no"], pa.large_string()), [0, 1]),
    (Target("binary", "y", ("no", "yes")), pa.array(["yes", "no"]).dictionary_encode(), [1, 0]),
    (Target("binary", "y", (False, True)), pa.array([True, False]), [1, 0]),
    (Target("binary", "y", (0, 1)), pa.array([1, 0], pa.int8()), [1, 0]),
    (Target("binary", "y", (0, 1)), pa.array([1.0, 0.0]), [1, 0]),
    (Target("multiclass", "y", (0, 1, 300)), pa.array([1, 0], pa.int8()), [1, 0]),
    (Target("binary", "y", (0, 1)), pa.array([True, False]), [1, 0]),
    (Target("multiclass", "y", (0, 2**60, 2**60 + 1)), pa.array([2**60 + 1, 2**60], pa.uint64()), [2, 1]),
    (Target("binary", "y", (0, 1)), pa.array([1, 0]).dictionary_encode(), [1, 0]),
    (Target("multiclass", "y", ("a", "é", "z")), pa.array(["z", "a", "é"]), [2, 0, 1]),
    (Target("regression", "y"), pa.array([3, -1], pa.int16()), [3, -1]),
    (Target("regression", "y"), pa.array([Decimal("0.25")]), [0.25]),
    (Target("ranking", "y"), pa.array([2, 0]), [2, 0]),
], ids=lambda value: str(value)[:40].replace("\n", ""))  # fmt: skip
def test_labels_as_numbers(target: Target, values: pa.Array, expected: list[float]) -> None:
    for column in (pa.chunked_array([values]), pa.chunked_array([values[:1], values[1:]])):
        found = label_values(target, column, "x")
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, expected)


def test_labels_of_no_rows() -> None:
    for target, kind in [(Target("binary", "y", ("a", "b")), pa.string()), (Target("regression", "y"), pa.int8())]:
        assert label_values(target, pa.chunked_array([], kind), "x").shape == (0,)


def test_null_and_unseen_labels_are_counted() -> None:
    target = Target("binary", "y", ("no", "yes"))
    with pytest.raises(DataError, match="label column 'y' has 2 nulls in x; leave the rows out"):
        label_values(target, pa.chunked_array([["no", None, None]]), "x")
    with pytest.raises(DataError, match="label column 'y' has 2 nulls in x"):
        label_values(Target("regression", "y"), pa.chunked_array([[1.0, None, float("nan")]]), "x")
    with pytest.raises(DataError, match="has 2 values in x that training has not seen, the first is 'perhaps'"):
        label_values(target, pa.chunked_array([["no", "perhaps", "perhaps"]]), "x")
    with pytest.raises(DataError, match="1 values in x that training has not seen, the first is 2"):
        label_values(Target("binary", "y", (0, 1)), pa.chunked_array([pa.array([0, 2], pa.int8())]), "x")


@pytest.mark.parametrize(("target", "kind"), [
    (Target("binary", "y", (0, 1)), pa.string()), (Target("binary", "y", ("a", "b")), pa.int64()),
    (Target("binary", "y", (False, True), above=1.0), pa.string()), (Target("regression", "y"), pa.string()),
])  # fmt: skip
def test_labels_of_another_type_are_an_error_without_a_traceback(target: Target, kind: pa.DataType) -> None:
    values = pa.chunked_array([pa.array(["a", "b"] if kind == pa.string() else [1, 2], kind)])
    with pytest.raises(DataError, match="label column 'y'"):
        label_values(target, values, "x")


@pytest.mark.parametrize("weighted", [False, True])
def test_prior_is_the_weighted_mean_of_the_labels(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    y = rng.choice([0, 1, 2], 500, p=[0.5, 0.3, 0.2])
    w = rng.gamma(1, size=500) if weighted else np.ones(500)
    by_value = {value: float(w[y == value].sum()) for value in range(3)}
    shares = [by_value[value] / w.sum() for value in range(3)]
    none = ColumnSums()
    assert prior(Target("multiclass", "y", (0, 1, 2)), none, by_value) == pytest.approx(shares, rel=1e-12)
    two = {"no": by_value[0], "yes": by_value[1]}
    share = by_value[1] / (by_value[0] + by_value[1])
    assert prior(Target("binary", "y", ("no", "yes")), none, two) == pytest.approx([share])
    assert prior(Target("binary", "y", ("yes", "no")), none, two) == pytest.approx([1 - share])
    numbers = numeric_sums(y.astype(np.float64), w)
    assert prior(Target("regression", "y"), numbers, {}) == pytest.approx([np.average(y, weights=w)], rel=1e-12)
    above = numeric_sums((y > 0.5).astype(np.float64), w)
    expected = np.average(y > 0.5, weights=w)
    assert prior(Target("binary", "y", (False, True), above=0.5), above, {}) == pytest.approx([expected])
    assert prior(Target("ranking", "y"), numbers, {}) == []


def test_prior_of_quantiles_is_the_labels_quantiles() -> None:
    y = np.random.default_rng(0).normal(100, 10, 5000)
    target = Target("regression", "y", quantiles=(0.1, 0.5, 0.9))
    mean, *found = prior(target, numeric_sums(y, None), {})
    assert mean == pytest.approx(y.mean())
    np.testing.assert_allclose(found, np.quantile(y, target.quantiles), rtol=0.01)


def test_prior_of_a_class_absent_from_training_rows() -> None:
    assert prior(Target("multiclass", "y", ("a", "b", "c")), ColumnSums(), {"a": 3.0, "c": 1.0}) == [0.75, 0.0, 0.25]


REGRESSION = Target("regression", "y")


@pytest.mark.parametrize(("objective", "label"), [
    (objective, label)
    for objective in (*TASK_OBJECTIVES["regression"], "rank:ndcg") if objective != "reg:quantileerror"
    for label in (-2.0, -1.0, -1 + 1e-9, -0.5, 0.0, 1e-50, 1e-30, 0.5, 1.0, 1.5, 31.0, 32.0)
    if objective != "rank:ndcg" or label == int(label)
])  # fmt: skip
def test_bounds_are_those_of_xgboost(objective: str, label: float) -> None:
    given = {"qid": [0, 0]} if objective.startswith("rank") else {}
    matrix = xgb.DMatrix(np.arange(2.0).reshape(2, 1), [label, 1.0], **given)
    name = "relevance" if given else objective
    sums = ColumnSums(minimum=min(label, 1.0), maximum=max(label, 1.0))
    try:
        xgb.train({"objective": objective, "nthread": 1}, matrix, 1)
    except xgb.core.XGBoostError:
        with pytest.raises(DataError, match=f"label column 'y' has the value {label!r}, and {name} takes "):
            check_bounds(name, REGRESSION, sums)
    else:
        check_bounds(name, REGRESSION, sums)


def test_bounds_of_no_objective_and_of_no_numbers() -> None:
    check_bounds(None, REGRESSION, ColumnSums(minimum=-1e30, maximum=1e30))
    for objective in BOUNDS:
        check_bounds(objective, REGRESSION, ColumnSums())
    with pytest.raises(DataError, match=r"has the value -1\.0, and poisson takes labels of 0 or more"):
        check_bounds("poisson", REGRESSION, ColumnSums(minimum=-1.0, maximum=3.0))
