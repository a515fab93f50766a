from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xgboost as xgb

from claydist.errors import BundleError, SpecError
from claydist.features import Feature, FeaturePlan
from claydist.models.boosted import (
    EVAL_METRICS,
    OBJECTIVES,
    TASK_OBJECTIVES,
    XGBoostModel,
    booster_params,
    objective_of,
    position_names,
)
from claydist.schema import Column, Schema
from claydist.spec import XGBoostSpec
from claydist.training.boosting import summed_metrics

PLAN = FeaturePlan(
    Schema((Column("a", "float"), Column("b", "string"), Column("c", "float"))),
    (
        Feature("a", "a", "numeric"),
        Feature("b", "b", "categorical", vocabulary=("é", "x")),
        Feature("c", "c", "numeric"),
    ),
)
NAMES = position_names(PLAN)


def spec(**keys: Any) -> XGBoostSpec:
    return XGBoostSpec(kind="xgboost", **keys)


def params(task: str = "regression", **keys: Any) -> dict[str, Any]:
    return booster_params(spec(**keys), task, PLAN, 3, 2)


def rows(n_rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_rows, 3)).astype(np.float32)
    X[:, 1] = rng.integers(0, 2, n_rows)
    X[rng.random(n_rows) < 0.1, 0] = np.nan
    return X, np.nan_to_num(X[:, 0]) + X[:, 1] + 3


def trained(task: str = "regression", *, rounds: int = 5, **keys: Any) -> tuple[XGBoostModel, xgb.Booster]:
    X, y = rows()
    labels = {"binary": y > 3.5, "multiclass": np.clip(y - 2, 0, 2).astype(int)}.get(task, y)
    Xy = xgb.QuantileDMatrix(
        X, labels, feature_names=NAMES, feature_types=PLAN.kinds, enable_categorical=True, nthread=1
    )
    booster = xgb.train({**params(task, **keys), "nthread": 1}, Xy, rounds)
    return XGBoostModel(bytes(booster.save_raw("ubj")), task), booster


@pytest.mark.parametrize("task", OBJECTIVES)
def test_objective_and_metric_by_task(task: str) -> None:
    found = params(task)
    assert found["objective"] == OBJECTIVES[task]
    assert found["eval_metric"] == EVAL_METRICS[task]
    assert found["eval_metric"] in summed_metrics(found["objective"])
    assert (found["tree_method"], found["nthread"]) == ("hist", 2)
    assert found.get("num_class") == (3 if task == "multiclass" else None)


@pytest.mark.parametrize(("task", "objective"), [(t, o) for t, names in TASK_OBJECTIVES.items() for o in names])
def test_every_objective_has_a_metric_that_is_summed(task: str, objective: str) -> None:
    quantiles = {"quantiles": [0.5]} if objective == "reg:quantileerror" else {}
    assert params(task, objective=objective, **quantiles)["eval_metric"] in summed_metrics(objective)


@pytest.mark.parametrize(("task", "keys", "text"), [
    ("binary", {"objective": "reg:squarederror"}, "'reg:squarederror' does not fit the task 'binary'"),
    ("multiclass", {"objective": "multi:softmax"}, "expected one of multi:softprob"),
    ("regression", {"objective": "reg:gammma"}, "does not fit the task 'regression'"),
    ("regression", {"objective": "reg:quantileerror"}, "model.quantiles and objective"),
    ("regression", {"objective": "reg:gamma", "quantiles": [0.5]}, "model.quantiles and objective"),
    ("binary", {"quantiles": [0.5]}, "'reg:quantileerror' does not fit the task 'binary'"),
])  # fmt: skip
def test_objectives_that_do_not_fit(task: str, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text.replace(".", r"\.")):
        objective_of(spec(**keys), task)


def test_quantiles_choose_their_objective() -> None:
    found = params(quantiles=[0.1, 0.9])
    assert (found["objective"], found["quantile_alpha"]) == ("reg:quantileerror", [0.1, 0.9])


def test_params_pass_through_and_may_replace_the_metric() -> None:
    found = params(params={"max_depth": 3, "eval_metric": "mae", "max_bin": 64})
    assert (found["max_depth"], found["eval_metric"], found["max_bin"]) == (3, "mae", 64)


def test_constraints_by_name() -> None:
    found = params(monotone={"c": -1}, interactions=[["a", "c"], ["b"]])
    assert found["monotone_constraints"] == "(0, 0, -1)"
    assert found["interaction_constraints"] == "[[0, 2], [1]]"
    for keys in ({"monotone": {"zz": 1}}, {"interactions": [["a", "zz"]]}):
        with pytest.raises(SpecError, match=r"names \['zz'\], which are not features; features: a, b, c"):
            params(**keys)


def test_a_category_has_no_order_to_be_monotone_in() -> None:
    assert PLAN.kinds[1] == "c"
    assert params(monotone={"b": 0, "a": 1})["monotone_constraints"] == "(1, 0, 0)"
    with pytest.raises(SpecError, match=r"model\.monotone names \['b'\], which are categories"):
        params(monotone={"b": 1})


def test_monotone_constraint_holds() -> None:
    model, _ = trained(rounds=20, monotone={"a": -1})
    X = np.zeros((50, 3), np.float32)
    X[:, 0] = np.linspace(-3, 3, 50)
    assert (np.diff(model.predict(X)) <= 0).all()
    free, _ = trained(rounds=20)
    assert not (np.diff(free.predict(X)) <= 0).all()


@pytest.mark.parametrize(("task", "keys", "shape"), [
    ("regression", {}, ()), ("binary", {}, ()), ("multiclass", {}, (3,)),
    ("regression", {"quantiles": [0.1, 0.9]}, (2,)),
    ("regression", {"quantiles": [0.5]}, ()),
])  # fmt: skip
def test_predictions_are_the_boosters(task: str, keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    model, booster = trained(task, **keys)
    X, _ = rows()
    found = model.predict(X)
    matrix = xgb.DMatrix(X, feature_names=NAMES, feature_types=PLAN.kinds, enable_categorical=True, nthread=1)
    assert found.dtype == np.float32
    assert found.shape == (300, *shape)
    np.testing.assert_array_equal(found, booster.predict(matrix))
    assert model.predict(X[:0]).shape == (0, *shape)
    assert model.predict(X[:0]).dtype == np.float32
    assert model.n_rounds == 5


def test_offset_is_added_to_the_margin() -> None:
    model, booster = trained("binary")
    X, _ = rows()
    offset = np.random.default_rng(1).normal(size=300)
    matrix = xgb.DMatrix(
        X,
        base_margin=offset,
        feature_names=position_names(PLAN),
        feature_types=PLAN.kinds,
        enable_categorical=True,
        nthread=1,
    )
    np.testing.assert_array_equal(model.predict(X, offset), booster.predict(matrix))
    assert model.predict(X[:0], offset[:0]).shape == (0,)
    assert not np.array_equal(model.predict(X, offset), model.predict(X))


def test_importance_is_the_share_of_gain_of_every_feature() -> None:
    model, booster = trained()
    found = model.importance(PLAN)
    gains = booster.get_score(importance_type="total_gain")
    assert sum(row["gain"] for row in found) == pytest.approx(1)
    assert [row["gain"] for row in found] == sorted((row["gain"] for row in found), reverse=True)
    assert {row["feature"]: row["gain"] for row in found} == pytest.approx(
        {name: gains.get(f"f{j}", 0) / sum(gains.values()) for j, name in enumerate(PLAN.names)}
    )


def test_files_hold_the_model() -> None:
    model, _ = trained("multiclass")
    again = XGBoostModel.from_files(model.to_json(), model.to_files())
    X, _ = rows()
    assert again == model
    assert again.predict(X).tobytes() == model.predict(X).tobytes()


@pytest.mark.parametrize("raw", [b"", b"not a model", b"{}"])
def test_damaged_model_is_a_bundle_error(raw: bytes) -> None:
    with pytest.raises(BundleError, match=r"model\.ubj is not a model of XGBoost"):
        XGBoostModel(raw, "binary")


def test_a_model_that_is_cut_off_is_a_bundle_error() -> None:
    model, _ = trained()
    with pytest.raises(BundleError, match="cut off"):
        XGBoostModel(model.raw[: len(model.raw) // 2].rstrip(b"}"), "regression")
