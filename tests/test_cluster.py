from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from claydist import cluster
from claydist.cluster import Layout, Node, _room, _running_address, plan_layout
from claydist.errors import ClusterError, SpecError
from claydist.places import check_paths

GIB = 2**30


def nodes(*cpus: int, free: tuple[int, ...] | None = None, gib: tuple[int, ...] | None = None) -> list[Node]:
    return [
        Node(f"n{i}", "127.0.0.1", n, (free or cpus)[i], (gib or (16,) * len(cpus))[i] * GIB)
        for i, n in enumerate(cpus)
    ]


def plan(found: list[Node], workers: Any = "auto", cpus: Any = "auto", **keys: Any) -> tuple[int, int]:
    layout = plan_layout(found, workers, cpus, **keys)
    return layout.n_workers, layout.n_threads


@pytest.mark.parametrize(("found", "keys", "expected"), [
    (nodes(8), {}, (1, 8)), (nodes(8, 8, 8), {}, (3, 8)), (nodes(8, 4), {}, (2, 4)),
    (nodes(8, 8, free=(8, 3)), {}, (2, 3)), (nodes(8, 8, free=(8, 0)), {}, (2, 1)), (nodes(1), {}, (1, 1)),
    (nodes(8), {"workers": 2}, (2, 4)), (nodes(8, 8), {"workers": 3}, (3, 4)), (nodes(8, 8), {"workers": 4}, (4, 4)),
    (nodes(8), {"workers": 8}, (8, 1)), (nodes(8, 8), {"cpus": 2}, (2, 2)), (nodes(8, 1), {"cpus": 2}, (1, 2)),
    (nodes(8, 8), {"workers": 4, "cpus": 4}, (4, 4)), (nodes(8), {"workers": 3, "cpus": 2}, (3, 2)),
    (nodes(8, 8, gib=(16, 2)), {"memory_per_worker": 4 * GIB}, (1, 8)),
    (nodes(8, 4, gib=(2, 16)), {"memory_per_worker": 4 * GIB}, (1, 4)),
    (nodes(8, 2, gib=(16, 16)), {"workers": 2, "memory_per_worker": 8 * GIB}, (2, 2)),
])  # fmt: skip
def test_layout_by_table(found: list[Node], keys: dict[str, Any], expected: tuple[int, int]) -> None:
    assert plan(found, **keys) == expected


def test_what_the_autoscaler_may_add_is_not_refused() -> None:
    found = nodes(2)
    assert plan_layout(found, 4, 2, autoscaler_cpus=8) == Layout(4, 2, scales=True)
    assert plan_layout(found, 1, 2, autoscaler_cpus=8) == Layout(1, 2)
    assert plan_layout([], 4, 2, autoscaler_cpus=8) == Layout(4, 2, scales=True)
    assert plan_layout([], 2, "auto", autoscaler_cpus=8) == Layout(2, 1, scales=True)
    with pytest.raises(ClusterError, match="can never hold 4 workers"):
        plan_layout(found, 4, 2, autoscaler_cpus=7)


@pytest.mark.parametrize(("found", "keys", "text"), [
    ([], {}, "no node with a CPU"),
    (nodes(2), {"workers": 4, "cpus": 1},
     "can never hold 4 workers of 1 CPUs: it has 1 nodes with 2 CPUs, room for 2;"),
    (nodes(2), {"workers": 4}, "set train.workers=2"),
    (nodes(4, 2), {"workers": 1, "cpus": 8}, "set train.cpus_per_worker=4"),
    (nodes(4, 4), {"cpus": 8}, "room for 0; set train.cpus_per_worker=4"),
    (nodes(8, gib=(3,)), {"memory_per_worker": 4 * GIB}, "set train.memory_gb=3.0 or less"),
    (nodes(8, gib=(9,)), {"workers": 3, "memory_per_worker": 4 * GIB}, "and 9.0 GiB, room for 2; set train.workers=2"),
])  # fmt: skip
def test_refused_at_once_with_numbers_and_a_setting_that_works(
    found: list[Node], keys: dict[str, Any], text: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan(found, **keys)
    assert text in str(caught.value)


@pytest.mark.parametrize("memory", [0, 3 * GIB])
def test_a_layout_fits_every_cluster_or_is_refused(memory: int) -> None:
    shapes = [cpus for n in (1, 2, 3) for cpus in itertools.product((1, 2, 5, 8), repeat=n)]
    n_planned = 0
    for cpus, workers, threads in itertools.product(shapes, ("auto", 1, 2, 5), ("auto", 1, 3)):
        found = nodes(*cpus, free=tuple(n // 2 for n in cpus), gib=tuple(n * 2 for n in cpus))
        try:
            layout = plan_layout(found, workers, threads, memory_per_worker=memory)  # type: ignore[arg-type]
        except ClusterError:
            continue
        n_planned += 1
        assert sum(_room(n, layout.n_threads, memory) for n in found) >= layout.n_workers >= 1, (cpus, workers, threads)
        assert workers == "auto" or layout.n_workers == workers
        assert threads == "auto" or layout.n_threads == threads
    assert n_planned > 300


def test_auto_never_refuses_a_cluster_that_has_room() -> None:
    for cpus in itertools.product((1, 2, 5, 8), repeat=3):
        for gib in itertools.product((1, 4), repeat=3):
            if max(gib) < 4:
                continue
            found = nodes(*cpus, gib=gib)
            layout = plan_layout(found, "auto", "auto", memory_per_worker=4 * GIB)
            assert layout.n_workers == sum(g >= 4 for g in gib)
            assert layout.n_threads == min(c for c, g in zip(cpus, gib, strict=True) if g >= 4)


def test_the_setting_that_works_works() -> None:
    with pytest.raises(ClusterError, match=r"set train\.workers=3"):
        plan(nodes(2, 1), workers=9, cpus=1)
    assert plan(nodes(2, 1), workers=3, cpus=1) == (3, 1)
    with pytest.raises(ClusterError, match=r"set train\.workers=5"):
        plan(nodes(4, 1), workers=6)
    assert plan(nodes(4, 1), workers=5) == (5, 1)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where `ray start` writes its address; on a machine where another command's private cluster runs."""
    from ray._common import utils
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(utils, "get_default_ray_temp_dir", lambda: str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"127.0.0.1:1"})
    return tmp_path / "ray_current_cluster"


def test_only_what_ray_start_left_is_joined_unasked(written: Path) -> None:
    assert _running_address() is None
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        written.write_text(f"{address}\n")
        assert _running_address() == address
    written.write_text("")
    assert _running_address() is None


def test_a_cluster_that_died_without_ray_stop_counts_as_absent(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    written.write_text(address)
    began: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ray, "init", lambda *given, **_: began.append(given))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with cluster.connected():
        assert began == [("local",)]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"the cluster that `ray start` began at {address} is gone; `ray stop` forgets it\n"
    monkeypatch.setattr(cluster, "PROBE_S", 1.0)
    for name in ("argument", "environment"):
        if name == "environment":
            monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ClusterError, match=f"cannot reach Ray at {address}"),
            cluster.connected(address if name == "argument" else None),
        ):
            raise AssertionError("it is asked for by name")


@pytest.mark.parametrize(("address", "environment", "target", "was_found"), [
    (None, None, "127.0.0.1:6379", True), (None, "auto", "auto", True), ("auto", None, "auto", True),
    (None, "head:6379", "head:6379", False), ("head:6379", "auto", "head:6379", False),
])  # fmt: skip
def test_a_cluster_that_was_found_is_asked_with_the_token_at_home(
    written: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, environment: str | None, target: str,
    was_found: bool,
) -> None:  # fmt: skip
    import ray

    asked: list[tuple[str, bool]] = []
    written.write_text("127.0.0.1:6379")
    monkeypatch.setattr(cluster, "_is_refused", lambda _: False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setattr(cluster, "_probe", lambda target, *, was_found: asked.append((target, was_found)))
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *_, **__: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with cluster.connected(address):
        assert asked == [(target, was_found)]


@pytest.mark.usefixtures("ray_cluster")
def test_a_long_wait_is_said_and_ends_with_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise SystemExit(143)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    monkeypatch.setattr(cluster, "IDLE_S", 0.5)
    said: list[tuple[int, float]] = []
    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            cluster.run_tasks(sleep, [30.0], on_idle=lambda n, seconds: said.append((n, seconds)))
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 20
    assert said[:3] == [(1, 0.5), (1, 1.0), (1, 1.5)]


def test_a_head_without_cpus_is_a_node_that_sees_files_and_takes_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import state

    alive = [
        {"NodeID": name, "NodeManagerAddress": address, "Alive": True, "Resources": resources}
        for name, address, resources in (("head", "10.0.0.1", {"memory": 5}), ("w", "10.0.0.2", {"CPU": 4.0}))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {**alive[0], "NodeID": "dead", "Alive": False}])
    monkeypatch.setattr(state, "available_resources_per_node", dict)
    assert [node.node_id for node in cluster.nodes()] == ["w"]
    assert [node.address for node in cluster.living_nodes()] == ["10.0.0.1", "10.0.0.2"]
    with pytest.raises(SpecError, match=r"relative paths \['data'\]"):
        check_paths(["data"])
