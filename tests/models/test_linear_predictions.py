from __future__ import annotations

import io

import numpy as np
import pytest
from workers import make_rows

from claydist.errors import DataError
from claydist.models import linear
from claydist.models.linear import LinearModel
from claydist.models.losses import LOSSES

N_OUTPUTS = {"squared": 1, "logistic": 1, "poisson": 1, "multinomial": 3}


def some_model(loss: str, n_dense: int = 28, n_onehot: int = 12) -> LinearModel:
    rng = np.random.default_rng(11)
    coef = rng.normal(size=(N_OUTPUTS[loss], n_dense + n_onehot))
    return LinearModel(coef, rng.normal(size=N_OUTPUTS[loss]), loss, n_dense)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_prediction_of_a_row_has_the_same_bits_in_every_batch(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = some_model(loss), np.random.default_rng(12)
    X, codes = rng.normal(size=(300, 28)), rng.integers(-1, 12, size=(300, 3)).astype(np.int32)
    offset = rng.normal(size=300)
    whole = model.raw(X, codes, offset)
    means = model.mean(whole)
    wide = np.repeat(np.asfortranarray(X), 2, axis=1)[:, ::2]
    for n_rows in [*range(1, 68), 299, 300]:
        for start in (0, 1, 7):
            rows = slice(start, start + n_rows)
            for matrix in (X[rows], np.asfortranarray(X[rows]), wide[rows], np.repeat(X, 2, axis=0)[::2][rows]):
                raw = model.raw(matrix, codes[rows], offset[rows])
                assert np.array_equal(raw, whole[rows])
            assert np.array_equal(model.mean(raw), means[rows])
    monkeypatch.setattr(linear, "_BLOCK_ROWS", 64)
    assert np.array_equal(model.raw(X, codes, offset), whole)


def test_raw_is_the_product_with_the_coefficients() -> None:
    model, rows = some_model("multinomial", 5, 10), make_rows(0, 600, 5, (4, 6))
    expected = rows.onehot(10) @ model.coef.T + model.intercept
    np.testing.assert_allclose(model.raw(rows.X, rows.codes), expected, atol=1e-13)
    assert model.raw(rows.X[:0], rows.codes[:0]).shape == (0, 3)
    assert model.mean(model.raw(rows.X[:0], rows.codes[:0])).shape == (0, 3)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_arrays_come_back_without_pickle(loss: str) -> None:
    model, file = some_model(loss), io.BytesIO()
    np.savez(file, **model.to_arrays())
    file.seek(0)
    found = LinearModel.from_arrays(np.load(file, allow_pickle=False))
    assert np.array_equal(found.coef, model.coef)
    assert np.array_equal(found.intercept, model.intercept)
    assert (found.loss, found.n_dense) == (loss, model.n_dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coef": np.zeros((1, 40), np.float32)}, "found coef float32"),
        ({"intercept": np.zeros(2)}, r"intercept float64 \(2,\)"),
        ({"n_dense": np.array(41)}, "n_dense 41"),
        ({"loss": np.array("hinge")}, "loss 'hinge'"),
    ],
)
def test_damaged_arrays_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LinearModel.from_arrays({**some_model("squared").to_arrays(), **change})
    with pytest.raises(DataError, match=r"\['coef'\] missing"):
        LinearModel.from_arrays({"intercept": np.zeros(1), "loss": np.array("squared"), "n_dense": np.array(0)})


def test_coefficients_are_reported_for_original_features() -> None:
    model, rng = some_model("multinomial", 2, 3), np.random.default_rng(13)
    mean, scale = np.array([5.0, -2.0]), np.array([10.0, 0.5])
    listed = model.coefficients(["age", "size", "city=a", "city=b", "city=c"], mean, scale)
    assert len(listed) == 3 * 6
    original = {(row.output, row.feature): row.original for row in listed}
    X, code = rng.normal(size=(4, 2)) * 3, np.array([[0], [1], [2], [-1]], np.int32)
    raw = model.raw((X - mean) / scale, code)
    for k in range(3):
        sums = original[k, "(intercept)"] + X[:, 0] * original[k, "age"] + X[:, 1] * original[k, "size"]
        sums[:3] += [original[k, f"city={letter}"] for letter in "abc"]
        np.testing.assert_allclose(sums, raw[:, k], rtol=1e-12)
    standardised = [row.standardised for row in listed if row.output == 1]
    assert standardised == [model.intercept[1], *model.coef[1]]
