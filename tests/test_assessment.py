from __future__ import annotations

from pathlib import Path

import pytest

from claydist import cluster
from claydist.assessment import evaluate_reference
from claydist.errors import DataError
from tests.scoring.support import NAME, make_registry, write_days


def test_local_files_that_a_node_does_not_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path / "registry")
    write_days(tmp_path / "in", n_days=1)
    monkeypatch.setattr(
        cluster, "living_nodes", lambda: [cluster.Node(a, a, 1, 1, 1) for a in ("10.0.0.1", "10.0.0.2")]
    )
    monkeypatch.setattr(cluster, "run_on_every_node", lambda function, sizes: [function({f"{p}x": 1 for p in sizes})])
    with pytest.raises(DataError, match="local files are not the same on every node") as caught:
        evaluate_reference(NAME, [str(tmp_path / "in")], registry)
    assert "found no such file" in caught.value.problems[0]
