from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from claydist import cluster
from claydist.dataset.listing import find_files
from claydist.errors import DataError, SpecError
from claydist.scoring import checks
from claydist.storage import Store, open_store
from tests.scoring.support import make_spec, write_days


def lay_over(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have Ray, with a node at each of these addresses."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(cluster, "living_nodes", lambda: [cluster.Node(a, a, 1, 1, 1) for a in addresses])


def never(*_: Any) -> Any:
    raise AssertionError("no task is needed")


def test_an_output_that_all_nodes_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_over(monkeypatch, "10.0.0.1", "10.0.0.2")
    asked: list[Store] = []

    def on_both(function: Callable[[Store], str], place: Store) -> list[str]:
        asked.append(place)
        return [function(place), function(place)]

    monkeypatch.setattr(cluster, "run_on_every_node", on_both)
    checks.check_output_visible(open_store(tmp_path / "out"))
    assert [place.path.startswith(f"{tmp_path}/out/_locks/") for place in asked] == [True]
    assert not asked[0].exists()


def test_an_output_that_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_over(monkeypatch, "10.0.0.1", "10.0.0.2")
    other_disk = open_store(tmp_path / "other")
    monkeypatch.setattr(cluster, "run_on_every_node", lambda function, place: [function(place), function(other_disk)])
    monkeypatch.setattr(checks.socket, "gethostname", lambda: "node-7")
    with pytest.raises(DataError, match="is not one folder for all nodes; give a shared folder or a storage URL") as e:
        checks.check_output_visible(open_store(tmp_path / "out"))
    assert len(e.value.problems) == 1
    assert "node-7 does not see it" in e.value.problems[0]
    assert open_store(tmp_path / "out/_locks").list() == []


def test_an_input_that_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_days(tmp_path / "in", n_days=1)
    found = find_files([str(tmp_path / "in")])
    lay_over(monkeypatch, "10.0.0.1", "10.0.0.2")
    monkeypatch.setattr(cluster, "run_on_every_node", lambda function, sizes: [function(sizes)])
    checks.check_input_visible(found)
    monkeypatch.setattr(cluster, "run_on_every_node", lambda function, sizes: [function({f"{p}x": 1 for p in sizes})])
    with pytest.raises(DataError, match="local files are not the same on every node") as e:
        checks.check_input_visible(found)
    assert "found no such file" in e.value.problems[0]


@pytest.mark.parametrize("case", ["no Ray", "Ray not started", "one host", "remote"])
def test_nothing_is_done_where_nothing_can_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    write_days(tmp_path / "in", n_days=1)
    lay_over(monkeypatch, "10.0.0.1", "10.0.0.1" if case == "one host" else "10.0.0.2")
    monkeypatch.setattr(cluster, "run_on_every_node", never)
    if case == "no Ray":
        monkeypatch.delitem(sys.modules, "ray")
    if case == "Ray not started":
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    if case in ("no Ray", "Ray not started"):
        monkeypatch.setattr(cluster, "living_nodes", never)
    if case == "remote":
        checks.check_output_visible(open_store("memory://visible/out"))
        return
    checks.check_output_visible(open_store(tmp_path / "out"))
    checks.check_input_visible(find_files([str(tmp_path / "in")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_looks_for_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [node] = cluster.nodes()
    twice = [cluster.Node(node.node_id, address, 1, 1, 1) for address in ("10.0.0.1", "10.0.0.2")]
    monkeypatch.setattr(cluster, "living_nodes", lambda: twice)
    checks.check_output_visible(open_store(tmp_path / "out"))
    assert cluster.run_on_every_node(checks._host_without, open_store(tmp_path / "absent")) != ["", ""]


def test_places_that_are_shown_alike_are_not_within_one_another() -> None:
    fs = open_store("memory://x").fs
    inner, outer = Store("sftp://***@h/t/a", fs, "/one/t/a"), Store("sftp://***@h/t", fs, "/one/t")
    other = Store("sftp://***@h/t", open_store("memory://x", {"user": "other"}).fs, "/one/t")
    assert checks._is_in(inner, outer)
    assert not checks._is_in(inner, Store(outer.url, fs, "/two/t"))
    assert not checks._is_in(inner, other)


def test_an_overlap_is_seen_on_remote_places_and_through_links(tmp_path: Path) -> None:
    write_days(tmp_path / "in", n_days=1)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    open_store("memory://apart/in/a.parquet").write((tmp_path / "in/dt=2026-11-01/part-0.parquet").read_bytes())
    for asked, output in (
        (str(tmp_path / "in"), str(tmp_path / "link")), ("memory://apart/in", "memory://apart"),
        ("memory://apart", "memory://apart/in"), ("memory://apart/**", "memory://apart/out"),
    ):  # fmt: skip
        spec = make_spec(tmp_path, input=asked, output=output)
        with pytest.raises(SpecError, match="overlap"):
            checks.check_apart(spec, [f.store for f in find_files([asked])], open_store(output), ["dt=2026-11-01"])
    for asked, output in (("memory://apart/in", "memory://apart/inner"), ("memory://apart/**", "memory://apart/_out")):
        spec = make_spec(tmp_path, input=asked, output=output)
        checks.check_apart(spec, [f.store for f in find_files([asked])], open_store(output), ["dt=2026-11-01"])


def test_a_marker_of_another_place_that_is_shown_alike_does_not_count() -> None:
    a, b = (Store("sftp://***@h/t/a.parquet", open_store("memory://m").fs, f"/{n}/t/a.parquet") for n in "ab")
    open_store("memory://a/t/_SUCCESS").write(b"")
    complete = checks.find_markers([a, b], None, "_SUCCESS")
    assert checks.missing_marker([a], None, complete) is None
    assert checks.missing_marker([a, b], None, complete) == "sftp://***@h/t"
