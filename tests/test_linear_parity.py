"""Linear models of 1, 2 and 3 workers against scikit-learn on the same rows. `pytest -s` shows the differences.

The reference shares no code with claydist's features: it imputes, standardises and one-hot encodes by numpy alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, PoissonRegressor, Ridge

from claydist.models import LinearModel
from tests.checks import part_table, relative_difference, train_here
from tests.tables import cut, make_table, spec_of, write_files

pytestmark = pytest.mark.ray

TOLERANCE = 1e-6
WORKERS = (1, 2, 3)
FLIGHTS = ["day", "sched_dep_time", "distance", "hour", "flight", "carrier", "origin", "dest"]
Fit = Callable[[np.ndarray, pd.Series, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One loss and penalty on one table; `fit(Z, y, w)` gives the reference's coefficients and intercepts."""

    name: str
    table: str
    label: Any
    model: Mapping[str, Any]
    fit: Fit
    data: Mapping[str, Any] = field(default_factory=dict)
    weight: str | None = None

    def spec(self, path: Path, registry: Path) -> dict[str, Any]:
        data = {f"data__{key}": value for key, value in self.data.items()}
        tree = spec_of(path, registry, self.label, model={"kind": "linear", **self.model}, **data)
        if self.weight:
            tree["data"]["weight"] = self.weight
        return tree


def logistic(C: float) -> Fit:
    def fit(Z: np.ndarray, y: pd.Series, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=200).fit(Z, y, w)
        return m.coef_, m.intercept_

    return fit


def multinomial(C: float) -> Fit:
    def fit(Z: np.ndarray, y: pd.Series, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coef, intercept = logistic(C)(Z, y, w)
        # Softmax is the same when all intercepts move alike: compare them about their mean.
        return coef, intercept - intercept.mean()

    return fit


def ridge(alpha: float) -> Fit:
    def fit(Z: np.ndarray, y: pd.Series, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = Ridge(alpha=alpha, solver="cholesky").fit(Z, y, w)
        return m.coef_[None], np.atleast_1d(m.intercept_)

    return fit


def poisson(l2: float) -> Fit:
    def fit(Z: np.ndarray, y: pd.Series, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m = PoissonRegressor(alpha=l2 / w.sum(), solver="newton-cholesky", tol=1e-12, max_iter=200).fit(Z, y, w)
        return m.coef_[None], np.atleast_1d(m.intercept_)

    return fit


def elastic_net(l1: float, l2: float) -> Fit:
    def fit(Z: np.ndarray, y: pd.Series, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given: dict[str, Any] = {"tol": 1e-13, "max_iter": 100_000}
        alpha = (l1 + l2) / w.sum()
        m = ElasticNet(alpha=alpha, l1_ratio=l1 / (l1 + l2), **given) if l2 else Lasso(alpha=alpha, **given)
        m.fit(np.asfortranarray(Z), y, w)
        return m.coef_[None], np.atleast_1d(m.intercept_)

    return fit


CASES = [
    Case("logistic, C=1", "flights", {"column": "arr_delay", "above": 15}, {}, logistic(1.0),
         {"drop": [], "features": FLIGHTS, "where": "arr_delay is not null and month = 1"}),
    Case("logistic, C=0.01, weights", "flights", {"column": "arr_delay", "above": 15}, {"l2": 100.0}, logistic(0.01),
         {"drop": [], "features": ["sched_dep_time", "hour", "carrier", "origin"],
          "where": "arr_delay is not null and month <= 2"}, weight="distance"),
    Case("ridge, alpha=1", "diamonds", "price", {}, ridge(1.0), {"drop": []}),
    Case("ridge, alpha=50, weights", "diamonds", "price", {"l2": 50.0}, ridge(50.0), {"drop": []}, weight="depth"),
    Case("multinomial, C=1", "diamonds", "cut", {}, multinomial(1.0), {"drop": []}),
    Case("multinomial, C=0.1, weights", "made", "city", {"l2": 10.0}, multinomial(0.1),
         {"drop": ["row", "late", "hours", "sent"], "where": "city is not null"}, weight="w"),
    Case("poisson, alpha=1/n", "bikes", "cnt", {"loss": "poisson"}, poisson(1.0),
         {"drop": ["instant", "casual", "registered", "atemp", "dteday", "datetime"],
          "types": dict.fromkeys(("season", "mnth", "hr", "weekday", "weathersit"), "category")}),
    Case("poisson, alpha=30/sum w, weights", "made", "parcels", {"loss": "poisson", "l2": 30.0}, poisson(30.0),
         {"drop": ["row", "late", "hours"]}, weight="w"),
    # Numbers alone: one-hot columns add up to the intercept, and then the lasso has many equal minima.
    Case("lasso, alpha=20", "diamonds", "price", {"l1": 20.0 * 53_940, "l2": 0.0}, elastic_net(20.0 * 53_940, 0.0),
         {"drop": [], "features": ["carat", "depth", "table", "x", "y", "z"]}),
    Case("elastic net, weights", "diamonds", "price", {"l1": 9e4, "l2": 3e4}, elastic_net(9e4, 3e4), {"drop": []},
         weight="carat"),
    Case("logistic, nulls, weights", "made", "late", {"l2": 0.5}, logistic(2.0), {"drop": ["row", "hours", "parcels"]},
         weight="w"),
    Case("ridge, missing indicator", "made", "hours", {"missing_indicator": True}, ridge(1.0),
         {"drop": ["row", "w", "late", "parcels"]}),
    Case("ridge by l-bfgs", "made", "hours", {"solver": "lbfgs", "tolerance": 1e-10}, ridge(1.0),
         {"drop": ["row", "w", "late", "parcels"]}),
]  # fmt: skip


@pytest.fixture(scope="module")
def differences() -> Iterator[list[tuple[str, int, float, float]]]:
    """Rows of the table that is printed at the end."""
    rows: list[tuple[str, int, float, float]] = []
    yield rows
    print(f"\n{'case':36}  workers  coefficients  predictions   (largest relative difference)")
    for name, n_workers, coef, prediction in rows:
        print(f"{name:36}  {n_workers:7}  {coef:12.1e}  {prediction:11.1e}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of one made table, of very different sizes."""
    table = make_table(3, 3000)
    return write_files(tmp_path_factory.mktemp("made"), [*cut(table.slice(0, 300), 6), table.slice(300)])


def path_of(table: str, made: Path, request: pytest.FixtureRequest) -> Path:
    if table == "made":
        return made
    folders = {"flights": "flights13", "diamonds": "diamonds", "bikes": "bike_sharing"}
    return Path(request.getfixturevalue("shared_data")) / folders[table]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scikit_learn_gives_the_same_coefficients(
    case: Case, ray_cluster: None, made: Path, tmp_path: Path, request: pytest.FixtureRequest, differences: list[Any]
) -> None:
    spec = case.spec(path_of(case.table, made, request), tmp_path)
    reference = None
    for n_workers in WORKERS:
        trained = train_here(spec, tmp_path, n_workers)
        assert trained.job.n_workers == n_workers
        assert trained.outcome["converged"]
        model = trained.predictor.model
        assert isinstance(model, LinearModel)
        if reference is None:
            table = part_table(trained.prepared.parts["train"], trained.prepared.roles.columns)
            reference = fit_reference(case, table, model.coef.shape[1])
        expected, Z = reference
        intercept = model.intercept - (model.intercept.mean() if len(model.intercept) > 1 else 0.0)
        coef = relative_difference(np.c_[model.coef, intercept], expected)
        raw = model.raw(*encoded(trained.predictor, table))
        raw -= raw.mean(axis=1, keepdims=True) if raw.shape[1] > 1 else 0.0
        prediction = relative_difference(raw, predicted(expected, Z))
        differences.append((case.name, n_workers, coef, prediction))
        assert coef < TOLERANCE, n_workers
        assert prediction < TOLERANCE, n_workers
        if case.model.get("l1"):
            assert np.array_equal(model.coef == 0, expected[:, :-1] == 0), "another set of features"


def fit_reference(case: Case, table: pa.Table, n_coef: int) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of scikit-learn, the intercept last, and the matrix they belong to."""
    frame = table.to_pandas()
    w = frame[case.weight].to_numpy(np.float64) if case.weight else np.ones(len(frame))
    column = case.label["column"] if isinstance(case.label, Mapping) else case.label
    y = frame[column]
    if isinstance(case.label, Mapping):
        y = (y > case.label["above"]).astype(int)
    given = frame.drop(columns=[column] + ([case.weight] if case.weight else []))
    kinds = case.data.get("types", {})
    Z = design(given, {name for name in given if kinds.get(name) == "category"}, w,
               indicator=bool(case.model.get("missing_indicator")))  # fmt: skip
    assert Z.shape[1] == n_coef
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tolerances that the machine cannot reach
        coef, intercept = case.fit(Z, y, w)
    return np.c_[coef, intercept], Z


def design(frame: pd.DataFrame, declared: set[str], w: np.ndarray, *, indicator: bool) -> np.ndarray:
    """Standardised numbers, indicators of missing ones, then one-hot categories; all in the table's order."""
    numbers, missing, onehot = [], [], []
    for name, column in frame.items():
        if name in declared or not (pd.api.types.is_numeric_dtype(column) or "datetime" in str(column.dtype)):
            text = column.astype("string")
            onehot += [(text == value).fillna(False).to_numpy(float) for value in sorted(text.dropna().unique())]
            continue
        if "datetime" in str(column.dtype):
            column = (column - column.min()).dt.total_seconds()
        x = column.to_numpy(np.float64, na_value=np.nan)
        there = ~np.isnan(x)
        mean = np.average(x[there], weights=w[there])
        scale = np.sqrt(np.average((x[there] - mean) ** 2, weights=w[there]))
        numbers.append(np.where(there, x - mean, 0.0) / (scale or 1.0))
        if indicator and not there.all():
            missing.append((~there).astype(float))
    return np.column_stack([*numbers, *missing, *onehot])


def encoded(predictor: Any, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    rows = predictor.plan.encode(table)
    return predictor.plan.dense(rows), predictor.plan.onehot(rows)


def predicted(coef: np.ndarray, Z: np.ndarray) -> np.ndarray:
    raw = Z @ coef[:, :-1].T + coef[:, -1]
    return raw - raw.mean(axis=1, keepdims=True) if len(coef) > 1 else raw


@pytest.mark.parametrize("n_workers", WORKERS)
def test_an_offset_is_exposure_of_a_poisson_model(
    n_workers: int, ray_cluster: None, tmp_path: Path, differences: list[Any]
) -> None:
    # y ~ Poisson(exp(o + z)) is y / exp(o) ~ Poisson(exp(z)) / exp(o) with weight exp(o).
    table = make_table(5, 1500)
    rng = np.random.default_rng(6)
    offset = rng.normal(0, 0.4, table.num_rows)
    table = table.append_column("o", pa.array(offset))
    write_files(tmp_path / "d", cut(table, 4))
    spec = spec_of(tmp_path / "d", tmp_path, "parcels", model={"kind": "linear", "loss": "poisson", "l2": 2.0},
                   data__offset="o", data__drop=["row", "w", "late", "hours", "sent"])  # fmt: skip
    trained = train_here(spec, tmp_path, n_workers)
    frame = table.to_pandas()
    Z = design(frame[["km", "kg", "city", "express"]], set(), np.ones(len(frame)), indicator=False)
    w = np.exp(offset)
    coef, intercept = poisson(2.0)(Z, frame["parcels"] / w, w)
    model = trained.predictor.model
    assert isinstance(model, LinearModel)
    difference = relative_difference(np.c_[model.coef, model.intercept], np.c_[coef, intercept])
    found = trained.predictor.predict(table).column("prediction").to_numpy()
    expected = np.exp(Z @ coef[0] + intercept[0] + offset)
    differences.append(("poisson, offset", n_workers, difference, relative_difference(found, expected)))
    assert difference < TOLERANCE
    assert np.allclose(found, expected, rtol=TOLERANCE)


def test_lasso_of_standardised_features_is_reported_for_the_original_ones_too(
    ray_cluster: None, tmp_path: Path
) -> None:
    write_files(tmp_path / "d", cut(make_table(8, 800), 3))
    spec = spec_of(tmp_path / "d", tmp_path, "hours", model={"kind": "linear", "l1": 20.0},
                   data__features=["km", "kg", "express"], data__drop=[], data__where="km is not null")  # fmt: skip
    trained = train_here(spec, tmp_path, 2)
    model = trained.predictor.model
    assert isinstance(model, LinearModel)
    rows = {row["feature"]: row["original"] for row in model.importance(trained.predictor.plan)}
    table = part_table(trained.prepared.parts["train"], ["km", "kg", "express"])
    by_hand = rows["(intercept)"] + sum(
        rows[name] * table.column(name).cast(pa.float64()).to_numpy() for name in table.column_names
    )
    found = trained.predictor.predict(table).column("prediction").to_numpy()
    assert np.allclose(found, by_hand, rtol=1e-12)
