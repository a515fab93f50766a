from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from claydist.reporting.score_bars import plot_scores


def places_of_labels(svg: str) -> list[tuple[float, str]]:
    """Where the numbers below the bars stand, and what they say."""
    found = re.findall(r'<text x="([\d.]+)" y="266.0" text-anchor="middle"[^>]*>([^<]*)</text>', svg)
    return [(float(x), text) for x, text in found]


@pytest.mark.parametrize("n_bins", [1, 2, 5, 20, 60])
def test_labels_do_not_touch_and_bars_are_as_high_as_shares(n_bins: int) -> None:
    rng = np.random.default_rng(n_bins)
    edges = -np.sort(rng.gamma(1.0, 1e-3, n_bins - 1))[::-1]
    shares = {name: rng.dirichlet(np.ones(n_bins)).tolist() for name in ("actual", "training")}
    svg = plot_scores({"edges": edges.tolist(), **shares})
    labels = places_of_labels(svg)
    assert len(labels) >= min(n_bins - 1, 6)
    assert {text for _, text in labels} <= {f"{edge:.3g}" for edge in edges}
    for (left, one), (right, other) in pairwise(labels):
        assert right - left > 7.5 * (len(one) + len(other)) / 2
    heights = [float(height) for height in re.findall(r'v-([\d.]+)h[\d.]+v[\d.]+z" fill="var\(--first\)"', svg)]
    np.testing.assert_allclose(np.array(heights) / sum(heights), shares["actual"], atol=0.01)


def test_a_share_of_all_and_no_share_at_all_are_drawn() -> None:
    svg = plot_scores({"edges": [0.5], "actual": [1.0, 0.0], "training": [0.0, 0.0]})
    assert "nan" not in svg
    assert ">1</text>" in svg
