from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xgboost as xgb

from claydist.dataset.statistics import column_sums
from claydist.errors import BundleError, DataError
from claydist.features import build_plan
from claydist.models import LinearModel, XGBoostModel
from claydist.models.boosted import booster_params
from claydist.predictor import FEATURES_FILE, Predictor, Target
from claydist.schema import Column, Schema, column_of
from claydist.spec import DataSpec, XGBoostSpec

N = 100
TARGETS = {
    "binary": Target("binary", "y", ("no", "yes")),
    "above": Target("binary", "y", (False, True), above=15.0),
    "integers": Target("binary", "y", (1, 0)),
    "multiclass": Target("multiclass", "y", ("Fair", "Très bon", "上")),
    "many": Target("multiclass", "y", tuple(range(11))),
    "regression": Target("regression", "y"),
    "quantiles": Target("regression", "y", quantiles=(0.05, 0.5, 0.9)),
    "ranking": Target("ranking", "y"),
}
LOSSES = {"binary": "logistic", "above": "logistic", "multiclass": "multinomial", "many": "multinomial",
          "regression": "poisson"}  # fmt: skip
BOOSTED = [*TARGETS, "dart", "offset"]
LINEAR = [*LOSSES, "squared", "offset"]
CASES = [*(("xgboost", case) for case in BOOSTED), *(("linear", case) for case in LINEAR)]


def rows(n_rows: int = N, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    null = rng.random((n_rows, 5)) < 0.1
    cities = np.array(["Praha", "Zürich", "東京", "a", *(f"c{i}" for i in range(80))])
    return pa.table({
        "km": pa.array(rng.gamma(2, 50, n_rows), mask=null[:, 0]),
        "n": pa.array(rng.integers(0, 50, n_rows), mask=null[:, 1]),
        "city": pa.array(cities[rng.integers(0, 84, n_rows)], mask=null[:, 2]),
        "at": pa.array(rng.integers(0, 10**9, n_rows), mask=null[:, 3]).cast(pa.timestamp("s", "UTC")),
        "flag": pa.array(rng.random(n_rows) < 0.5, mask=null[:, 4]),
        "width": pa.array(rng.normal(size=n_rows).astype(np.float32)),
        "base": pa.array(rng.normal(size=n_rows)),
    })  # fmt: skip


@cache
def predictor(kind: str, case: str, unseen: str = "missing") -> Predictor:
    """A predictor over `rows`, with a model that is trained a little or has random coefficients."""
    table = rows()
    offset = "base" if case == "offset" else None
    target = TARGETS.get(case, TARGETS["binary" if case in ("dart", "offset") else "regression"])
    names = [name for name in table.column_names if name != "base"]
    columns = tuple(column_of(table.schema.field(name), "x") for name in names)
    schema = Schema((*columns, *([Column("base", "float")] if offset else [])))
    data = DataSpec(path="x", label="y", unseen=unseen, calendar={"at": ["hour", "month"]})
    # Some of the cities are not seen in training.
    profiles = {c.name: column_sums(c, table.slice(0, 100).column(c.name), None, data).profile() for c in columns}
    plan = build_plan(data, schema, profiles, missing_indicator=kind == "linear")
    rng = np.random.default_rng(1)
    if kind == "linear":
        n_outputs = len(target.classes) if target.task == "multiclass" else 1
        coef = rng.normal(0, 0.3, (n_outputs, plan.n_dense + plan.n_onehot))
        loss = LOSSES.get(case, "squared" if case == "squared" else "logistic")
        return Predictor(plan, LinearModel(coef, rng.normal(size=n_outputs), loss, plan.n_dense), target, offset)
    model = XGBoostSpec(kind="xgboost", params={"max_depth": 4}, quantiles=target.quantiles)
    params = booster_params(model, target.task, plan, len(target.classes), 1)
    params |= {"booster": "dart", "rate_drop": 0.3} if case == "dart" else {}
    X = plan.tree_matrix(plan.encode(table))
    high = {"binary": 2, "multiclass": len(target.classes)}.get(target.task, 5)
    group = {"qid": np.arange(N) // 10} if target.task == "ranking" else {}
    Xy = xgb.QuantileDMatrix(
        X, rng.integers(0, high, N), feature_names=plan.names, feature_types=plan.kinds, enable_categorical=True,
        nthread=1, **group,
    )  # fmt: skip
    return Predictor(plan, XGBoostModel(bytes(xgb.train(params, Xy, 8).save_raw("ubj")), target.task), target, offset)


def bits(table: pa.Table) -> list[bytes]:
    """The bytes of each row of a prediction."""
    columns = [[str(v).encode() for v in c.to_pylist()] if c.type in (pa.string(), pa.bool_())
               else [v.tobytes() for v in c.to_numpy()] for c in table.columns]  # fmt: skip
    return [b"|".join(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(("case", "names", "labels"), [
    ("binary", ["prediction", "probability"], pa.string()), ("above", ["prediction", "probability"], pa.bool_()),
    ("integers", ["prediction", "probability"], pa.int64()),
    ("multiclass", ["prediction", "probability_Fair", "probability_Très bon", "probability_上"], pa.string()),
    ("regression", ["prediction"], None), ("ranking", ["score"], None),
    ("quantiles", ["prediction_0.05", "prediction_0.5", "prediction_0.9"], None),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_columns_of_a_prediction(kind: str, case: str, names: list[str], labels: pa.DataType | None) -> None:
    if (kind, case) not in CASES:
        pytest.skip("linear models have no such task")
    found = predictor(kind, case).predict(rows())
    number = pa.float32() if kind == "xgboost" else pa.float64()
    assert found.column_names == names == TARGETS[case].output_columns
    assert [c.type for c in found.columns] == ([labels] if labels else []) + [number] * (len(names) - bool(labels))
    assert found.num_rows == N
    assert all(column.null_count == 0 for column in found.columns)


def test_labels_are_those_of_the_data() -> None:
    for case in ("binary", "above", "integers"):
        found = predictor("xgboost", case).predict(rows()).to_pydict()
        negative, positive = TARGETS[case].classes
        expected = [positive if p >= 0.5 else negative for p in found["probability"]]
        assert found["prediction"] == expected
        assert len(set(map(str, expected))) == 2
    for kind in ("xgboost", "linear"):
        found = predictor(kind, "multiclass").predict(rows()).to_pydict()
        shares = np.stack([found[name] for name in list(found)[1:]], axis=1)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
        assert found["prediction"] == [TARGETS["multiclass"].classes[k] for k in shares.argmax(axis=1)]


def test_one_score_a_row() -> None:
    values = np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]])
    np.testing.assert_array_equal(TARGETS["multiclass"].score(values), [0.5, 0.9])
    np.testing.assert_array_equal(TARGETS["quantiles"].score(values), [0.5, 0.05])
    np.testing.assert_array_equal(TARGETS["binary"].score(values[:, 0]), [0.2, 0.9])


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kind: str, case: str) -> None:
    model, table = predictor(kind, case), rows()
    whole = bits(model.predict(table))
    for size in range(1, 71):
        found = [b for start in range(0, N, size) for b in bits(model.predict(table.slice(start, size)))]
        assert found == whole, f"batches of {size}"


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_row_has_the_same_bits_in_any_order_and_any_company(kind: str, case: str) -> None:
    model, table = predictor(kind, case), rows()
    whole = np.array(bits(model.predict(table)), object)
    rng = np.random.default_rng(2)
    for _ in range(20):
        order = rng.integers(0, N, rng.integers(1, 400))
        assert bits(model.predict(table.take(order))) == whole[order].tolist()
    big = np.tile(np.arange(N), 60)
    assert bits(model.predict(table.take(big))) == whole[big].tolist()


@pytest.mark.parametrize(("kind", "case"), [("xgboost", "multiclass"), ("xgboost", "dart"), ("linear", "multiclass")])
def test_threads_do_not_change_a_bit(kind: str, case: str) -> None:
    model = Predictor.from_files(predictor(kind, case).to_files())
    table = rows(1500, seed=5)
    whole = bits(model.predict(table))
    for n_threads in (2, 3):
        model.model.set_threads(n_threads)
        assert bits(model.predict(table)) == whole
        assert [b for i in range(0, 1500, 300) for b in bits(model.predict(table.slice(i, 300)))] == whole


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_saved_is_loaded(kind: str, case: str) -> None:
    model, table = predictor(kind, case), rows(seed=3)
    again = Predictor.from_files(json_files(model.to_files()))
    assert again.target == model.target
    assert (again.plan, again.offset, again.schema, again.task) == (model.plan, model.offset, model.schema, model.task)
    assert bits(again.predict(table)) == bits(model.predict(table))
    assert again.to_files()[FEATURES_FILE] == model.to_files()[FEATURES_FILE]
    assert again.predict(table).schema == model.predict(table).schema


def json_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files as another program might have written the same JSON."""
    return {**files, FEATURES_FILE: json.dumps(json.loads(files[FEATURES_FILE])).encode()}


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_order_of_columns_and_further_columns_do_not_matter(kind: str, case: str) -> None:
    model, table = predictor(kind, case), rows()
    whole = bits(model.predict(table))
    turned = table.select(table.column_names[::-1]).append_column("more", pa.array([[1]] * N))
    assert bits(model.predict(turned)) == whole
    chunked = pa.concat_tables([table.slice(i, 9) for i in range(0, N, 9)])
    assert bits(model.predict(chunked)) == whole
    coded = table.set_column(2, "city", table.column("city").dictionary_encode())
    assert bits(model.predict(coded)) == whole


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_pandas_is_arrow(kind: str, case: str) -> None:
    model, table = predictor(kind, case), rows()
    whole = bits(model.predict(table))
    frame = table.to_pandas()  # integers and booleans with nulls become floats and objects
    assert frame["n"].dtype == np.float64
    assert bits(model.predict(frame)) == whole
    assert bits(model.predict(frame.set_index(pd.Index(range(5, N + 5), name="km_index")))) == whole
    frame["city"] = frame["city"].astype("category")
    assert bits(model.predict(frame)) == whole
    order = np.random.default_rng(0).permutation(N)
    assert bits(model.predict(frame.iloc[order])) == [whole[i] for i in order]


@pytest.mark.parametrize(("kind", "case"), [("xgboost", "binary"), ("xgboost", "many"), ("linear", "many")])
def test_no_rows_give_no_rows(kind: str, case: str) -> None:
    found = predictor(kind, case).predict(rows().slice(0, 0))
    assert (found.num_rows, found.column_names) == (0, TARGETS[case].output_columns)
    assert found.schema == predictor(kind, case).predict(rows()).schema


@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_nulls_in_every_feature_still_predict(kind: str) -> None:
    table = pa.table({name: pa.nulls(2) for name in rows().column_names})
    found = predictor(kind, "binary").predict(table).column("probability").to_numpy()
    assert np.isfinite(found).all()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_offset_moves_the_margin_and_must_be_there(kind: str) -> None:
    model, table = predictor(kind, "offset"), rows()
    moved = table.set_column(6, "base", pa.array(np.full(N, 50.0)))
    np.testing.assert_allclose(model.predict(moved).column("probability").to_numpy(), 1.0, atol=1e-6)
    with pytest.raises(DataError, match="does not fit the model's schema") as caught:
        model.predict(table.drop_columns(["base"]))
    assert "column 'base' is absent" in str(caught.value)


@pytest.mark.parametrize("kind", ["xgboost", "linear"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_offset_must_be_a_number(kind: str, value: float | None) -> None:
    table = rows().set_column(6, "base", pa.array([value] + [0.0] * (N - 1)))
    with pytest.raises(DataError, match="offset column 'base' has 1 values in the table that are null or infinite"):
        predictor(kind, "offset").predict(table)
    ((reason, mask),) = predictor(kind, "offset").bad_rows(table).items()
    assert (reason, mask.tolist()) == ("null or infinite offset in 'base'", [True] + [False] * (N - 1))
    assert predictor(kind, "offset").bad_rows(rows()) == predictor(kind, "binary").bad_rows(table) == {}


@pytest.mark.parametrize("kind", ["xgboost", "linear"])
def test_errors_name_the_columns(kind: str) -> None:
    table = rows()
    with pytest.raises(DataError, match=r"jobs\.parquet does not fit the model's schema") as caught:
        predictor(kind, "binary").predict(table.rename_columns(["KM", *table.column_names[1:]]), "jobs.parquet")
    assert caught.value.problems == ("column 'km' is absent; did you mean 'KM'?",)
    wrong = table.set_column(0, "km", pa.array(["1"] * N)).drop_columns(["city"])
    with pytest.raises(DataError, match="column 'km': expected float, found string") as caught:
        predictor(kind, "binary").predict(wrong)
    assert len(caught.value.problems) == 2
    infinite = table.set_column(0, "km", pa.array([1.0] * (N - 1) + [np.inf]))
    with pytest.raises(DataError, match="column 'km' holds 1 infinite values"):
        predictor(kind, "binary").predict(infinite)
    city = table.set_column(2, "city", pa.array(["nowhere"] * N))
    with pytest.raises(DataError, match="column 'city' holds 3 values not seen in training, the first is 'nowhere'"):
        predictor("linear", "binary", "error").predict(city.slice(0, 3))


def test_unseen_categories_are_counted() -> None:
    city = rows().set_column(2, "city", pa.array(["nowhere", None] * (N // 2)))
    for unseen in ("missing", "other"):
        assert predictor("xgboost", "binary", unseen).predict_arrays(city).unseen == {"city": N // 2}


@pytest.mark.parametrize("damage", [
    lambda files: files.pop(FEATURES_FILE), lambda files: files.update({FEATURES_FILE: b"{"}),
    lambda files: files.update({FEATURES_FILE: b"[]"}), lambda files: files.pop("model.ubj"),
    lambda files: files.update({FEATURES_FILE: files[FEATURES_FILE].replace(b'"xgboost"', b'"forest"')}),
    lambda files: files.update({FEATURES_FILE: files[FEATURES_FILE].replace(b'"vocabulary"', b'"words"')}),
    lambda files: files.update({FEATURES_FILE: b"\xff\xfe"}), lambda files: files.update({"model.ubj": b""}),
])  # fmt: skip
def test_damaged_files_are_a_bundle_error(damage: Any) -> None:
    files = predictor("xgboost", "binary").to_files()
    damage(files)
    with pytest.raises(BundleError):
        Predictor.from_files(files)
