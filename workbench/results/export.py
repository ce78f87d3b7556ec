"""From the store to files that ship (`tracking/results_file.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emoe_core.errors import ExperimentError
from workbench.tracking.place import store_name
from workbench.tracking.record import RunRecord
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import RESULTS, SweepResults, write_results
from workbench.tracking.run import ENVIRONMENT_FILE, LOCK_FILE
from workbench.tracking.runs import OWNER_TAG, RECORDED_TAG, SOURCE_TAG, SUPERSEDED_TAG, current_runs, find_parent

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

NOTE_TAG = "mlflow.note.content"
# What says where and by whom a run was made, not what it ran.
_LEFT_OUT = (OWNER_TAG, SUPERSEDED_TAG, RECORDED_TAG)


def export_sweep(client: MlflowClient, sweep: str, folder: Path = RESULTS) -> tuple[SweepResults, list[Path]]:
    """Write the finished runs of a sweep to the files that ship, and return them with the files.

    Raises
    ------
    ExperimentError
        When the store has no such sweep, or none of its runs has finished.
    """
    parent = find_parent(client, sweep)
    runs = [] if parent is None else [run for run in current_runs(client, parent) if run.info.status == "FINISHED"]
    if parent is None or not runs:
        what = f"no sweep {sweep!r}" if parent is None else f"no finished run of sweep {sweep!r}"
        raise ExperimentError(f"the store at {store_name()} has {what}: `emoe sweep` makes them.")
    found = SweepResults(sweep, parent.data.tags.get(NOTE_TAG, ""), [_recorded(client, run) for run in runs])
    return found, write_results(found, folder)


def _recorded(client: MlflowClient, run: MlflowRun) -> RecordedRun:
    record = RunRecord.of(client, run)
    tags = {
        name: value
        for name, value in record.tags.items()
        if name not in _LEFT_OUT and (not name.startswith("mlflow.") or name == SOURCE_TAG)
    }
    tables = {name: record.table(name) for name in record.table_names}
    return RecordedRun(
        run_id=record.tags.get(RECORDED_TAG, record.run_id),
        name=record.name,
        status=record.status,
        started_ms=record.started_ms,
        ended_ms=run.info.end_time,
        params=dict(run.data.params),
        metrics=record.metrics,
        tags=tags,
        texts={name: text for name in (ENVIRONMENT_FILE, LOCK_FILE) if (text := record.text(name)) is not None},
        tables={name: table for name, table in tables.items() if table is not None},
    )
