"""What the report shows of columns: drift of times, and values as they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from claydist import cluster, pipeline
from claydist.evaluate import Evaluation, evaluate
from claydist.predictor import Predictor
from claydist.preparation import Prepared, open_tables, prepare
from claydist.reporting.data import report_data
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from tests.checks import run_job
from tests.tables import make_table, spec_of, write_files


def in_this_process(function: Callable[..., Any], items: Sequence[Any], shared: Any = None, **_: Any) -> list[Any]:
    more = () if shared is None else (shared,)
    return [function(item, *more) for item in items]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "run_tasks", in_this_process)
    monkeypatch.setattr(cluster, "living_nodes", lambda: [])


def months(n_rows: int) -> pa.Table:
    """Parcels of January, then of February 2026; a date, and a timestamp that nothing drifts in."""
    table = make_table(0, n_rows)
    rng = np.random.default_rng(1)
    at = np.datetime64("2026-01-01", "s") + np.sort(rng.integers(0, 59 * 86_400, n_rows)).astype("timedelta64[s]")
    mixed = rng.permutation(at)
    columns = {"sent": pa.array(at, pa.timestamp("us", "UTC")), "day": pa.array(at.astype("datetime64[D]")),
               "mixed": pa.array(mixed, pa.timestamp("s"))}  # fmt: skip
    for name, values in columns.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, values)
    return table


def report_rows(tree: dict[str, Any], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the report's data table by feature, as training makes them."""
    spec = load_spec(TrainSpec, tree)
    prepared = prepare(spec, open_tables(spec))
    predictor = _predictor(spec, prepared, tmp_path)
    evaluations: dict[str, Evaluation] = {
        "test": evaluate(pipeline._evaluation_plan(predictor, prepared, spec, "test", ""), in_this_process)
    }
    manifest: dict[str, Any] = dict.fromkeys(
        ("name", "version", "kind", "task", "promoted", "promotion", "goals", "metrics", "seconds", "peak_mb", "run",
         "rows", "workers", "threads", "restarts", "versions")
    )  # fmt: skip
    manifest |= {"trained": {"trained_at": ""}, "slices": {}, "warnings": [], "inventory": {"fingerprint": ""},
                 "spec": {"data": {"path": []}}}  # fmt: skip
    data = report_data(manifest, predictor, evaluations, {}, prepared.profiles)
    return {row["feature"]: row for row in data["profile"]}


def _predictor(spec: TrainSpec, prepared: Prepared, tmp_path: Path) -> Predictor:
    from claydist.registry import open_registry
    from claydist.runs import start_run

    run = start_run(open_registry(str(tmp_path / "registry")), "train", spec, spec.name, "")
    run = run.update(layout={"n_workers": 1, "n_threads": 1})
    result = run_job(pipeline._job(spec, prepared, run, str(tmp_path / "cache")))
    return Predictor(prepared.plan, pipeline._model(result, spec, prepared), prepared.target)


def test_a_month_later_is_drift_and_times_are_written_as_times(without_ray: None, tmp_path: Path) -> None:
    path = write_files(tmp_path / "in", [months(2_000)], row_group_size=500)
    tree = spec_of(path, tmp_path / "registry", split={"test": {"where": "sent >= '2026-02-01'"}}, model__rounds=1)
    rows = report_rows(tree, tmp_path)
    assert rows["sent"]["psi_test"] > 0.25
    assert rows["day"]["psi_test"] > 0.25
    assert rows["mixed"]["psi_test"] < 0.1
    assert (rows["sent"]["type"], rows["day"]["type"]) == ("timestamp (UTC)", "date")
    assert rows["sent"]["min"].startswith("2026-01-01 ")
    assert rows["sent"]["min"] < rows["sent"]["mean"] < rows["sent"]["max"] < "2026-02-01"
    assert (rows["day"]["min"], rows["day"]["max"]) == ("2026-01-01", "2026-01-31")
    assert (rows["express"]["type"], rows["express"]["min"], rows["express"]["max"]) == ("boolean", False, True)
    assert 0 < rows["express"]["mean"] < 1
    assert rows["km"]["type"] == "numeric"
