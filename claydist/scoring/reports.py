"""The page of a scored date, published or refused, for a person: `output/_reports/<folder>.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claydist.scoring.units import UnitStats
from claydist.sketch import Sketch
from claydist.storage import Store

FOLDER = "_reports"
_N_BINS = 20


def write_report(
    output: Store, folder: str, facts: Mapping[str, Any], stats: UnitStats, training: Sketch | None
) -> str:
    """URL of the page.

    Parameters
    ----------
    facts : as `reporting.html.render_scored` takes them; counts and scores are added here.

    Raises
    ------
    StorageError : when it cannot be written.
    """
    from claydist.reporting.html import render_scored

    data = {
        **facts, "rows": stats.n_written, "quarantined": stats.n_quarantined,
        "quarantine": [{"reason": reason, "rows": n} for reason, n in stats.quarantined.items()],
        "scores": score_shares(stats.scores, training),
        "notes": [f"{n:,} values of {name} were not seen in training" for name, n in stats.unseen.items()],
    }  # fmt: skip
    place = output.join(FOLDER, f"{folder}.html")
    place.write(render_scored(data).encode())
    return place.url


def score_shares(actual: Sketch, training: Sketch | None) -> dict[str, Sequence[float]]:
    """Shares of scores between the training's quantiles, of the date and of training; {} where that is not known."""
    if training is None:
        return {}
    edges = training.edges(_N_BINS)
    shares = {
        name: (sketch.histogram(edges) / max(float(sketch.n), 1.0)).tolist()
        for name, sketch in (("actual", actual), ("training", training))
    }
    return {"edges": edges.tolist(), **shares}
