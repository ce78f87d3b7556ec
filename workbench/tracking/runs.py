"""Sweeps in the store: which runs belong to which, by their tags.

Terms: the *parent* is the run that stands for a sweep, its *children* are its runs. A child's digest (see
`sweep/points.py`) says what it ran. A child is *current* when it is the newest of its digest and the sweep still holds
that digest; the others are kept but tagged as superseded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from workbench.tracking.run import PARENT_TAG

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
# Of a sweep's parent: how far its control's metric moved from the first to the last run, and which: "+0.0312 tpot_s".
DRIFT_TAG = "emoe.drift"
DRIFT_LIMIT = 0.03
SUPERSEDED_TAG = "emoe.superseded"
OWNER_TAG = "emoe.owner"
PAGE_CACHE_TAG = "emoe.page_cache"
# The id that a run had in the store where it was recorded; only runs that were taken from elsewhere have it.
RECORDED_TAG = "emoe.recorded"
PAGE_RUNS = 1000


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


def drift_of(parent: MlflowRun) -> tuple[str, float] | None:
    """Return the control's metric that drifted most in a sweep, and by what share; None where there was no control."""
    share, _, name = parent.data.tags.get(DRIFT_TAG, "").partition(" ")
    return (name, float(share)) if name else None


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
