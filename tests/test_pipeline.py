"""From Parquet to a registered model: against single-process XGBoost, and the rules of promotion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import xgboost as xgb
from sklearn import metrics as sk

import claydist
from claydist import pipeline
from claydist.bundle import check_golden, read_manifest
from claydist.cli import main
from claydist.display import Silent
from claydist.errors import ClusterError, StorageError
from claydist.models import LinearModel, XGBoostModel
from claydist.preparation import open_tables, prepare
from claydist.registry import open_registry
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from tests.checks import evaluate_by_file, part_table, prepare_job, run_job, train_here
from tests.tables import CITIES, cut, make_table, spec_of, write_files

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_flights_are_learnt_as_well_as_by_one_process(
    ray_cluster: None, shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = {
        "data.path": shared_data / "flights13", "model.rounds": 60, "train.workers": 2, "train.cpus_per_worker": 1,
        # With a sample of rows a tree, the AUC varies by 0.002 with the seed alone.
        "model.params.subsample": 1, "registry": tmp_path / "registry",
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in sets.items()]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(ROOT / "jobs" / "flights.yaml"), *[a for s in given for a in ("--set", s)], "--json"])
    tree = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0
    assert tree["workers"] == 2
    spec = load_spec(TrainSpec, ROOT / "jobs" / "flights.yaml", given)
    prepared = prepare(spec, open_tables(spec))
    months = [pq.read_table(file) for file in (shared_data / "flights13").rglob("*.parquet")]
    kept = pa.concat_tables(months, promote_options="default").filter(pc.is_valid(pc.field("arr_delay")))
    assert sum(tree["rows"].values()) == kept.num_rows == 327_346
    columns = [name for name in kept.column_names if name != "month"]
    parts = {name: part_table(part, columns) for name, part in prepared.parts.items()}
    assert {name: table.num_rows for name, table in parts.items()} == tree["rows"]
    order = [(name, "ascending") for name in columns]
    everything = pa.concat_tables([table.cast(parts["train"].schema) for table in parts.values()])
    wanted = kept.select(columns).cast(parts["train"].schema)
    assert everything.sort_by(order).equals(wanted.sort_by(order)), "every row once, in one part"

    auc = _reference_auc(spec, prepared)
    print(f"\ntest AUC: claydist, 2 workers {tree['metrics']['test']['auc']:.5f}; xgboost, one process {auc:.5f}")
    assert tree["metrics"]["test"]["auc"] == pytest.approx(auc, abs=0.003)
    assert tree["metrics"]["baseline"]["auc"] == 0.5


def _reference_auc(spec: TrainSpec, prepared: Any) -> float:
    """Test AUC of `xgboost.train` in this process, on the same rows, with pandas' own codes of the categories."""
    columns = [*prepared.roles.features, "arr_delay"]
    frames = {name: part_table(part, columns).to_pandas() for name, part in prepared.parts.items()}
    kinds = {name: pd.CategoricalDtype(sorted(frames["train"][name].dropna().unique()))
             for name in columns if not pd.api.types.is_numeric_dtype(frames["train"][name])}  # fmt: skip
    assert sorted(kinds) == ["carrier", "dest", "origin"]
    matrices = {}
    for name, frame in frames.items():
        X = frame.drop(columns="arr_delay").astype(kinds)
        codes = X.apply(lambda c: c.cat.codes.replace(-1, np.nan) if isinstance(c.dtype, pd.CategoricalDtype) else c)
        types = ["c" if column in kinds else "q" for column in X]
        matrices[name] = xgb.QuantileDMatrix(
            codes.to_numpy(np.float32), (frame["arr_delay"] > 15).astype(int), ref=matrices.get("train"),
            feature_types=types, enable_categorical=True,
        )  # fmt: skip
    params = {"objective": "binary:logistic", "seed": spec.seed, **spec.model.params}
    booster = xgb.train(params, matrices["train"], spec.model.rounds)
    return float(sk.roc_auc_score(matrices["test"].get_label(), booster.predict(matrices["test"])))


OBJECTIVES = {
    "binary": ("late", {}, {"objective": "binary:logistic"}),
    "regression": ("hours", {}, {"objective": "reg:squarederror"}),
    "poisson": ("parcels", {"objective": "count:poisson"}, {"objective": "count:poisson"}),
    "classes": ("city", {}, {"objective": "multi:softprob", "num_class": len(CITIES)}),
    "monotone": ("hours", {"monotone": {"km": -1}}, {"monotone_constraints": (-1, 0, 0)}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_worker_gives_the_trees_of_plain_xgboost(name: str, ray_cluster: None, tmp_path: Path) -> None:
    label, model, params = OBJECTIVES[name]
    table = make_table(2, 500).filter(pc.is_valid(pc.field("city")))
    path = write_files(tmp_path / "d", cut(table, 3))
    rounds = 40  # beyond the bound of the first segment
    spec = spec_of(path, tmp_path, label, data__features=["km", "kg", "express"], data__drop=[], data__weight="w",
                   model={"kind": "xgboost", "rounds": rounds, "params": {"max_depth": 3}, **model})  # fmt: skip
    trained = train_here(spec, tmp_path, 1)
    X = np.column_stack([table[c].cast(pa.float32()).to_numpy() for c in ("km", "kg", "express")])
    y = table.column(label).to_pandas()
    y = y.map({city: i for i, city in enumerate(sorted(CITIES))}) if label == "city" else y
    Xy = xgb.QuantileDMatrix(X, y, weight=table.column("w").to_numpy())
    booster = xgb.train({"max_depth": 3, "nthread": 1, **params}, Xy, rounds)
    found = trained.predictor.predict_arrays(table).values
    assert found.dtype == np.float32
    assert np.allclose(found, booster.inplace_predict(X), rtol=1e-6, atol=1e-7)


def test_early_stopping_keeps_the_best_round(ray_cluster: None, tmp_path: Path) -> None:
    path = write_files(tmp_path / "d", cut(make_table(4, 400), 2))
    spec = spec_of(path, tmp_path, split={"valid": {"fraction": 0.3}}, model={
        "kind": "xgboost", "rounds": 200, "early_stopping": 5, "params": {"max_depth": 6, "eta": 0.5}})  # fmt: skip
    trained = train_here(spec, tmp_path, 2)
    history = trained.outcome["history"]
    best = int(np.argmin(history["valid"]))
    assert (history["best_round"], trained.outcome["n_rounds"]) == (best, best + 1)
    assert len(history["valid"]) == best + 6 < 200
    model = trained.predictor.model
    assert isinstance(model, XGBoostModel)
    assert model.n_rounds == best + 1
    # The metric that stopped it is the exact one over all rows of valid.
    part = trained.prepared.parts["valid"]
    found = evaluate_by_file(trained.predictor, part).metrics["logloss"]
    assert found == pytest.approx(history["valid"][best], rel=1e-5)


def test_the_same_spec_gives_the_same_bytes_and_another_seed_others(ray_cluster: None, tmp_path: Path) -> None:
    path = write_files(tmp_path / "d", cut(make_table(4, 600), 3))
    model = {"kind": "xgboost", "rounds": 30, "params": {"subsample": 0.7, "colsample_bytree": 0.7}}
    raws = [train_here(spec_of(path, tmp_path, model=model, seed=seed), tmp_path, 2).outcome["model"]
            for seed in (1, 1, 2)]  # fmt: skip
    assert raws[0] == raws[1]
    assert raws[0] != raws[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_ray_train_gives_the_bytes_of_any_other_processes(kind: str, ray_cluster: None, tmp_path: Path) -> None:
    path = write_files(tmp_path / "d", cut(make_table(6, 900), 4))
    model = {"xgboost": {"kind": "xgboost", "rounds": 30, "params": {"subsample": 0.7}}, "linear": {"kind": "linear"}}
    spec = spec_of(path, tmp_path / "registry", model=model[kind], split={"test": {"fraction": 0.2}},
                   train={"workers": 2, "cpus_per_worker": 1}, data__weight="w")  # fmt: skip
    spec["data"]["drop"].remove("w")
    tree = claydist.train(spec, slices=["km > 100"])
    assert (tree["workers"], tree["threads"], tree["restarts"], tree["promoted"]) == (2, 1, 0, True)
    assert tree["peak_mb"] > 50
    assert set(tree["seconds"]) >= {"inventory", "statistics", "training", "evaluation"}
    bundle = claydist.load("parcels", str(tmp_path / "registry"))
    check_golden(bundle)
    assert set(bundle.manifest["slices"]) == {"km > 100"}
    here = train_here(spec, tmp_path, 2).predictor
    assert bundle.predictor.to_files() == here.to_files()


def test_a_bundle_predicts_without_ray(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    table = make_table(1, 300)
    path = write_files(tmp_path / "d", [table])
    trained = _train(spec_of(path, tmp_path / "registry"))
    code = """if True:
        import sys, claydist, pyarrow.parquet as pq
        table = pq.read_table(sys.argv[2])
        found = claydist.load("parcels", sys.argv[1]).predict(table.select(table.column_names[::-1]))
        assert found == claydist.load("parcels", sys.argv[1]).predict(table.to_pandas())
        pq.write_table(found, sys.argv[3])
        print(sorted(name for name in sys.modules if name.partition(".")[0] == "ray"))
    """
    arguments = [str(tmp_path / "registry"), str(path / "part-00.parquet"), str(tmp_path / "out.parquet")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
    assert pq.read_table(tmp_path / "out.parquet").equals(trained.predictor.predict(table))


def _train(spec: dict[str, Any], **options: Any) -> pipeline.Trained:
    checked = load_spec(TrainSpec, spec)
    return pipeline.train(checked, open_registry(None, checked.registry), Silent(), **options)


@pytest.fixture
def parcels(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A spec with a test part, trained by processes of the tests."""
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    path = write_files(tmp_path / "d", cut(make_table(1, 600), 3))
    return spec_of(path, tmp_path / "registry", split={"test": {"fraction": 0.3}})


def test_promotion_is_for_the_better_on_the_same_rows(parcels: dict[str, Any]) -> None:
    registry = open_registry(None, parcels["registry"])
    good, bad = {**parcels["model"], "rounds": 12}, {**parcels["model"], "rounds": 1, "params": {"eta": 0.01}}
    assert _train({**parcels, "model": bad}).summary["promoted"], "the first version needs only its goals"
    better = _train({**parcels, "model": good})
    assert better.summary["promoted"]
    worse = _train({**parcels, "model": bad})
    assert not worse.summary["promoted"]
    assert "the champion is better: logloss" in worse.why
    again = _train({**parcels, "model": good})
    assert again.summary["promoted"], "not better is enough"
    assert not _train({**parcels, "model": good}, promote=False).summary["promoted"]
    # Without a test part only a first version is promoted.
    untested = _train({**parcels, "model": good, "split": {}})
    assert not untested.summary["promoted"]
    assert untested.summary["metrics"].keys() == {"train", "baseline"}
    assert registry.alias_version("parcels") == 4
    assert registry.versions("parcels") == [1, 2, 3, 4, 5, 6]
    assert [m.to_version for m in registry.history("parcels")] == [1, 2, 4]


def test_the_first_goal_decides_and_slices_are_judged(parcels: dict[str, Any]) -> None:
    goals = [{"metric": "auc", "at_least": 0.5}, {"metric": "brier", "at_most": 0.5, "slice": "city = '東京'"}]
    first = _train({**parcels, "goals": goals, "slices": ["express = true"]})
    assert first.goals_met
    assert first.summary["goals"][1]["slice"] == "city = '東京'"
    manifest = read_manifest(open_registry(None, parcels["registry"]).version_store("parcels", 1))
    assert set(manifest["slices"]) == {"express = true", "city = '東京'"}
    assert manifest["slices"]["city = '東京'"]["brier"] == first.summary["goals"][1]["value"]
    second = _train({**parcels, "goals": goals, "model": {**parcels["model"], "rounds": 1}})
    assert "auc" in second.why


def test_a_champion_of_another_label_is_left_to_a_person(parcels: dict[str, Any]) -> None:
    assert _train(parcels).summary["promoted"]
    data = {**parcels["data"], "label": "hours", "drop": ["row", "w", "late", "parcels"]}
    other = _train({**parcels, "data": data})
    assert other.summary["task"] == "regression"
    assert other.summary["version"] == 2
    assert not other.summary["promoted"]
    assert "another label" in other.why


def test_what_is_held_out_is_not_learnt_from(parcels: dict[str, Any], tmp_path: Path) -> None:
    table = make_table(1, 600)
    held = pc.greater_equal(table.column("row"), 1_000_500)
    at = table.column_names.index("city")
    city = pc.if_else(held, pa.scalar("only in test"), table.column("city"))
    km = pc.if_else(held, pc.multiply(table.column("km"), 1e6), table.column("km"))
    table = table.set_column(at, "city", city).set_column(table.column_names.index("km"), "km", km)
    write_files(tmp_path / "e", cut(table, 2))
    parcels["data"]["path"] = str(tmp_path / "e")
    spec = {**parcels, "split": {"test": {"where": "row >= 1000500"}}, "model": {"kind": "linear"}}
    _, prepared, _ = prepare_job(spec, tmp_path, 2)
    features = {f.name: f for f in prepared.plan.features}
    assert "only in test" not in features["city"].vocabulary
    kept = table.slice(0, 500).column("km").to_pandas()
    assert features["km"].mean == pytest.approx(kept.mean(), rel=1e-12)
    assert features["km"].scale == pytest.approx(kept.std(ddof=0), rel=1e-12)
    assert prepared.parts["test"].n_rows == 100
    summary = _train(spec).summary
    constant = table.slice(0, 500).column("late").to_pandas().mean()
    y = table.slice(500).column("late").to_numpy()
    expected = sk.log_loss(y, np.full(100, constant))
    assert summary["metrics"]["baseline"]["logloss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_ranking_keeps_queries_whole_and_its_ndcg_is_exact(n_workers: int, ray_cluster: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    query = rng.permutation(np.repeat(np.arange(60), rng.integers(2, 25, 60)))  # rows of a query lie anywhere
    x = rng.normal(size=(len(query), 3))
    relevance = np.clip(np.round(x[:, 0] + rng.normal(0, 0.7, len(query)) + 1), 0, 4).astype(int)
    relevance[np.unique(query, return_index=True)[1]] = 4
    table = pa.table({"q": query, "a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": relevance})
    path = write_files(tmp_path / "d", cut(table, 4))
    spec = spec_of(path, tmp_path, "y", data__drop=[], data__group="q", split={"test": {"by": ["q"]}})
    trained = train_here(spec, tmp_path, n_workers)
    assert trained.job.n_workers == n_workers
    queries = []
    for rank in range(n_workers):
        groups = [batch.group for batch in trained.job.shard("train", rank).batches()]
        queries.append(set(np.concatenate(groups).tolist()))
    assert sum(map(len, queries)) == len(set().union(*queries))
    part = trained.prepared.parts["test"]
    found = evaluate_by_file(trained.predictor, part, group="q", depths=(3,)).metrics
    rows = part_table(part, ["q", "a", "b", "c", "y"])
    frame = rows.to_pandas().assign(score=trained.predictor.predict(rows).column("score").to_numpy())
    assert trained.prepared.parts["train"].n_rows + len(frame) == len(query)
    assert not set(frame.q) & set(part_table(trained.prepared.parts["train"], ["q"])["q"].to_pylist())
    for name, k in (("ndcg", None), ("ndcg@3", 3)):
        each = [sk.ndcg_score([g.y], [g.score], k=k) for _, g in frame.groupby("q")]
        assert found[name] == pytest.approx(np.mean(each), rel=1e-9), name
    assert found["ndcg"] > 0.85


def test_quantiles_are_trained_exactly_by_one_worker(parcels: dict[str, Any], tmp_path: Path) -> None:
    data = {**parcels["data"], "label": "hours", "drop": ["row", "w", "late", "parcels"]}
    model = {"kind": "xgboost", "rounds": 30, "quantiles": [0.1, 0.5, 0.9]}
    trained = _train({**parcels, "data": data, "model": model})
    assert trained.summary["workers"] == 1, "XGBoost averages refreshed leaves over workers"
    _, prepared, _ = prepare_job({**parcels, "data": data, "model": model}, tmp_path, 1)
    part = prepared.parts["test"]
    rows = part_table(part, prepared.roles.columns)
    answer = trained.predictor.predict(rows)
    assert answer.column_names == ["prediction_0.1", "prediction_0.5", "prediction_0.9"]
    y = rows.column("hours").to_numpy()
    each = [
        sk.mean_pinball_loss(y, answer[f"prediction_{q}"].to_numpy().astype(float), alpha=q) for q in (0.1, 0.5, 0.9)
    ]
    found = evaluate_by_file(trained.predictor, part).metrics["pinball"]
    assert found == pytest.approx(np.mean(each), rel=1e-9)
    assert trained.summary["metrics"]["test"]["pinball"] == pytest.approx(found, rel=1e-12)


def test_a_linear_model_says_its_coefficients_in_the_bundle(parcels: dict[str, Any]) -> None:
    trained = _train({**parcels, "model": {"kind": "linear"}})
    model = trained.predictor.model
    assert isinstance(model, LinearModel)
    names = {row["feature"] for row in model.importance(trained.predictor.plan)}
    assert {f"city={city}" for city in CITIES} | {"km", "kg", "express", "sent", "(intercept)"} == names


def test_a_champion_that_cannot_be_read_is_not_replaced(
    parcels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _train(parcels).summary["promoted"]

    def refuse(_: Any) -> Any:
        raise StorageError("cannot read: timed out")

    monkeypatch.setattr(pipeline, "read_bundle", refuse)
    second = _train(parcels)
    assert not second.summary["promoted"]
    assert "could not be judged: cannot read: timed out" in second.why


def test_a_champion_that_knows_more_classes_is_judged_all_the_same(parcels: dict[str, Any]) -> None:
    data = {**parcels["data"], "label": "city", "where": "city is not null"}
    goals = [{"metric": "logloss", "at_most": 100}]
    model = {**parcels["model"], "rounds": 1}
    first = _train({**parcels, "data": data, "model": model, "goals": goals})
    assert first.summary["task"] == "multiclass"
    gone = first.predictor.target.classes[-1]
    data["where"] = f"city is not null and city != '{gone}'"
    bad = {**model, "rounds": 20, "params": {"eta": 1.0}}  # there is nothing to learn: the more rounds the worse
    second = _train({**parcels, "data": data, "model": bad, "goals": goals})
    assert not second.summary["promoted"], second.why
    assert "the champion is better: logloss" in second.why


def test_a_busy_cluster_is_waited_for_and_then_an_error(parcels: dict[str, Any]) -> None:
    import ray

    class Holder:
        def ping(self) -> None:
            pass

    held = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(4)]
    ray.get([holder.ping.remote() for holder in held])
    try:
        with pytest.raises(ClusterError, match="the cluster was busy for 1 s"):
            _train({**parcels, "train": {"workers": 1, "cpus_per_worker": 1, "wait_s": 1}})
    finally:
        for holder in held:
            ray.kill(holder)
