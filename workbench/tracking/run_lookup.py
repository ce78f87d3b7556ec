"""From what a user types to recorded runs: an id, the start of one, a run's name, or a sweep's name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.tracking.place import store_name
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import ROLE_TAG, SUPERSEDED_TAG, SWEEP_TAG, current_runs, find_parent, parents, search

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_ID = re.compile(r"[0-9a-f]{4,32}")
SHOWN = 8


@dataclass(frozen=True)
class Found:
    """What a text stands for: one run, or the current runs of a sweep in the order of its file."""

    title: str
    runs: list[RunRecord]
    is_sweep: bool


def find_runs(client: MlflowClient, text: str) -> Found:
    """Return what a text names, tried in this order: run id, sweep, run name, start of a run id.

    Raises
    ------
    ExperimentError
        When it names nothing, or more than one run.
    """
    if re.fullmatch(r"[0-9a-f]{32}", text):
        exact = search(client, f"attributes.run_id = '{text}'")
        if exact:
            return _found(client, exact[0])
    parent = find_parent(client, text)
    if parent is not None:
        return _found(client, parent)
    named = []
    if text and "'" not in text and '"' not in text:
        named = [
            item
            for item in search(client, f"attributes.run_name = '{text}'")
            if item.data.tags.get(SUPERSEDED_TAG) != "true"
        ]
    if not named and RUN_ID.fullmatch(text):
        named = search(client, f"attributes.run_id LIKE '{text}%'")
    if len(named) == 1:
        return _found(client, named[0])
    if named:
        listing = "\n".join(f"  {item.info.run_id}  {RunRecord.of(client, item).describe()}" for item in named[:SHOWN])
        more = f"\n  and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        raise ExperimentError(f"{text!r} names {len(named)} runs; give the start of an id instead:\n{listing}{more}")
    sweeps = ", ".join(item.data.tags[SWEEP_TAG] for item in parents(client)) or "none"
    newest = [RunRecord.of(client, item).describe() for item in search(client, "")[:3]]
    raise ExperimentError(
        f"the store at {store_name()} has no run or sweep {text!r}. Give a run's id or the start of it (4 letters or "
        f"more), its name, or a sweep's name. Sweeps: {sweeps}. Newest runs: {', '.join(newest) or 'none'}."
    )


def find_run(client: MlflowClient, text: str) -> RunRecord:
    """Return the one run that a text names; a sweep is refused."""
    found = find_runs(client, text)
    if found.is_sweep:
        listing = "\n".join(f"  {run.run_id}  {run.name}" for run in found.runs)
        raise ExperimentError(f"{text!r} is a sweep; name one of its runs:\n{listing}")
    return found.runs[0]


def _found(client: MlflowClient, run: Any) -> Found:
    if run.data.tags.get(ROLE_TAG) != "sweep":
        record = RunRecord.of(client, run)
        return Found(f"run {record.describe()}", [record], False)
    runs = [RunRecord.of(client, item) for item in current_runs(client, run)]
    parent = RunRecord.of(client, run)
    return Found(f"{parent.describe()}, {len(runs)} runs", runs, True)
