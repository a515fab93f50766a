from __future__ import annotations

from typing import Any

import pytest

from claydist.errors import SpecError
from claydist.features import Feature, FeaturePlan
from claydist.models.boosted import TASK_OBJECTIVES, booster_params, is_random
from claydist.schema import Column, Schema
from claydist.spec import XGBoostSpec
from claydist.training.boosting import History, check_params, segment_end, segment_seed, summed_metrics

PLAN = FeaturePlan(
    Schema((Column("a", "float"), Column("b", "string"))),
    (Feature("a", "a", "numeric"), Feature("b", "b", "categorical", vocabulary=("x", "é"))),
)


def params(task: str = "binary", n_classes: int = 3, **keys: Any) -> dict[str, Any]:
    return booster_params(XGBoostSpec(kind="xgboost", **keys), task, PLAN, n_classes, 1)


def segments(rounds: int) -> list[tuple[int, int]]:
    found, done = [], 0
    while done < rounds:
        found.append((done, segment_end(done, rounds)))
        done = found[-1][1]
    return found


def test_segments_grow_and_end_with_the_rounds() -> None:
    assert segments(300) == [(0, 25), (25, 50), (50, 100), (100, 200), (200, 300)]
    assert segments(25) == [(0, 25)]
    assert segments(7) == [(0, 7)]
    assert segments(26) == [(0, 25), (25, 26)]


@pytest.mark.parametrize("done", range(0, 300, 13))
def test_the_end_of_a_segment_does_not_depend_on_where_in_it_one_is(done: int) -> None:
    (own,) = [(start, end) for start, end in segments(300) if start <= done < end]
    assert segment_end(done, 300) == own[1]
    # More rounds move no bound but the last.
    assert segment_end(done, 10_000) >= own[1]


def test_seeds_differ_by_segment_and_by_seed() -> None:
    seeds = {segment_seed(seed, done) for seed in (0, 1, 2**31 - 1) for done in (0, 25, 50, 100)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert segment_seed(3, 25) == segment_seed(3, 25)


@pytest.mark.parametrize(("given", "random"), [
    ({}, False), ({"max_depth": 3, "eta": 0.1}, False), ({"subsample": 0.5}, True), ({"colsample_bytree": 0.5}, True),
    ({"booster": "dart"}, True), ({"lambdarank_pair_method": "mean"}, True), ({"something": "new"}, True),
])  # fmt: skip
def test_parameters_that_may_draw_random_numbers(given: dict[str, Any], random: bool) -> None:
    assert is_random(params(params=given)) is random


def history(metric: str, values: list[float]) -> History:
    found = History(metric)
    for i, value in enumerate(values):
        found.add(f"[{i}]\ttrain-{metric}:0.5\tvalid-{metric}:{value}", ("train", "valid"))
    return found


def test_history_reads_xgboosts_lines() -> None:
    found = History("ndcg@5")
    found.add("[0]\ttrain-ndcg@5:0.25\tvalid-ndcg@5:1e-05", ("train", "valid"))
    found.add("[1]\tvalid-ndcg@5:0.5", ("train", "valid"))
    assert found.values == {"train": [0.25, None], "valid": [1e-5, 0.5]}
    assert found.latest() == {"train": 0.25, "valid": 0.5}
    assert found.rises


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("logloss", [0.5, 0.3, 0.4], 1), ("rmse", [3, 2, 2], 1), ("ndcg", [0.5, 0.7, 0.6], 1), ("map@3", [0.5, 0.5], 0),
    ("mae", [1.0], 0), ("poisson-nloglik", [2, 1], 1),
])  # fmt: skip
def test_the_first_of_the_best_rounds(metric: str, values: list[float], best: int) -> None:
    assert history(metric, values).best_round() == best


def test_without_valid_there_is_no_best_round() -> None:
    found = History("rmse")
    found.add("[0]\ttrain-rmse:1", ("train",))
    assert found.best_round() is None
    assert not found.is_over(1)


@pytest.mark.parametrize(("values", "patience", "is_over"), [
    ([3, 2, 1], 1, False), ([3, 2, 2], 1, True), ([3, 2, 2], 2, False), ([1, 2, 3], 2, True), ([1, 2, 3], 3, False),
    ([1], 1, False), ([1, 2, 3], None, False),
])  # fmt: skip
def test_boosting_ends_after_so_many_rounds_without_gain(values: list[float], patience: int, is_over: bool) -> None:
    assert history("rmse", values).is_over(patience) == is_over


@pytest.mark.parametrize(("task", "objective"), [(t, o) for t, names in TASK_OBJECTIVES.items() for o in names])
def test_xgboost_takes_every_objective_that_we_offer(task: str, objective: str) -> None:
    quantiles = {"quantiles": [0.1, 0.9]} if objective == "reg:quantileerror" else {}
    check_params(params(task, objective=objective, **quantiles), PLAN)


@pytest.mark.parametrize("given", [
    {"max_depth": 3, "eta": 0.1, "subsample": 0.5, "colsample_bytree": 0.5, "max_bin": 64, "lambda": 2},
    {"learning_rate": 0.1, "reg_alpha": 1, "min_child_weight": 3, "grow_policy": "lossguide", "max_leaves": 5},
    {"booster": "dart", "rate_drop": 0.1}, {"eval_metric": "error"}, {"eval_metric": "error@0.7"},
    {"num_parallel_tree": 2}, {"scale_pos_weight": 3}, {"max_cat_to_onehot": 1},
])  # fmt: skip
def test_params_that_xgboost_takes(given: dict[str, Any]) -> None:
    check_params(params(params=given), PLAN)


def test_many_classes_and_constraints_are_taken() -> None:
    check_params(params("multiclass", n_classes=40), PLAN)
    check_params(params("multiclass", n_classes=2), PLAN)
    check_params(params("regression", monotone={"a": 1}, interactions=[["a"], ["b"]]), PLAN)


@pytest.mark.parametrize(("given", "text"), [
    ({"max_deph": 3}, 'does not use "max_deph"; take it out, or mend the name'),
    ({"max_depth": "deep"}, "XGBoost refuses them"), ({"eta": "fast"}, "XGBoost refuses them"),
    ({"subsample": 3}, "XGBoost refuses them"), ({"grow_policy": "sideways"}, "XGBoost refuses them"),
    ({"eval_metric": "auc"}, "'auc' is an average of workers' values in XGBoost, not a sum; choose one of logloss"),
    ({"eval_metric": "aucpr"}, "not a sum"), ({"eval_metric": ["logloss", "error"]}, "choose one of"),
    ({"eval_metric": "loglos"}, "choose one of"), ({"max_bin": "many"}, "XGBoost refuses them"),
    ({"max_bin": 1}, "XGBoost refuses them"),
])  # fmt: skip
def test_params_that_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_params(params(params=given), PLAN)
    assert text in str(caught.value)
    assert "Stack trace" not in str(caught.value)


def test_auc_is_not_among_the_summed() -> None:
    assert not {"auc", "aucpr"} & set(summed_metrics("rank:ndcg"))


@pytest.mark.parametrize("metric", ["ndcg", "map@5", "pre"])
def test_metrics_of_queries_are_for_rankings_alone(metric: str) -> None:
    check_params(params("ranking", params={"eval_metric": metric}), PLAN)
    # Without queries XGBoost takes the rows of each worker as one.
    with pytest.raises(SpecError, match=f"'{metric}' is an average of workers' values"):
        check_params(params("binary", params={"eval_metric": metric}), PLAN)
