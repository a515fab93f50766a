"""Layouts of files and workers that make other trainers wrong without an error: here each gives the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn import metrics as sk

from claydist.dataset.reader import read_pieces
from claydist.errors import DataError
from claydist.predictor import Predictor
from tests.checks import Training, evaluate_by_file, part_table, train_here
from tests.tables import CITIES, cut, make_table, spec_of, write_files

pytestmark = pytest.mark.ray

KINDS: dict[str, dict[str, Any]] = {
    "xgboost": {"kind": "xgboost", "rounds": 8, "params": {"max_depth": 3}},
    "linear": {"kind": "linear"},
}


def coarse_table(seed: int = 0, n_rows: int = 480) -> pa.Table:
    """Numbers of few values: then the quantile cuts do not depend on how rows are spread over workers."""
    table = make_table(seed, n_rows).drop_columns(["sent"])
    for name in ("km", "kg"):
        rounded = pc.divide(pc.round(pc.multiply(table.column(name).cast(pa.float64()), 0.1)), 0.1)
        table = table.set_column(table.column_names.index(name), name, rounded)
    return table


def by_city(table: pa.Table) -> list[pa.Table]:
    """One table for each city, and one of the rows without."""
    return [table.filter(pc.equal(table.column("city"), name)) for name in CITIES] + [
        table.filter(pc.is_null(table.column("city")))
    ]


def other_orders(table: pa.Table) -> list[pa.Table]:
    """Three files, each with its columns in another order."""
    rng = np.random.default_rng(1)
    return [piece.select(rng.permutation(piece.column_names).tolist()) for piece in cut(table, 3)]


def with_empty_files(table: pa.Table) -> list[pa.Table]:
    """Files of rows between files that have a schema and no row."""
    one, two = cut(table, 2)
    return [table.slice(0, 0), one, table.slice(0, 0), two, table.slice(0, 0)]


LAYOUTS: dict[str, Callable[[pa.Table], Sequence[pa.Table]]] = {
    "disjoint categories": by_city,
    "other column orders": other_orders,
    "16 files": lambda table: cut(table, 16),
    "one file": lambda table: [table],
    "empty files among others": with_empty_files,
    "one large file and small ones": lambda table: [*cut(table.slice(0, 9), 9), table.slice(9)],
}


def check_every_row_once(trained: Training, whole: pa.Table) -> None:
    """The shards of all parts hold each row of the table exactly once, and no worker is without rows."""
    found: list[int] = []
    for name, part in trained.prepared.parts.items():
        shards = trained.job.shards.get(name)
        if shards is None:
            found += part_table(part, ["row"]).column("row").to_pylist()
            continue
        sizes = []
        for shard in shards:
            tables = read_pieces(part.inventory, shard.pieces, ["row"], part.selection)
            rows = [n for table in tables for n in table["row"].to_pylist()]
            assert len(rows) == shard.n_rows
            found += rows
            sizes.append(len(rows))
        if name == "train":
            assert len(sizes) == trained.job.n_workers
            assert min(sizes) > 0
    assert sorted(found) == sorted(whole.column("row").to_pylist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_workers_learn_what_one_learns_from_one_file(
    layout: str, kind: str, ray_cluster: None, tmp_path: Path
) -> None:
    table = coarse_table()
    # The split goes by the row's own number, so that it is the same however the rows lie in files.
    split = {"valid": {"fraction": 0.1}, "test": {"fraction": 0.2}}
    files = {"one": [table], "many": list(LAYOUTS[layout](table))}
    answers = {}
    for name, n_workers in (("one", 1), ("many", 3)):
        path = write_files(tmp_path / name, files[name])
        trained = train_here(spec_of(path, tmp_path, model=KINDS[kind], split=split, data__key=["row"]),
                             tmp_path, n_workers)  # fmt: skip
        assert trained.job.n_workers == n_workers
        check_every_row_once(trained, table)
        vocabulary = next(f.vocabulary for f in trained.predictor.plan.features if f.name == "city")
        assert vocabulary == tuple(sorted(CITIES))
        answers[name] = trained.predictor.predict(table).column("probability").to_numpy()
    assert np.ptp(answers["one"]) > 0.1
    tolerance = 1e-5 if kind == "xgboost" else 1e-7
    assert np.allclose(answers["many"], answers["one"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_are_trained_on_by_two_workers_of_three(kind: str, ray_cluster: None, tmp_path: Path) -> None:
    table = pa.table({"row": [0, 1], "km": [1.0, 2.0], "late": [0, 1]})
    trained = train_here(
        spec_of(write_files(tmp_path / "d", [table]), tmp_path, model=KINDS[kind], data__drop=["row"]), tmp_path, 3
    )
    assert trained.job.n_workers == 2
    check_every_row_once(trained, table)
    low, high = trained.predictor.predict(table).column("probability").to_pylist()
    assert low <= high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_workers", [1, 3])
def test_each_category_beyond_ascii_keeps_its_own_effect(
    kind: str, n_workers: int, ray_cluster: None, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    city = rng.choice(len(CITIES), 900)
    table = pa.table({"city": np.array(CITIES)[city], "hours": 10.0 * city + rng.normal(size=900)})
    model = {**KINDS[kind], **({"rounds": 60, "params": {"eta": 0.5}} if kind == "xgboost" else {})}
    path = write_files(tmp_path / "d", by_city(table))
    trained = train_here(spec_of(path, tmp_path, "hours", model=model, data__drop=[]), tmp_path, n_workers)
    loaded = Predictor.from_files(trained.predictor.to_files())
    asked = pa.table({"city": list(CITIES)})
    found = loaded.predict(asked).column("prediction").to_numpy()
    means = [table.filter(pc.equal(table.column("city"), name)).column("hours").to_numpy().mean() for name in CITIES]
    assert np.allclose(found, means, atol=0.2)
    assert loaded.predict(asked) == trained.predictor.predict(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unseen_category_is_missing_other_or_an_error(kind: str, ray_cluster: None, tmp_path: Path) -> None:
    path = write_files(tmp_path / "d", cut(coarse_table(), 2))
    row = coarse_table(1, 1)
    unseen, null = (row.set_column(row.column_names.index("city"), "city", pa.array([c], pa.string()))
                    for c in ("Újezd", None))  # fmt: skip
    made = {
        policy: train_here(spec_of(path, tmp_path, model=KINDS[kind], data__unseen=policy), tmp_path, 2).predictor
        for policy in ("missing", "other", "error")
    }
    assert made["missing"].predict(unseen) == made["missing"].predict(null)
    assert made["missing"].predict_arrays(unseen).unseen == {"city": 1}
    assert made["other"].predict_arrays(unseen).unseen == {"city": 1}
    city = next(f for f in made["other"].plan.features if f.name == "city")
    assert made["other"].plan.encode(unseen).columns[made["other"].plan.features.index(city)] == [len(CITIES)]
    with pytest.raises(DataError, match="'city' holds 1 values not seen in training, the first is 'Újezd'"):
        made["error"].predict(unseen)


ODD_NAMES = {"km": "km[usd]<x>", "kg": "日本 x", "city": "a\"b'c"}


@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_a_column_may_have_any_name(kind: str, ray_cluster: None, tmp_path: Path) -> None:
    plain = coarse_table()
    odd = plain.rename_columns([ODD_NAMES.get(name, name) for name in plain.column_names])
    answers = []
    for name, table in (("plain", plain), ("odd", odd)):
        path = write_files(tmp_path / name, cut(table, 2))
        trained = train_here(spec_of(path, tmp_path, model=KINDS[kind]), tmp_path, 2)
        loaded = Predictor.from_files(trained.predictor.to_files())
        answers.append(loaded.predict(table))
        assert len(loaded.model.importance(loaded.plan)) >= 4
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """Six files; 98 % of the rows that are late lie in the first, which has hardly any other."""
    table = make_table(11, 4000)
    late = table.filter(pc.equal(table.column("late"), 1))
    rest = table.filter(pc.equal(table.column("late"), 0))
    n = round(0.98 * late.num_rows)
    files = [pa.concat_tables([late.slice(0, n), rest.slice(0, 5)])]
    files += [pa.concat_tables([a, b]) for a, b in zip(cut(rest.slice(5), 5), cut(late.slice(n), 5), strict=True)]
    assert sum(sum(f.column("late").to_pylist()) > 0.9 * late.num_rows for f in files) == 1
    return write_files(tmp_path_factory.mktemp("skewed"), files), pa.concat_tables(files)


@pytest.mark.parametrize("weight", [None, "w"])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_skewed_shards_equal_those_of_the_union(
    kind: str, weight: str | None, skewed: tuple[Path, pa.Table], ray_cluster: None, tmp_path: Path
) -> None:
    path, table = skewed
    spec = spec_of(path, tmp_path, model=KINDS[kind])
    spec["data"]["weight"] = weight
    trained = train_here(spec, tmp_path, 3)
    found = evaluate_by_file(
        trained.predictor, trained.prepared.parts["train"], weight=weight, slices=("km > 100",),
        prior=trained.prepared.prior,
    )  # fmt: skip
    assert found.n_rows == table.num_rows
    y, w = table.column("late").to_numpy(), table.column(weight).to_numpy() if weight else None
    p = trained.predictor.predict(table).column("probability").to_numpy().astype(np.float64)
    check_binary(found.metrics, y, p, w)
    here = pc.fill_null(pc.greater(table.column("km"), 100), False).to_numpy()
    check_binary(found.slices["km > 100"], y[here], p[here], w[here] if weight else None)
    constant = np.full(len(y), np.average(y, weights=w))
    assert found.baseline is not None
    assert found.baseline.values()["logloss"] == pytest.approx(sk.log_loss(y, constant, sample_weight=w), rel=1e-9)
    assert found.baseline.values()["auc"] == 0.5


def check_binary(found: Any, y: np.ndarray, p: np.ndarray, w: np.ndarray | None) -> None:
    expected = {
        "auc": sk.roc_auc_score(y, p, sample_weight=w),
        "average_precision": sk.average_precision_score(y, p, sample_weight=w),
        "logloss": sk.log_loss(y, p, sample_weight=w),
        "brier": sk.brier_score_loss(y, p, sample_weight=w),
        "accuracy": sk.accuracy_score(y, p >= 0.5, sample_weight=w),
        "f1": sk.f1_score(y, p >= 0.5, sample_weight=w),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_errors_of_skewed_shards_equal_those_of_the_union(
    skewed: tuple[Path, pa.Table], ray_cluster: None, tmp_path: Path
) -> None:
    path, table = skewed
    spec = spec_of(path, tmp_path, "hours", model=KINDS["xgboost"])
    spec["data"]["weight"] = "w"
    trained = train_here(spec, tmp_path, 3)
    found = evaluate_by_file(trained.predictor, trained.prepared.parts["train"], weight="w").metrics
    y, w = table.column("hours").to_numpy(), table.column("w").to_numpy()
    p = trained.predictor.predict(table).column("prediction").to_numpy().astype(np.float64)
    expected = {
        "rmse": sk.root_mean_squared_error(y, p, sample_weight=w),
        "mae": sk.mean_absolute_error(y, p, sample_weight=w),
        "r2": sk.r2_score(y, p, sample_weight=w),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
