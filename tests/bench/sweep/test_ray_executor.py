"""Integration: a sweep on a real Ray cluster of several nodes, one of which is killed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from ray_bench import ray_cluster
from sweep_bench import Bench, wait_for

from emoe_core.errors import ExperimentError
from workbench.sweep.executors.choice import executor_maker
from workbench.sweep.run import run_sweep
from workbench.tracking.place import SERVER_VARIABLE
from workbench.tracking.runs import DIGEST_TAG, ERROR_TAG, SUPERSEDED_TAG, find_parent
from workbench.tracking.store import open_store

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000, "memory": 8_000_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Return a cluster whose head carries out nothing, with two nodes that do."""
    with ray_cluster(NODE | {"num_cpus": 0}, NODE, 2) as made:
        yield made


@pytest.mark.long
def test_a_node_that_is_killed_loses_nothing_and_nothing_runs_twice(bench: Bench, cluster: Any) -> None:
    gate = bench.root / "gate"
    path = bench.write(grid={"seed": [0, 1, 2]}, fixed={"outcome": "wait", "gate": str(gate)})
    kernels: list[int] = []

    def kill_a_node() -> None:
        def waiting() -> list[int]:
            return [int(pid) for item in bench.all_runs() if (pid := item.data.tags.get("dummy.pid"))]

        kernels.extend(wait_for(lambda: len(found := waiting()) == 2 and found))
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        gate.touch()

    killer = threading.Thread(target=kill_a_node)
    killer.start()
    result = run_sweep(path, executor=executor_maker("ray", cluster.address))
    killer.join()

    assert sorted(result.finished) == ["dummy seed=0", "dummy seed=1", "dummy seed=2"] and not result.failed
    assert bench.statuses() == ["FINISHED"] * 3
    every = bench.all_runs()
    # A run that was sent to the node before its end was known is lost as well: one or two.
    lost = [item for item in every if item.info.status != "FINISHED"]
    assert len(every) - len(lost) == 3 and 1 <= len(lost) <= 2
    for item in lost:
        assert item.info.status == "KILLED" and item.data.tags[SUPERSEDED_TAG] == "true"
        assert "lost with its node" in item.data.tags[ERROR_TAG]
    finished = Counter(item.data.tags[DIGEST_TAG] for item in every if item.info.status == "FINISHED")
    assert set(finished.values()) == {1}
    done = bench.current()[0].info.run_id
    assert {"dummy.ipynb"} <= {item.path.split("/")[-1] for item in open_store().list_artifacts(done, "notebook")}
    wait_for(lambda: not any(psutil.pid_exists(kernel) for kernel in kernels))
    assert find_parent(open_store()).info.status == "FINISHED"
    assert run_sweep(path, executor=executor_maker("ray", cluster.address)).skipped == [
        p.info.run_name for p in bench.current()
    ]


@pytest.mark.long
def test_runs_that_no_node_can_hold_are_refused_after_a_while(bench: Bench, cluster: Any) -> None:
    from workbench.sweep.executors.ray_cluster import RayExecutor
    from workbench.sweep.schema import Needs

    told: list[str] = []
    place = RayExecutor(bench.root / "running", most=2, address=cluster.address, tell=told.append, patience_s=0.0)
    try:
        assert not place.has_room(Needs(cores=64), "quality") and "waiting" in told[0]
        with pytest.raises(ExperimentError, match="no node of the Ray cluster has room for a run of 64 cores"):
            place.has_room(Needs(cores=64), "quality")
        assert place.has_room(Needs(), "timing")
    finally:
        place.stop()


def test_nodes_elsewhere_need_a_server(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    from workbench.sweep.executors.ray_cluster import Node, shared_environment

    nodes = [Node("a", "10.0.0.1", 1, 1, 0), Node("b", "10.0.0.2", 1, 1, 0)]
    with pytest.raises(ExperimentError, match="`mlflow server`"):
        shared_environment(nodes, "10.0.0.1")
    monkeypatch.setenv(SERVER_VARIABLE, "http://10.0.0.1:5000/")
    assert shared_environment(nodes, "10.0.0.1") == {SERVER_VARIABLE: "http://10.0.0.1:5000"}


@pytest.mark.long
def test_without_a_cluster_it_says_how_to_start_one(bench: Bench) -> None:
    with pytest.raises(ExperimentError, match="ray start --head"):
        executor_maker("ray", "127.0.0.1:1")(bench.root / "running", most=1, jobs=None, tell=print)
