"""The shares of scores as inline SVG, written by hand: matplotlib takes longer than scoring a small date.

Colours are the page's own, as in `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 630, 34, 248
_DIGIT = 7.5
"""Width of a digit, of which the font leaves open what it is exactly."""

_MOST_TICKS = 5
_TITLE = "Share of scores by bin of the training scores"
_SERIES = {"training": ("training", "var(--muted)"), "actual": ("this date", "var(--first)")}


def plot_scores(scores: Mapping[str, Sequence[float]]) -> Markup:
    """SVG of the shares of scores by bin of the training scores, beside those of training.

    Parameters
    ----------
    scores : edges, the inner ones; actual and training, one share more than there are edges.
    """
    top = max([*scores["training"], *scores["actual"], 1e-9]) * 1.05
    parts = [*_grid(top), *_bars(scores, top), *_edges(scores["edges"]), *_names()]
    return Markup(
        f'<svg role="img" aria-label="{_TITLE}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-size="13">{"".join(parts)}</svg>'
    )


def _grid(top: float) -> Iterator[str]:
    step = 10.0 ** math.floor(math.log10(top / _MOST_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if top / (step * factor) <= _MOST_TICKS)
    for number in range(int(top / step) + 1):
        y = _BOTTOM - (_BOTTOM - _TOP) * number * step / top
        yield f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="var(--grid)"/>'
        yield _text(_LEFT - 8, y + 4.5, f"{number * step:.4g}", "end")


def _bars(scores: Mapping[str, Sequence[float]], top: float) -> Iterator[str]:
    room = (_RIGHT - _LEFT) / len(scores["actual"])
    width = 0.36 * room
    for shift, (key, (_, colour)) in zip((0.12, 0.52), _SERIES.items(), strict=True):
        for place, share in enumerate(scores[key]):
            height = (_BOTTOM - _TOP) * share / top
            x = _LEFT + (place + shift) * room
            yield f'<path d="M{x:.1f} {_BOTTOM}v{-height:.1f}h{width:.1f}v{height:.1f}z" fill="{colour}"/>'


def _edges(edges: Sequence[float]) -> Iterator[str]:
    room = (_RIGHT - _LEFT) / (len(edges) + 1)
    numbers = [f"{edge:.3g}" for edge in edges]
    width = _DIGIT * max(map(len, numbers), default=0) + 10
    every = math.ceil(width / room)
    for place, number in enumerate(numbers, start=1):
        x = _LEFT + place * room
        yield f'<path d="M{x:.1f} {_BOTTOM}v4" stroke="var(--muted)"/>'
        if place % every == 0 and x < _WIDTH - width / 2:
            yield _text(x, _BOTTOM + 18, number)


def _names() -> Iterator[str]:
    yield _text((_LEFT + _RIGHT) / 2, _HEIGHT - 8, "score")
    yield f'<g transform="translate(13 {(_TOP + _BOTTOM) / 2}) rotate(-90)">{_text(0, 0, "share of rows")}</g>'
    for place, (name, colour) in enumerate(_SERIES.values()):
        x = _LEFT + 110 * place
        yield f'<path d="M{x} 8h14v10h-14z" fill="{colour}"/>'
        yield _text(x + 20, 18, name, "start")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--muted)">{text}</text>'
