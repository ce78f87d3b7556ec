"""What a sweep has done so far, read from and written to MLflow.

Terms: the *parent* is the run that stands for a sweep, its *children* are its runs. A child's digest (see
`sweep_points.Point`) says what it ran. A child is *current* when it is the newest of its digest and the sweep still
holds that digest; the others are kept but tagged as superseded. A child that claims to run while the process that owns
it is gone was killed.

There is no state outside the store: deleting runs in the MLflow interface is enough to have them run again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import psutil

from emoe_core.errors import ExperimentError
from workbench.tracking.run import PARENT_TAG, new_run

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

ROLE_TAG = "emoe.role"
SWEEP_TAG = "emoe.sweep"
DIGEST_TAG = "emoe.point"
NOTEBOOK_TAG = "emoe.notebook"
ERROR_TAG = "emoe.error"
KIND_TAG = "emoe.kind"
AXES_TAG = "emoe.axes"
SOURCE_TAG = "mlflow.source.name"
METRICS_TAG = "emoe.metrics"
INDEX_TAG = "emoe.index"
STUDY_TAG = "emoe.study"
SUPERSEDED_TAG = "emoe.superseded"
OWNER_TAG = "emoe.owner"
PAGE_CACHE_TAG = "emoe.page_cache"
PAGE_RUNS = 1000
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


def search(client: MlflowClient, filter_string: str, experiments: list[str] | None = None) -> list[MlflowRun]:
    """Return all runs that match, newest first."""
    ids = experiments or [str(item.experiment_id) for item in client.search_experiments()]
    found: list[Any] = []
    token: str | None = None
    while ids:
        page = client.search_runs(
            ids, filter_string, max_results=PAGE_RUNS, order_by=["attributes.start_time DESC"], page_token=token
        )
        found.extend(page)
        token = page.token
        if not token:
            break
    return found


def parents(client: MlflowClient) -> list[MlflowRun]:
    """Return the newest parent of every sweep in the store, newest first."""
    newest: dict[str, Any] = {}
    for item in search(client, f"tags.`{ROLE_TAG}` = 'sweep' AND tags.`{SWEEP_TAG}` != ''"):
        newest.setdefault(item.data.tags[SWEEP_TAG], item)
    return list(newest.values())


def find_parent(client: MlflowClient, name: str | None = None) -> MlflowRun | None:
    """Return the newest parent of the named sweep, or of any sweep when `name` is None."""
    return next((item for item in parents(client) if name in (None, item.data.tags[SWEEP_TAG])), None)


def children(client: MlflowClient, parent: MlflowRun) -> list[MlflowRun]:
    """Return all children of a sweep, newest first."""
    return search(client, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'", [str(parent.info.experiment_id)])


def listed_in(runs: Iterable[MlflowRun], tag: str) -> list[str]:
    """Return the names that a tag of the runs lists (`AXES_TAG`, `METRICS_TAG`), each once, in order."""
    return list(dict.fromkeys(name for item in runs for name in item.data.tags.get(tag, "").split(",") if name))


def current_runs(client: MlflowClient, parent: MlflowRun) -> list[MlflowRun]:
    """Return the current children of a sweep in the order of its file."""
    found = [item for item in children(client, parent) if item.data.tags.get(SUPERSEDED_TAG) != "true"]
    return sorted(found, key=_place)


def _place(run: MlflowRun) -> int:
    """Return the place of a run in its sweep, first where its tag is missing or was edited into no number."""
    try:
        return int(run.data.tags.get(INDEX_TAG, 0))
    except ValueError:
        return 0


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
