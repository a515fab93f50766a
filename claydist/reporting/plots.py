"""Plots as inline SVG whose colours are the page's own, so that one file reads well in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Stand-ins that matplotlib draws with, and what the page puts in their place.
_INK, _MUTED, _GRID, _FIRST = "#010203", "#010204", "#010205", "#010206"
_COLOURS = {
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _FIRST: "var(--first)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def plot_history(history: Mapping[str, Any]) -> Markup:
    """SVG of a metric by round on train and valid; the best round is marked."""
    metric, unit = str(history.get("metric", "metric")), str(history.get("unit", "round"))

    def draw(ax: Axes) -> None:
        for name, colour in (("train", _MUTED), ("valid", _FIRST)):
            # The train metric of large data is known of some rounds alone, and a line ends at a gap.
            known = [(at, value) for at, value in enumerate(history.get(name) or []) if value is not None]
            if known:
                ax.plot(*zip(*known, strict=True), color=colour, label=name)
        best, valid = history.get("best_round"), history.get("valid") or history.get("train") or []
        if best is not None and 0 <= best < len(valid):
            ax.plot([best], [valid[best]], "o", color=_FIRST, markersize=6)
            ax.axvline(best, color=_FIRST, linewidth=0.8, linestyle=":", label=f"best: {unit} {best}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()

    return _svg("history", f"{metric} by {unit}", draw, unit, metric)


def plot_roc(roc: Mapping[str, Sequence[float]], auc: float | None) -> Markup:
    """SVG of the true positive rate against the false positive rate."""

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=":", label="chance")
        label = "model" if auc is None else f"model, area {auc:.3f}"
        ax.plot(roc["false_positive_rate"], roc["true_positive_rate"], color=_FIRST, label=label)
        ax.legend(loc="lower right")

    return _svg("roc", "ROC curve", draw, "false positive rate", "true positive rate", square=True)


def plot_precision_recall(curve: Mapping[str, Sequence[float]], average: float | None) -> Markup:
    """SVG of precision against recall."""

    def draw(ax: Axes) -> None:
        share = curve["precision"][-1]
        ax.axhline(share, color=_MUTED, linewidth=0.8, linestyle=":", label=f"chance, {share:.3f}")
        label = "model" if average is None else f"model, average {average:.3f}"
        ax.step(curve["recall"], curve["precision"], where="pre", color=_FIRST, label=label)
        ax.set_ylim(0, 1.02)
        ax.legend()

    return _svg("precision-recall", "Precision by recall", draw, "recall", "precision", square=True)


def plot_calibration(bins: Mapping[str, Sequence[float]]) -> Markup:
    """SVG of the observed share of positives against the mean probability of each bin."""

    def draw(ax: Axes) -> None:
        top = max([*bins["predicted"], *bins["observed"], 1e-9]) * 1.05
        ax.plot([0, top], [0, top], color=_MUTED, linewidth=0.8, linestyle=":", label="perfect")
        ax.plot(bins["predicted"], bins["observed"], "o-", color=_FIRST, markersize=4, label="model")
        ax.legend()

    title = "Observed share of positives by predicted probability"
    return _svg("calibration", title, draw, "predicted probability", "observed share", square=True)


def plot_histogram(name: str, title: str, histogram: Mapping[str, Sequence[float]], label: str) -> Markup:
    """SVG of counts between edges."""

    def draw(ax: Axes) -> None:
        ax.stairs(histogram["counts"], histogram["edges"], fill=True, color=_FIRST)
        ax.grid(visible=False, axis="x")

    return _svg(name, title, draw, label, "rows" if name != "groups" else "groups", square=True)


def plot_deciles(bins: Mapping[str, Sequence[float]]) -> Markup:
    """SVG of the mean label against the mean prediction, by decile of the prediction."""

    def draw(ax: Axes) -> None:
        ends = [min(bins["predicted"]), max(bins["predicted"])]
        ax.plot(ends, ends, color=_MUTED, linewidth=0.8, linestyle=":", label="perfect")
        ax.plot(bins["predicted"], bins["observed"], "o-", color=_FIRST, markersize=4, label="model")
        ax.legend()

    return _svg(
        "deciles", "Observed by predicted, in tenths of the rows", draw, "mean prediction", "mean label", square=True
    )


def _svg(name: str, title: str, draw: Any, x_label: str, y_label: str, *, square: bool = False) -> Markup:
    """The figure that `draw` makes on its axes, as an SVG element that may stand in HTML."""
    # A fixed salt makes the ids, and so the bytes of the report, the same on every run.
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.2, 3.6) if square else (6.4, 3.2), layout="constrained", facecolor="none")
        ax = figure.add_subplot(facecolor="none")
        text = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        try:
            draw(ax)
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            canvas.print_svg(text, metadata={"Date": None, "Creator": None})
        except (ValueError, ArithmeticError, LookupError) as e:
            # Numbers that cannot be drawn, such as infinite ones: no reason to lose the model of a report.
            return Markup("<p>{} cannot be drawn: {}</p>").format(title, e)
    return _for_page(text.getvalue(), name, title)


def _for_page(svg: str, name: str, title: str) -> Markup:
    """The SVG without what only a file of its own needs, with ids of its own and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1, flags=re.DOTALL)
    label = f'<svg role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg" '
    svg = svg.replace("<svg ", label + 'xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)
