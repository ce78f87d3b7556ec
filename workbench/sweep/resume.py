"""What a sweep has done so far, read from and written to MLflow.

A child (terms: `tracking/runs.py`) that claims to run while the process that owns it is gone was killed.

There is no state outside the store: deleting runs in the MLflow interface is enough to have them run again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import psutil

from emoe_core.errors import ExperimentError
from workbench.tracking.run import new_run
from workbench.tracking.runs import DIGEST_TAG, OWNER_TAG, ROLE_TAG, SUPERSEDED_TAG, SWEEP_TAG, children

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

ERROR_LETTERS = 2000


def owner_tag() -> str:
    """Return a mark of this process that no later process can bear: host, process id and its start time."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_alive(owner: str) -> bool:
    """Say whether the process of an `owner_tag` runs; a process of another machine counts as alive."""
    host, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname():
        return bool(host)
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == started
    except (psutil.NoSuchProcess, ValueError):
        return False


def start_parent(client: MlflowClient, name: str, tags: dict[str, str]) -> str:
    """Make the parent of a sweep that starts afresh."""
    every = {ROLE_TAG: "sweep", SWEEP_TAG: name, "mlflow.source.type": "LOCAL", **tags}
    return new_run(client, name, f"sweep {name}", tags=every)


def refuse_running_elsewhere(parent: MlflowRun) -> None:
    """Refuse a sweep that another process is at, which only a store on a server lets two machines come to.

    Raises
    ------
    ExperimentError
        That names the process.
    """
    owner = parent.data.tags.get(OWNER_TAG, "")
    if parent.info.status == "RUNNING" and owner != owner_tag() and is_alive(owner):
        raise ExperimentError(
            f"sweep {parent.data.tags[SWEEP_TAG]!r} is already running (host:process {owner.rpartition(':')[0]}). "
            "Stop it first; if that machine is gone for good, --take-over goes on in its place."
        )


def reconcile(
    client: MlflowClient, parent: MlflowRun, digests: Collection[str], *, take_over: bool = False
) -> dict[str, MlflowRun]:
    """Bring the children of a resumed sweep up to date and return the finished ones by digest.

    Runs of dead processes become KILLED, with `take_over` also those of other machines. Everything that is not
    finished, or not part of the sweep any more, is tagged as superseded.
    """
    finished: dict[str, Any] = {}
    for item in children(client, parent):
        tags, status = item.data.tags, item.info.status
        if status == "RUNNING" and (take_over or not is_alive(tags.get(OWNER_TAG, ""))):
            client.set_terminated(item.info.run_id, "KILLED")
            status = "KILLED"
        digest = tags.get(DIGEST_TAG, "")
        if status == "FINISHED" and digest in digests and digest not in finished:
            finished[digest] = item
            if tags.get(SUPERSEDED_TAG) != "false":
                client.set_tag(item.info.run_id, SUPERSEDED_TAG, "false")
        elif status != "RUNNING" and tags.get(SUPERSEDED_TAG) != "true":
            client.set_tag(item.info.run_id, SUPERSEDED_TAG, "true")
    return finished
