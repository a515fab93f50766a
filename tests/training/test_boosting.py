from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost as xgb
from xgboost.core import XGBoostError

from claydist.collective import Collective
from claydist.dataset.footers import take_inventory
from claydist.dataset.split import SplitPlan
from claydist.dataset.statistics import PassPlan, part_of, run_here, summarise
from claydist.errors import ContractError, MetricError, TrainingError
from claydist.features import build_plan
from claydist.labels import decide_target
from claydist.models.boosted import XGBoostModel, booster_params
from claydist.schema import Schema, column_of, decide_roles
from claydist.spec import TrainSpec, XGBoostSpec
from claydist.specfile import load_spec
from claydist.storage import open_store
from claydist.training import binning
from claydist.training.binning import sampled_inputs
from claydist.training.boosting import boost
from claydist.training.checkpoints import find_checkpoint
from claydist.training.job import ShardRows, TrainJob, plan_part
from claydist.training.progress import Reporter
from claydist.training.worker import run_worker
from tests.ranks import die, run_ranks

N = 800


def rows(seed: int = 0, cities: Sequence[str] = ("Praha", "Zürich", "東京", "a")) -> pa.Table:
    rng = np.random.default_rng(seed)
    # Fewer values than bins: the cuts do not depend on how rows are spread.
    a, b = rng.integers(0, 60, N), rng.integers(-20, 20, N)
    city = rng.integers(0, len(cities), N)
    y = 0.1 * a + 0.05 * b * (city % 2) + rng.normal(0, 1, N) > 3
    return pa.table({
        "a": pa.array(a, mask=rng.random(N) < 0.1), "b": b.astype(np.float64),
        "city": pa.array(np.array(cities)[city], mask=rng.random(N) < 0.1), "y": y.astype(np.int64),
    })  # fmt: skip


def make_job(
    folder: Path, files: Sequence[pa.Table], n_workers: int, *, valid: Any = None, run: str = "run", seed: int = 3,
    **model: Any,
) -> TrainJob:  # fmt: skip
    """A job over these files, made as preparation makes it, without Ray."""
    (folder / "data").mkdir(exist_ok=True)
    for i, table in enumerate(files):
        pq.write_table(table, folder / "data" / f"{i}.parquet", row_group_size=150)
    spec = load_spec(TrainSpec, {
        "name": "m", "data": {"path": str(folder / "data"), "label": "y"}, "split": {"valid": valid}, "seed": seed,
        "model": {"kind": "xgboost", **model},
    })  # fmt: skip
    data, split = spec.data, SplitPlan.of(spec.split, spec.seed, spec.data.key)
    inventory = take_inventory(data.path)
    roles = decide_roles(data, inventory.schema, "data")
    columns = [column_of(inventory.schema.field(name), "data") for name in roles.features]
    passed = PassPlan(inventory, data, roles, tuple(columns), split)
    sums = summarise(passed, run_here)
    target = decide_target(spec, column_of(inventory.schema.field("y"), "data"), sums.labels)
    plan = build_plan(data, Schema(tuple(columns)), sums.profiles())
    names = ["train", "valid"] if valid else ["train"]
    parts = {name: part_of(sums, passed, name) for name in names}
    assert isinstance(spec.model, XGBoostSpec)
    return TrainJob(
        run_id="r", run=open_store(str(folder / run)), parts=parts,
        shards={name: plan_part(part, n_workers) for name, part in parts.items()}, plan=plan, target=target,
        roles=roles, model=spec.model, params=booster_params(spec.model, target.task, plan, len(target.classes), 1),
        seed=spec.seed, n_workers=n_workers, n_threads=1, checkpoint_s=0,
    )  # fmt: skip


class Killing(Reporter):
    """A reporter whose process is killed when it has done so many rounds."""

    at = 40

    def tell(self, *, force: bool = False, **word: Any) -> None:
        if word.get("round") == self.at:
            die()


def train(collective: Collective, job: TrainJob) -> dict[str, Any]:
    return boost(job, collective, Reporter(collective.rank))


def train_and_kill_the_last(collective: Collective, job: TrainJob) -> dict[str, Any]:
    is_last = collective.rank == job.n_workers - 1
    return boost(job, collective, (Killing if is_last else Reporter)(collective.rank))


def whole_worker(collective: Collective, job: TrainJob) -> dict[str, Any]:
    return run_worker(job, collective, Reporter(collective.rank))


def outcomes(work: Callable[..., Any], job: TrainJob) -> list[dict[str, Any]]:
    found = run_ranks(work, [job] * job.n_workers)
    assert not [e for e in found if isinstance(e, Exception)], found
    return found


def logloss(outcome: dict[str, Any], table: pa.Table, job: TrainJob) -> float:
    p = predictions(outcome, table, job)
    y = table.column("y").to_numpy()
    return float(-np.mean(np.log(np.where(y == 1, p, 1 - p))))


def predictions(outcome: dict[str, Any], table: pa.Table, job: TrainJob) -> np.ndarray:
    encoded = job.plan.encode(table)
    return XGBoostModel(outcome["model"], "binary").predict_encoded(job.plan, encoded, None).astype(np.float64)


def test_one_worker_is_single_process_xgboost(tmp_path: Path) -> None:
    table = rows()
    job = make_job(tmp_path, [table], 1, rounds=20, params={"max_depth": 4})
    found = train(Collective(), job)
    X = job.plan.tree_matrix(job.plan.encode(table))
    Xy = xgb.QuantileDMatrix(X, table.column("y").to_numpy(), feature_types=job.plan.kinds, enable_categorical=True)
    reference = xgb.train({**job.params, "nthread": 1}, Xy, 20)
    np.testing.assert_array_equal(predictions(found, table, job).astype(np.float32), reference.predict(Xy))


def test_every_rank_has_the_model_that_one_worker_has(tmp_path: Path) -> None:
    files = [rows(0), rows(1)]
    keys: dict[str, Any] = {"rounds": 30, "params": {"max_depth": 4}, "valid": {"fraction": 0.2}}
    one = train(Collective(), make_job(tmp_path, files, 1, run="1", **keys))
    job = make_job(tmp_path, files, 2, run="2", **keys)
    found = outcomes(train, job)
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["history"] == found[1]["history"]
    test = rows(9)
    np.testing.assert_allclose(predictions(found[0], test, job), predictions(one, test, job), atol=1e-4)
    np.testing.assert_allclose(found[0]["history"]["valid"], one["history"]["valid"], rtol=1e-4)


@pytest.mark.parametrize("n_workers", [1, 2])
@pytest.mark.parametrize("params", [
    {"max_depth": 3, "subsample": 0.7, "colsample_bynode": 0.7}, {"booster": "dart", "rate_drop": 0.3},
    {"max_depth": 3}, {"grow_policy": "lossguide", "max_leaves": 9, "lambda": 3, "num_parallel_tree": 2},
], ids=lambda given: next(iter(given)) + str(len(given)))  # fmt: skip
def test_a_run_that_was_killed_and_resumed_has_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, n_workers: int, params: dict[str, Any]
) -> None:
    keys: dict[str, Any] = {"rounds": 60, "params": params, "valid": {"fraction": 0.2}}
    undisturbed = outcomes(train, make_job(tmp_path, [rows()], n_workers, run="undisturbed", **keys))
    job = make_job(tmp_path, [rows()], n_workers, run="killed", **keys)
    found = run_ranks(train_and_kill_the_last, [job] * n_workers)
    assert isinstance(found[-1], ProcessLookupError)
    assert all(isinstance(e, (TrainingError, XGBoostError)) for e in found[:-1]), found
    checkpoint = find_checkpoint(job.run)
    assert checkpoint is not None
    assert checkpoint[0]["round"] == 25
    resumed = outcomes(train, job)
    assert [r["resumed_at"] for r in resumed] == [25] * n_workers
    assert {r["model"] for r in resumed} == {undisturbed[0]["model"]}
    assert resumed[0]["history"] == undisturbed[0]["history"]


def test_the_model_does_not_depend_on_when_checkpoints_are_written(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rounds": 60, "params": {"subsample": 0.7}}
    often = make_job(tmp_path, [rows()], 1, run="often", **keys)
    never = replace(often, run=open_store(str(tmp_path / "never")), checkpoint_s=1e9)
    assert train(Collective(), often)["model"] == train(Collective(), never)["model"]
    assert find_checkpoint(often.run) is not None
    assert find_checkpoint(never.run) is None


def test_seeds_matter_where_rows_are_sampled(tmp_path: Path) -> None:
    models = {train(Collective(), make_job(tmp_path, [rows()], 1, run=str(seed), seed=seed, rounds=5,
                                           params={"subsample": 0.5}))["model"] for seed in (1, 2)}  # fmt: skip
    assert len(models) == 2


def test_early_stopping_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows(0), rows(1)], 2, rounds=300, early_stopping=5, valid={"fraction": 0.2},
                   params={"max_depth": 6, "eta": 0.5})  # fmt: skip
    found = outcomes(train, job)
    assert found[0]["model"] == found[1]["model"]
    best = found[0]["history"]["best_round"]
    assert [r["n_rounds"] for r in found] == [best + 1] * 2
    assert XGBoostModel(found[0]["model"], "binary").n_rounds == best + 1
    watched = found[0]["history"]["valid"]
    assert len(watched) == best + 1 + 5 < 300
    assert watched[best] == min(watched)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_metric_that_is_no_number_ends_early_stopping_with_a_word(tmp_path: Path, n_workers: int) -> None:
    rng = np.random.default_rng(0)
    tables = [t.set_column(3, "y", pa.array(np.exp(1.5 * rng.normal(size=N)))) for t in (rows(0), rows(1))]
    keys: dict[str, Any] = {"rounds": 40, "valid": {"fraction": 0.3}, "task": "regression",
                            "params": {"eval_metric": "rmsle", "eta": 1.9, "max_depth": 2}}  # fmt: skip
    # Predictions below -1 have no logarithm.
    watched = train(Collective(), make_job(tmp_path, tables, 1, run="watched", **keys))["history"]
    first = int(np.isnan(watched["valid"]).argmax())
    assert 0 < first < 39
    assert not np.isnan(watched["valid"][watched["best_round"]])
    job = make_job(tmp_path, tables, n_workers, early_stopping=30, **keys)
    for found in outcomes(whole_worker, job):
        assert isinstance(found["error"], MetricError)
        round_ = re.search(r"rmsle on valid is not a number in round (\d+)", str(found["error"]))
        assert round_
        assert n_workers > 1 or int(round_[1]) == first + 1


def test_early_stopping_after_a_resume_is_undisturbed(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rounds": 200, "early_stopping": 15, "valid": {"fraction": 0.2},
                            "params": {"max_depth": 3, "eta": 0.15, "subsample": 0.7}}  # fmt: skip
    undisturbed = train(Collective(), make_job(tmp_path, [rows()], 1, run="undisturbed", **keys))
    assert len(undisturbed["history"]["valid"]) > 28
    job = make_job(tmp_path, [rows()], 1, run="killed", **keys)
    Killing.at = 27
    assert isinstance(run_ranks(kill_at_27, [job])[0], ProcessLookupError)
    resumed = train(Collective(), job)
    assert resumed["resumed_at"] == 25
    assert (resumed["model"], resumed["history"]) == (undisturbed["model"], undisturbed["history"])


def kill_at_27(collective: Collective, job: TrainJob) -> dict[str, Any]:
    Killing.at = 27
    return train_and_kill_the_last(collective, job)


def test_a_rank_without_valid_rows_watches_what_the_others_see(tmp_path: Path) -> None:
    table = rows()
    few = np.zeros(N, bool)
    few[5] = True
    marked = table.append_column("part", pa.array(few.astype(np.int64)))
    keys: dict[str, Any] = {"rounds": 10, "valid": {"where": "part = 1"}, "early_stopping": 3}
    job = make_job(tmp_path, [marked], 2, **keys)
    assert sorted(job.shard("valid", rank).n_rows for rank in range(2)) == [0, 1]
    found = outcomes(train, job)
    assert found[0]["history"] == found[1]["history"]
    assert XGBoostModel(found[0]["model"], "binary").n_rounds == found[0]["n_rounds"]
    one = train(Collective(), make_job(tmp_path, [marked], 1, run="one", **keys))
    np.testing.assert_allclose(found[0]["history"]["valid"], one["history"]["valid"], rtol=1e-3)


def test_a_rank_without_any_rows_takes_part(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows()], 1, rounds=8)
    two = replace(job, n_workers=2, run=open_store(str(tmp_path / "two")))
    assert two.shard("train", 1).n_rows == 0
    found = outcomes(train, two)
    one = train(Collective(), job)
    test = rows(5)
    np.testing.assert_allclose(predictions(found[0], test, job), predictions(one, test, job), atol=1e-5)


def test_categories_that_only_one_worker_has_keep_their_codes(tmp_path: Path) -> None:
    files = [rows(0, ("a", "b", "ü")), rows(1, ("c", "d", "東京"))]
    job = make_job(tmp_path, files, 2, rounds=25)
    assert job.plan.features[2].vocabulary == ("a", "b", "c", "d", "ü", "東京")
    seen = [
        set(np.unique(b.encoded.columns[2])) - {-1} for rank in range(2) for b in job.shard("train", rank).batches()
    ]
    assert set.union(*seen) == set(range(6))
    assert {0, 1, 4} in seen
    found = outcomes(train, job)
    assert found[0]["model"] == found[1]["model"]
    one = train(Collective(), make_job(tmp_path, files, 1, run="one", rounds=25))
    both = pa.concat_tables(files)
    np.testing.assert_allclose(predictions(found[0], both, job), predictions(one, both, job), atol=1e-4)
    assert logloss(found[0], both, job) < 0.5


def test_workers_of_another_vocabulary_stop_before_round_0(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows(), rows(1)], 2, rounds=5)
    city = replace(job.plan.features[2], vocabulary=("Praha", "Brno"))
    other = replace(job, plan=replace(job.plan, features=(*job.plan.features[:2], city)))
    for error in (found["error"] for found in run_ranks(whole_worker, [job, other])):
        assert isinstance(error, ContractError)
        (problem,) = error.problems
        assert problem.startswith("features: rank 0 has ")
        assert "東京" in problem.partition("; rank 1 has ")[0]
        assert "Brno" in problem.partition("; rank 1 has ")[2]
    assert job.run.list() == []


@pytest.mark.parametrize(("change", "key"), [
    ({"seed": 9}, "seed"), ({"n_threads": 2}, "threads"), ({"params": {"eta": 0.9}}, "params"),
])  # fmt: skip
def test_workers_of_another_setting_stop_before_round_0(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    job = make_job(tmp_path, [rows(), rows(1)], 2, rounds=5)
    found = run_ranks(whole_worker, [job, replace(job, **change)])
    assert [type(r["error"]) for r in found] == [ContractError] * 2
    assert [p.partition(":")[0] for p in found[0]["error"].problems] == [key]


def test_the_worker_gives_the_result_of_rank_0(tmp_path: Path) -> None:
    found = outcomes(whole_worker, make_job(tmp_path, [rows(), rows(1)], 2, rounds=5))
    assert found[1] == {}
    assert found[0]["n_rounds"] == 5
    assert found[0]["peak_mb"] > 50


def test_sampled_cuts_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows(0), rows(1)], 2, rounds=20, binning="sample")
    found = outcomes(train, job)
    assert found[0]["model"] == found[1]["model"]
    exact = train(Collective(), make_job(tmp_path, [rows(0), rows(1)], 1, run="exact", rounds=20))
    test = rows(9)
    assert abs(logloss(found[0], test, job) - logloss(exact, test, job)) < 0.01


def test_a_sample_is_spread_over_the_row_groups(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows(i) for i in range(8)], 1, rounds=1, binning="sample")
    shard = job.shard("train", 0)
    assert len(shard.rows.pieces) == 48
    *sample, codes = sampled_inputs(shard, 400)
    X = np.concatenate([part["data"] for part in sample])
    assert 350 <= len(X) <= 450
    np.testing.assert_array_equal(codes["data"], [[np.nan, np.nan, 3]])
    whole = np.concatenate([job.plan.tree_matrix(batch.encoded) for batch in shard.batches()])
    assert {row.tobytes() for row in X} <= {row.tobytes() for row in whole}
    assert np.nanmedian(X[:, 0]) == pytest.approx(np.nanmedian(whole[:, 0]), abs=5)
    again = np.concatenate([part["data"] for part in sampled_inputs(shard, 400)[:-1]])
    np.testing.assert_array_equal(X, again)


def test_sampled_cuts_with_a_rank_without_rows(tmp_path: Path) -> None:
    job = make_job(tmp_path, [rows()], 2, rounds=3, binning="sample")
    shards = {"train": (job.shards["train"][0], ShardRows((), 0))}
    found = outcomes(train, replace(job, shards=shards))
    one = train(Collective(), replace(job, n_workers=1, run=open_store(str(tmp_path / "one"))))
    test = rows(5)
    np.testing.assert_allclose(predictions(found[0], test, job), predictions(one, test, job), atol=1e-5)


def test_sampled_cuts_know_categories_that_the_sample_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups follow the city, of which the sample sees one in four; the label depends on the last ones."""
    cities, rng = np.repeat(np.arange(64), 150), np.random.default_rng(0)
    table = pa.table({
        "a": rng.normal(size=len(cities)), "city": [f"city {i:02}" for i in cities],
        "y": ((cities >= 61) ^ (rng.random(len(cities)) < 0.05)).astype(np.int64),
    })  # fmt: skip
    monkeypatch.setattr(binning, "SAMPLED_ROWS", 100)
    job = make_job(tmp_path, [table], 1, rounds=10, params={"max_depth": 3, "eta": 1.0}, binning="sample", seed=5)
    known = np.concatenate([part["data"] for part in sampled_inputs(job.shard("train", 0), 100)[:-1]])
    assert known[:, 1].max() == 60
    found = train(Collective(), job)
    assert found["history"]["train"][-1] == pytest.approx(logloss(found, table, job), rel=1e-4)
    assert logloss(found, table, job) < 0.25


def test_a_column_that_the_sampled_row_groups_do_not_have_is_read_everywhere(tmp_path: Path) -> None:
    files = [rows(i) for i in range(8)]
    late = pa.array([None] * (N - 20) + [1.0] * 20)
    tables = [t.append_column("late", late if i == 4 else pa.nulls(N, pa.float64())) for i, t in enumerate(files)]
    job = make_job(tmp_path, tables, 1, rounds=1, binning="sample")
    at = job.plan.names.index("late")
    X = np.concatenate([part["data"] for part in sampled_inputs(job.shard("train", 0), 3000)])
    assert np.nanmax(X[:, at]) == 1.0
