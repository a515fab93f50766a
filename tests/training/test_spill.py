from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

from claydist.training import binning, spill
from claydist.training.binning import ShardIter
from claydist.training.spill import Spill, available_memory, has_room


def batches(n_batches: int = 3) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(5)
    for i in range(n_batches):
        n = 50 * (i + 1)
        X = rng.normal(size=(n, 3)).astype(np.float32)
        X[rng.random(X.shape) < 0.1] = np.nan
        yield {"data": X, "label": X[:, 0] > 0, "weight": rng.random(n), "feature_names": ["0", "1", "2"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert getattr(a[name], "dtype", None) == getattr(b[name], "dtype", None)


def test_batches_come_back_as_they_were_as_often_as_wanted() -> None:
    kept = Spill()
    given = [*batches(), {"data": np.empty((0, 3), np.float32), "label": np.empty(0, bool), "weight": np.empty(0)}]
    for batch in given:
        kept.write(batch)
    for _ in range(3):
        n_found = 0
        for batch, wanted in zip(kept.read(), given, strict=True):
            same(batch, wanted)
            n_found += 1
        assert n_found == len(given)


def test_the_file_has_no_name_that_could_stay_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Spill()
    kept.write(next(batches()))
    assert len(list(kept.read())) == 1
    assert not list(tmp_path.iterdir())


def test_a_matrix_made_from_the_file_is_that_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    n_made = []

    def make() -> Iterator[dict[str, Any]]:
        n_made.append(1)
        yield from batches()

    def model(room: bool) -> bytes:
        n_made.clear()
        monkeypatch.setattr(binning, "has_room", lambda n_bytes: room)
        Xy = xgb.QuantileDMatrix(ShardIter(make, 1), max_bin=8)
        return bytes(xgb.train({"max_depth": 3, "max_bin": 8, "nthread": 1}, Xy, 4).save_raw("ubj"))

    spilled = model(True)
    assert len(n_made) == 1
    assert model(False) == spilled
    assert len(n_made) > 3


def test_a_disk_that_fills_up_costs_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(write: Callable[..., None]) -> bytes:
        monkeypatch.setattr(Spill, "write", write)
        Xy = xgb.QuantileDMatrix(ShardIter(batches, 1), max_bin=8)
        return bytes(xgb.train({"max_depth": 3, "max_bin": 8, "nthread": 1}, Xy, 4).save_raw("ubj"))

    whole, n_written = Spill.write, []

    def full(self: Spill, batch: Any) -> None:
        n_written.append(1)
        if len(n_written) == 2:
            raise OSError(28, "No space left on device")
        whole(self, batch)

    monkeypatch.setattr(binning, "has_room", lambda n_bytes: True)
    assert model(full) == model(whole)
    assert len(n_written) == 2  # it is not tried again in the same pass


def test_a_file_cut_short_is_an_error() -> None:
    kept = Spill()
    kept.write(next(batches()))
    kept._file.truncate(100)
    with pytest.raises(OSError, match="shorter than what was written"):
        list(kept.read())


def test_there_is_room_for_little_and_not_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_room(1)
    assert not has_room(available_memory())
    monkeypatch.setattr(spill, "available_memory", lambda: 0)  # a system that does not tell
    assert not has_room(1)
