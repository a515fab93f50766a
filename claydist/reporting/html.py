"""HTML reports of a model and of a scored date: one file each, no request, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from claydist.reporting.score_bars import plot_scores

Data = Mapping[str, Any]

# Beyond these a report takes longer than a minute to read and a megabyte to hold.
_MOST_FEATURES = 30
_MOST_PROFILED = 300
_MOST_SLICES = 100
_MOST_TOP = 5
_PARTS = ("valid", "test")


def render_report(data: Data) -> str:
    """The report of a trained model as one HTML page.

    A section whose keys are absent or empty is left out. All text is escaped. Numbers may be None where undefined.

    Parameters
    ----------
    data : plain JSON-able mapping
        model {name, version, kind, task, created_at, classes: names of the classes in order}
        promoted bool, why str : the verdict and its reason.
        goals [{metric, bound: "at_least" | "at_most", target, value, met, slice, on: "test" | "valid"}]
        metrics {"valid": {metric: value}, "test": {...}, "baseline": {...}} : any parts, shown in this order.
        curves dict : of `reporting.curves.curves`; curves_on str : the part it is of.
        history {metric, train: [...], valid: [...], best_round: index, unit: "round"} : either list may be absent.
        importance [{feature, gain}] : any order.
        coefficients [{feature, standardised, original, ...}] : every key but feature is a column; any order.
        slices [{slice, rows, metrics: {metric: value}}]
        profile [{feature, type, nulls: share, mean, min, max, top: [[category, share]], psi_valid, psi_test}] : min
            and max may be text (dates); any key but feature may be absent.
        rows {part: number of rows}
        stages {stage: seconds}, memory_mb {process: MB}
        notes [str] : what may differ on another run.
        lineage {name: value} : digest, inventory fingerprint, versions (a mapping), and the like.
    """
    model, drawn = data.get("model") or {}, data.get("curves") or {}
    goals = data.get("goals") or []
    classes = [str(name) for name in model.get("classes") or []]
    history = data.get("history") or {}
    return _page(
        "report.html.j2",
        model=model,
        subtitle=_line(model.get("task"), model.get("kind"), model.get("created_at")),
        promoted=data.get("promoted"),
        why=data.get("why"),
        goals=goals,
        missed=sum(not goal.get("met") for goal in goals),
        metrics=_metrics(data.get("metrics") or {}),
        history_title=f"{history.get('metric', 'metric')} by {history.get('unit', 'round')}",
        plots={"history": _plot_history(history), "of_curves": _plot_curves(drawn, _shown_metrics(data))},
        curves_on=data.get("curves_on"),
        confusion=_confusion(drawn.get("confusion"), classes),
        importance=_importance(data.get("importance") or []),
        coefficients=_coefficients(data.get("coefficients") or []),
        slices=_slices(data.get("slices") or []),
        profile=_profile(data.get("profile") or []),
        rows={part: n for part, n in (data.get("rows") or {}).items() if n},
        stages=_bars(data.get("stages") or {}),
        memory=_bars(data.get("memory_mb") or {}),
        notes=data.get("notes") or [],
        lineage=_lineage(data.get("lineage") or {}),
    )


def render_scored(data: Data) -> str:
    """The report of one scored date as one HTML page.

    Parameters
    ----------
    data : plain JSON-able mapping; absent or empty keys leave their section out
        name str, date str : what was scored.
        status str : published, failed, ...; why str : its reason.
        model {name, version, digest, kind, task}
        rows int, quarantined int, uri str; seconds float, rows_per_s float : of the run until this date was done.
        gates [{gate, value, warn, fail, outcome: "pass" | "warn" | "fail"}]
        scores {edges: inner edges, actual: [share], training: [share]} : one share more than there are edges.
        quarantine [{reason, rows}]
        notes [str], lineage {name: value}
    """
    model = data.get("model") or {}
    totals = {**data, "seconds": f"{data['seconds']:,.1f}"} if data.get("seconds") is not None else data
    outcomes = {gate.get("outcome") for gate in data.get("gates") or []}
    status = str(data.get("status") or "scored")
    failed = status == "failed" or "fail" in outcomes
    keys = {
        "rows": "rows", "quarantined": "quarantined", "seconds": "seconds since scoring began",
        "rows_per_s": "rows a second until then",
    }  # fmt: skip
    quarantine = {str(row["reason"]): row["rows"] for row in data.get("quarantine") or []}
    return _page(
        "scored.html.j2",
        title=_line(data.get("name") or model.get("name"), data.get("date"), "scores"),
        subtitle=_line(model.get("name"), model.get("version"), model.get("task"), model.get("digest")),
        status=status.capitalize(),
        mood="bad" if failed else "warn" if "warn" in outcomes else "good" if status == "published" else "",
        why=data.get("why"),
        totals=[
            (label, totals[key]) for key, label in {**keys, "uri": "output"}.items() if totals.get(key) is not None
        ],
        gates=data.get("gates") or [],
        plot=_plot_scores(data.get("scores") or {}),
        quarantine=(_bars(quarantine) or {}).get("rows"),
        notes=data.get("notes") or [],
        lineage=_lineage(data.get("lineage") or {}),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("claydist", "reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent, "short": _short, "text": _text}
    return environment


def _page(template: str, **context: Any) -> str:
    return _environment().get_template(template).render(context)


def _number(value: Any) -> str:
    """Text of a number with four digits; other values as they are, an undefined one as a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _text(value)
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{min(max(3 - math.floor(math.log10(abs(value))), 0), 4)}f}"
    return f"{value:.3e}"


def _percent(share: Any) -> str:
    if not isinstance(share, (int, float)):
        return "–"
    if share in (0, 1):
        return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
    return "<0.1\N{NO-BREAK SPACE}%" if 0 < share < 0.001 else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _short(text: Any, length: int = 60) -> str:
    shown = str(text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def _text(value: Any) -> str:
    """A value as a line: mappings and lists by their items, None as a dash."""
    if value is None or (not isinstance(value, str) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(_text(item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def _line(*parts: Any) -> str:
    return " · ".join(str(part) for part in parts if part is not None and part != "")


def _shown_metrics(data: Data) -> Data:
    """Metrics of the rows that the curves are of."""
    metrics: Data = data.get("metrics") or {}
    part = data.get("curves_on") or ("test" if metrics.get("test") else "valid")
    found: Data = metrics.get(part) or {}
    return found


def _metrics(metrics: Data) -> dict[str, Any] | None:
    parts = [part for part in metrics if metrics[part]]
    names = dict.fromkeys(name for part in parts for name in metrics[part])
    rows = [(name, [metrics[part].get(name) for part in parts]) for name in names]
    return {"columns": parts, "rows": rows} if rows else None


def _plot_history(history: Data) -> Markup | None:
    from claydist.reporting.plots import plot_history

    return plot_history(history) if history.get("train") or history.get("valid") else None


def _plot_scores(scores: Data) -> Markup | None:
    return plot_scores(scores) if scores.get("actual") else None


def _plot_curves(drawn: Data, metrics: Data) -> list[tuple[str, Markup, str]]:
    """Title, plot and remark of each curve that is there."""
    from claydist.reporting import plots

    bars = plots.plot_histogram
    table: dict[str, tuple[str, Callable[[Any], Markup], str]] = {
        "roc": ("ROC", lambda roc: plots.plot_roc(roc, metrics.get("auc")), ""),
        "precision_recall": (
            "Precision and recall",
            lambda curve: plots.plot_precision_recall(curve, metrics.get("average_precision")),
            "",
        ),
        "calibration": ("Calibration", plots.plot_calibration, "Bins of about equal weight."),
        "residuals": (
            "Residuals",
            lambda histogram: bars("residuals", "Histogram of residuals", histogram, "label minus prediction"),
            "The 1 % of rows at the ends is left out.",
        ),
        "deciles": ("Predicted and observed", plots.plot_deciles, "Means of tenths of the rows, by prediction."),
        "groups": ("NDCG by group", lambda histogram: bars("groups", "Groups by NDCG", histogram, "ndcg"), ""),
    }
    return [(title, draw(drawn[key]), note) for key, (title, draw, note) in table.items() if drawn.get(key)]


def _confusion(confusion: Data | None, names: Sequence[str]) -> dict[str, Any] | None:
    if not confusion:
        return None
    classes = [names[k] if k < len(names) else str(k) for k in confusion["classes"]]
    rows = [
        (name, [(value, value / (sum(weights) or 1)) for value in weights])
        for name, weights in zip(classes, confusion["matrix"], strict=True)
    ]
    return {"classes": classes, "rows": rows, "left_out": confusion.get("left_out", 0)}


def _bars(values: Data) -> dict[str, Any] | None:
    """Rows of (name, value, share of the largest) and the total."""
    if not values:
        return None
    largest = max(max(values.values()), 0.0) or 1.0
    rows = [(name, value, max(value, 0.0) / largest) for name, value in values.items()]
    return {"rows": rows, "total": sum(values.values())}


def _importance(importance: Sequence[Data]) -> dict[str, Any] | None:
    ranked = sorted(importance, key=lambda row: (-row["gain"], str(row["feature"])))
    bars = _bars({str(row["feature"]): row["gain"] for row in ranked[:_MOST_FEATURES]})
    return bars and {**bars, "more": _more(ranked, _MOST_FEATURES)}


def _coefficients(coefficients: Sequence[Data]) -> dict[str, Any] | None:
    columns = list(dict.fromkeys(key for row in coefficients for key in row if key != "feature"))
    if "output" in columns and len({row.get("output") for row in coefficients}) == 1:
        columns.remove("output")
    if not columns:
        return None
    size = next((column for column in columns if column != "output"), columns[0])
    by_size = sorted(coefficients, key=lambda row: -abs(row.get(size) or 0.0))[:_MOST_PROFILED]
    rows = [(row["feature"], [row.get(column) for column in columns]) for row in by_size]
    caption = f"Largest {size} first{_more(coefficients, _MOST_PROFILED)}"
    return {"caption": caption, "columns": columns, "rows": rows}


def _slices(slices: Sequence[Data]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(name for row in slices for name in row["metrics"]))
    rows = [
        (row["slice"], [row.get("rows"), *(row["metrics"].get(name) for name in names)])
        for row in slices[:_MOST_SLICES]
    ]
    return {"columns": ["rows", *names], "rows": rows} if rows else None


def _profile(profile: Sequence[Data]) -> dict[str, Any] | None:
    parts = [part for part in _PARTS if any(row.get(f"psi_{part}") is not None for row in profile)]
    rows = [
        {
            **dict.fromkeys(("type", "nulls", "mean", "min", "max")),
            **row,
            "type": row.get("type") or "",
            "top": (row.get("top") or [])[:_MOST_TOP],
            "drift": [row.get(f"psi_{part}") for part in parts],
        }
        for row in profile[:_MOST_PROFILED]
    ]
    return {"parts": parts, "rows": rows, "more": _more(profile, _MOST_PROFILED)} if rows else None


def _lineage(lineage: Data) -> list[tuple[str, Any]]:
    return [(str(name).replace("_", " "), value) for name, value in lineage.items()]


def _more(rows: Sequence[Any], most: int) -> str:
    return f"; the first {most} of {len(rows):,}" if len(rows) > most else ""
