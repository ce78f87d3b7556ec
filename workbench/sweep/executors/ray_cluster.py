"""Carry out runs on a Ray cluster, one papermill run a task (extra ``ray``).

Tasks are placed here, not by Ray: each is bound to a node that has room by the count of this sweep's own tasks. So a
run in the store never waits in a queue, and a timing run gets a node, and its host, to itself. A task that ends with
its node or worker is handed back as lost. Ray itself does not retry: the next attempt is a run of its own.

Nodes that do not share this machine's disk write to an MLflow server (``MLFLOW_TRACKING_URI``), artifacts included.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.machine.environment import code_hash
from workbench.machine.ray_connection import connect
from workbench.sweep.executors.protocol import Ending, Job, Kind
from workbench.sweep.executors.ray_task import Parcel, carry_out
from workbench.sweep.schema import Needs
from workbench.tracking.place import HOME_VARIABLE, SERVER_VARIABLE, project_root, server_uri

POLL_S = 0.2
NODE_PATIENCE_S = 120.0  # for nodes to come (back) before a sweep gives up
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Node:
    """A node that is alive, with all that it has for tasks."""

    node_id: str
    address: str
    cores: float
    memory_bytes: float
    gpus: float

    def gpus_of(self, needs: Needs) -> float:
        """Return how many GPUs a run takes here: unless said otherwise one, where there are any."""
        return min(1.0, self.gpus) if needs.gpus is None else float(needs.gpus)


@dataclass(frozen=True)
class Task:
    """A job on its node, and what it takes there."""

    job: Job
    node: Node
    cores: float
    memory_bytes: float
    gpus: float
    handle: Any


class RayExecutor:
    """Runs on a Ray cluster.

    Parameters
    ----------
    address : str, optional
        ``HOST:PORT`` or ``ray://HOST:PORT``; the cluster that this machine is part of when missing.
    scratch : Path
        Folder for files that came back; emptied at the start.
    most : int
        At most so many runs at once.
    tell : callable, optional
        Called with a sentence when nodes have to be waited for.
    patience_s : float
        How long to wait for a node that is large enough.

    Raises
    ------
    OptionError, ExperimentError
        When Ray is not installed or no cluster answers; when nodes cannot write to the store.
    """

    def __init__(
        self,
        scratch: Path,
        *,
        most: int,
        address: str | None = None,
        tell: Callable[[str], object] = print,
        patience_s: float = NODE_PATIENCE_S,
    ) -> None:
        self._ray = connect(address, "--executor ray")
        self._scratch, self._most, self._tell, self._patience_s = scratch, most, tell, patience_s
        self._tasks: dict[str, Task] = {}
        self._place: Node | None = None
        self._without_node_since: float | None = None
        self._code = code_hash()
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            self._environment = shared_environment(self._nodes(), self._ray.util.get_node_ip_address())
        except ExperimentError:
            self._ray.shutdown()
            raise

    @contextlib.contextmanager
    def stage(self, kind: Kind) -> Iterator[None]:
        """Hold nothing: timing runs get their node to themselves one by one."""
        yield

    def has_room(self, needs: Needs, kind: Kind) -> bool:
        """Say whether a node has room now, and keep it in mind for `start`."""
        nodes = self._nodes()
        self._place = None
        if len(self._tasks) < self._most:
            self._place = next((node for node in nodes if self._fits(node, needs, kind)), None)
        if self._place or self._tasks:
            self._without_node_since = None
            return self._place is not None
        self._wait_for_nodes(nodes, needs)
        return False

    def start(self, job: Job) -> None:
        """Submit the job to the node that `has_room` found."""
        node = self._place
        assert node is not None, "start follows has_room"
        self._place = None
        whole = job.kind == "timing"
        cores = node.cores if whole else float(job.needs.cores)
        memory, gpus = float(job.needs.memory), node.gpus_of(job.needs)
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        options = {"num_cpus": cores, "memory": memory, "num_gpus": gpus, "max_retries": 0}
        task = self._ray.remote(carry_out).options(**options, scheduling_strategy=strategy, name=job.notebook.stem)
        notebook = job.notebook
        parcel = Parcel(
            job.run_id,
            notebook.name,
            notebook.read_text(encoding="utf-8"),
            str(notebook.parent),
            job.parameters,
            self._environment,
            self._code,
        )
        self._tasks[job.run_id] = Task(job, node, cores, memory, gpus, task.remote(parcel))

    def wait(self) -> list[Ending]:
        """Return the tasks that ended; waits a moment when none did."""
        if not self._tasks:
            time.sleep(POLL_S)
            return []
        handles = {task.handle: run_id for run_id, task in self._tasks.items()}
        ready, _ = self._ray.wait(list(handles), num_returns=len(handles), timeout=POLL_S)
        return [self._ending(self._tasks.pop(handles[handle])) for handle in ready]

    def forget(self, ending: Ending) -> None:
        """Remove the files that came back."""
        shutil.rmtree(self._scratch / ending.run_id, ignore_errors=True)

    def stop(self) -> None:
        """Cancel what still runs and leave the cluster; a run's processes end with the worker that started them."""
        for task in self._tasks.values():
            with contextlib.suppress(Exception):
                self._ray.cancel(task.handle, force=True)
        self._tasks.clear()
        self._ray.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _nodes(self) -> list[Node]:
        return [
            Node(
                item["NodeID"],
                item["NodeManagerAddress"],
                item["Resources"].get("CPU", 0.0),
                item["Resources"].get("memory", 0.0),
                item["Resources"].get("GPU", 0.0),
            )
            for item in self._ray.nodes()
            if item["Alive"]
        ]

    def _fits(self, node: Node, needs: Needs, kind: Kind) -> bool:
        here = [task for task in self._tasks.values() if task.node.node_id == node.node_id]
        on_host = [task for task in self._tasks.values() if task.node.address == node.address]
        if (kind == "timing" and on_host) or any(task.job.kind == "timing" for task in on_host):
            return False
        return (
            node.cores - sum(task.cores for task in here) >= needs.cores
            and node.memory_bytes - sum(task.memory_bytes for task in here) >= needs.memory
            and node.gpus - sum(task.gpus for task in here) >= node.gpus_of(needs)
        )

    def _wait_for_nodes(self, nodes: list[Node], needs: Needs) -> None:
        """Nothing runs and no node is large enough: wait for one to join, and give up after a while."""
        if self._without_node_since is None:
            self._without_node_since = time.monotonic()
            self._tell(f"None of the cluster's {len(nodes)} nodes has room for a run; waiting for one.")
            return
        if time.monotonic() - self._without_node_since > self._patience_s:
            found = "; ".join(f"{n.cores:g} cores, {n.memory_bytes / 1e9:.1f} GB, {n.gpus:g} GPUs" for n in nodes)
            raise ExperimentError(
                f"no node of the Ray cluster has room for a run of {needs.cores} cores, "
                f"{needs.memory / 1e9:.1f} GB and {needs.gpus or 0} GPUs (nodes: {found or 'none'}). Change `needs` in "
                "the sweep file or add nodes; the same command goes on."
            )

    def _ending(self, task: Task) -> Ending:
        from ray import exceptions

        run_id = task.job.run_id
        try:
            outcome = self._ray.get(task.handle)
        except (exceptions.RayTaskError, exceptions.OutOfMemoryError) as error:
            return Ending(run_id, False, str(error).strip().splitlines()[-1], str(error))
        except exceptions.RayError as error:
            return Ending(run_id, False, f"lost with its node: {type(error).__name__}", str(error), lost=True)
        folder = self._scratch / run_id
        folder.mkdir(parents=True, exist_ok=True)
        contents = outcome.pop("contents")
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return Ending(run_id, files=tuple(folder / name for name in contents), **outcome)


def shared_environment(nodes: list[Node], here: str) -> dict[str, str]:
    """Return what leads runs on the nodes to the store.

    Raises
    ------
    ExperimentError
        When a node lies on another host and the store on this one's disk.
    """
    if server := server_uri():
        given = {name: os.environ[name] for name in CREDENTIALS if name in os.environ}
        return {SERVER_VARIABLE: server, **given}
    if any(node.address not in (here, "127.0.0.1") for node in nodes):
        raise ExperimentError(
            "the cluster has nodes on other hosts, which cannot write to the store on this disk. Start an MLflow "
            f"server that they reach (`mlflow server`, docs/how-to/write-a-sweep.md) and set {SERVER_VARIABLE} to it."
        )
    return {HOME_VARIABLE: str(project_root())}
