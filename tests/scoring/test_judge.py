from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score

from claydist.errors import DataError
from claydist.scoring.judge import evaluate_scores
from claydist.scoring.readers import read_scores
from claydist.storage import open_store
from tests.scoring.support import (
    Loop,
    Saying,
    make_predictor,
    make_registry,
    make_spec,
    run_score,
    write_days,
)


def score_days(tmp_path: Path, task: str = "binary", key: tuple[str, ...] = ("id",)) -> pa.Table:
    registry = make_registry(tmp_path / "registry", make_predictor(task))
    write_days(tmp_path / "in", n_days=2, n_rows=60)
    run_score(make_spec(tmp_path, key=list(key)), registry)
    return read_scores(str(tmp_path / "out"))


def make_labels(scores: pa.Table, task: str) -> pa.Array:
    rng = np.random.default_rng(5)
    if task == "multiclass":
        return pa.array(rng.choice(["lo", "mid", "hi"], len(scores)))
    p = scores.column("probability" if task == "binary" else "prediction").to_numpy()
    return pa.array(rng.random(len(p)) < p) if task == "binary" else pa.array(p + rng.normal(size=len(p)))


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("dated", [True, False])
def test_metrics_of_what_was_published_are_those_of_scikit_learn(tmp_path: Path, task: str, dated: bool) -> None:
    scores = score_days(tmp_path, task)
    labels = make_labels(scores, task)
    table = pa.table({"id": scores.column("id").cast(pa.int32()), "late": labels, "dt": scores.column("dt")})
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    pq.write_table(shuffled if dated else shuffled.drop_columns("dt"), tmp_path / "labels.parquet")
    found = evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())
    y, s = labels.to_numpy(zero_copy_only=False), scores
    if task == "binary":
        p = s.column("probability").to_numpy()
        assert found["metrics"]["auc"] == pytest.approx(roc_auc_score(y, p), rel=1e-12)
        first = roc_auc_score(y[:60], p[:60])
        assert found["dates"][0]["metrics"]["auc"] == pytest.approx(first, rel=1e-12)
    elif task == "multiclass":
        names = ["lo", "mid", "hi"]
        p = np.column_stack([s.column(f"probability_{name}").to_numpy() for name in names]).astype(np.float64)
        codes = [names.index(value) for value in y]
        wanted = log_loss(codes, p / p.sum(axis=1, keepdims=True), labels=range(3))
        assert found["metrics"]["logloss"] == pytest.approx(wanted, rel=1e-6)
    else:
        wanted = mean_squared_error(y, s.column("prediction").to_numpy()) ** 0.5
        assert found["metrics"]["rmse"] == pytest.approx(wanted, rel=1e-9)
    assert (found["rows"], found["unlabelled"]) == (120, 0)
    assert [one["date"] for one in found["dates"]] == ["2026-11-01", "2026-11-02"]
    assert [one["rows"] for one in found["dates"]] == [60, 60]
    assert (found["model"], found["version"]) == ("late", 1)


def test_rows_without_a_label_are_counted_and_left_out(tmp_path: Path) -> None:
    scores = score_days(tmp_path)
    table = pa.table({"id": scores.column("id"), "late": make_labels(scores, "binary"), "size": range(120)})
    late = pa.array([None if i % 10 == 0 else v for i, v in enumerate(table.column("late").to_pylist())])
    pq.write_table(table.set_column(1, "late", late).slice(0, 70), tmp_path / "labels.parquet")
    found = evaluate_scores(
        str(tmp_path / "out"), str(tmp_path / "labels.parquet"), slices=["size < 20"], work=Loop()
    )  # fmt: skip
    assert (found["rows"], found["unlabelled"]) == (63, 57)
    assert found["dates"][1]["rows"] == 9
    assert found["slices"]["size < 20"]["rows"] == 18


def test_a_date_whose_rows_are_all_in_quarantine_is_left_out(tmp_path: Path) -> None:
    scores = score_days(tmp_path)
    labels = pa.table({"id": scores.column("id"), "late": make_labels(scores, "binary")})
    pq.write_table(labels, tmp_path / "labels.parquet")
    registry = make_registry(tmp_path / "registry")
    place = tmp_path / "in" / "dt=2026-11-01" / "part-0.parquet"
    rows = pq.read_table(place, partitioning=None)
    pq.write_table(rows.set_column(1, "x", pa.array([np.inf] * len(rows))), place)
    run_score(make_spec(tmp_path, max_quarantined=100), registry, replace=True)
    found = evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())
    assert [one["date"] for one in found["dates"]] == ["2026-11-02"]
    assert found["rows"] == 60
    shutil.rmtree(tmp_path / "out" / "dt=2026-11-02")
    with pytest.raises(DataError, match="1 dates without a row are published"):
        evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())


def test_labels_are_named_without_their_secrets(tmp_path: Path) -> None:
    scores = score_days(tmp_path)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": scores.column("id")}), sink)
    url = "memory://me:hunter2@lab/l.parquet"
    open_store(url).write(sink.getvalue().to_pybytes())
    with pytest.raises(DataError, match=r"the labels in .*lab/l.parquet lack columns") as caught:
        evaluate_scores(str(tmp_path / "out"), url, work=Loop())
    assert "hunter2" not in str(caught.value)


def test_keys_that_do_not_tell_rows_apart(tmp_path: Path) -> None:
    score_days(tmp_path, key=("city",))
    pq.write_table(pa.table({"city": ["Brno"], "late": [True]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="do not tell the rows of the scores of dt=2026-11-01 apart"):
        evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())


@pytest.mark.parametrize(
    ("labels", "key", "match"),
    [
        ({"id": [1]}, ("id",), r"lack columns \['late'\]"),
        ({"late": [True]}, ("id",), r"lack columns \['id'\]"),
        ({"id": ["a"], "late": [True]}, ("id",), "cannot be read as those of the scores"),
        ({"id": [-1], "late": [True]}, ("id",), "no scored row has a label yet"),
        ({"id": [1], "late": [True]}, (), "no key columns"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, labels: dict[str, list[object]], key: tuple[str, ...], match: str
) -> None:
    score_days(tmp_path, key=key)
    pq.write_table(pa.table(labels), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=match):
        evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())


def test_nothing_published(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is published"):
        evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop())


def test_how_far_it_has_come_is_shown(tmp_path: Path) -> None:
    scores = score_days(tmp_path)
    labels = pa.table({"id": scores.column("id"), "late": make_labels(scores, "binary"), "dt": scores.column("dt")})
    pq.write_table(labels, tmp_path / "labels.parquet")
    shown = Saying()
    evaluate_scores(str(tmp_path / "out"), str(tmp_path / "labels.parquet"), work=Loop(), display=shown)
    assert shown.stages == ["inventory", "evaluation"]
    assert shown.boards[-1]["share"] == 1.0
    assert shown.boards[-1]["text"].startswith("2 of 2 dates  ")
