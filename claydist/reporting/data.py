"""What a model's report shows, gathered from what training and evaluation left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from claydist.arrays import NS
from claydist.evaluate import ALL_ROWS, Evaluation
from claydist.predictor import Predictor
from claydist.profile import ColumnProfile
from claydist.reporting.curves import curves
from claydist.schema import Column
from claydist.sketch import drift, psi

NOTES = (
    "The same inventory, spec, seed, library versions, number of workers and threads give the same bytes.",
    "Another number of workers or threads changes the last bits of sums: linear coefficients agree to about 1e-6, "
    "boosted models by their metrics, since quantile cuts depend on how rows are spread.",
)


def report_data(
    manifest: Mapping[str, Any],
    predictor: Predictor,
    evaluations: Mapping[str, Evaluation],
    history: Mapping[str, Any],
    profiles: Mapping[str, ColumnProfile],
) -> dict[str, Any]:
    """The mapping that `html.render_report` draws.

    Parameters
    ----------
    manifest : of the bundle, before it is written.
    evaluations : by part.
    history : the metric round by round, as training gave it.
    profiles : of the feature columns over the training rows.
    """
    on = next(name for name in ("test", "valid", "train") if name in evaluations)
    weights = "coefficients" if predictor.model.kind == "linear" else "importance"
    return {
        "model": {
            "name": manifest["name"], "version": manifest["version"], "kind": manifest["kind"],
            "task": manifest["task"], "created_at": manifest["trained"]["trained_at"],
            "classes": [str(value) for value in predictor.target.classes],
        },
        "promoted": manifest["promoted"], "why": manifest["promotion"], "goals": manifest["goals"],
        "metrics": manifest["metrics"], "curves": curves(evaluations[on].sums[ALL_ROWS]), "curves_on": on,
        "history": {**history, "unit": "iteration" if manifest["kind"] == "linear" else "round"},
        weights: predictor.model.importance(predictor.plan),
        "slices": [
            {"slice": name, "rows": values["rows"], "metrics": {k: v for k, v in values.items() if k != "rows"}}
            for name, values in manifest["slices"].items()
        ],
        "profile": [
            _profile_row(column, profiles[column.name], evaluations)
            for column in predictor.schema.columns if column.name in profiles
        ],
        "rows": manifest["rows"], "stages": manifest["seconds"],
        "memory_mb": {"largest training worker": manifest["peak_mb"]},
        "notes": [*manifest["warnings"], *NOTES],
        "lineage": {
            "run": manifest["run"], "inventory": manifest["inventory"]["fingerprint"],
            "input": ", ".join(manifest["spec"]["data"]["path"]),
            "workers": manifest["workers"], "threads": manifest["threads"], "restarts": manifest["restarts"],
            "versions": manifest["versions"],
        },
    }  # fmt: skip


def profile_drift(expected: ColumnProfile, actual: ColumnProfile) -> float | None:
    """PSI of a column between two sets of rows; None where it is not defined."""
    if expected.counts is not None and actual.counts is not None:
        values = sorted({*expected.counts, *actual.counts}, key=str)
        counts = [[float(profile.counts.get(v, 0)) for v in values] for profile in (expected, actual)]  # type: ignore[union-attr]
        return psi(*counts) if values else None
    if expected.sketch is None or actual.sketch is None:
        return None
    return drift(expected.sketch, actual.sketch)


def _profile_row(column: Column, profile: ColumnProfile, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    rows, name = max(profile.n_rows, 1), column.name
    row: dict[str, Any] = {"feature": name, "nulls": profile.n_null / rows}
    if profile.counts is not None:
        top = sorted(profile.counts.items(), key=lambda item: (-item[1], str(item[0])))[:5]
        row |= {"type": f"categorical ({len(profile.counts):,})", "top": [[str(v), n / rows] for v, n in top]}
    else:
        row |= _range(column, profile)
    for part in ("valid", "test"):
        if part in evaluations and name in evaluations[part].columns:
            found = profile_drift(profile, evaluations[part].columns[name].profile())
            row[f"psi_{part}"] = None if found is None or not math.isfinite(found) else found
    return row


def _range(column: Column, profile: ColumnProfile) -> dict[str, Any]:
    """Type, mean, least and greatest value of a column that is not categorical, as its values are written."""
    mean, low, high = profile.mean, profile.minimum, profile.maximum
    if low is None or high is None:
        return {"type": column.describe()}
    if column.type in ("date", "timestamp"):
        unit: Any = "D" if column.type == "date" else "s"
        # Nanoseconds would not hold every year.
        times = np.array([int(mean), low // NS, high // NS], np.int64).astype("datetime64[s]")
        text = [str(time).replace("T", " ") for time in np.datetime_as_string(times, unit=unit)]
        return {"type": column.describe(), **dict(zip(("mean", "min", "max"), text, strict=True))}
    if column.type == "boolean":
        return {"type": "boolean", "mean": mean, "min": bool(low), "max": bool(high)}
    return {"type": "numeric", "mean": mean, "min": low, "max": high}
