"""Runs that were recorded to files on another machine (`tracking/run_file.py`) become runs of this store's sweeps.

They join the sweep that their tags name, with the digests of what they ran, so that `emoe sweep` counts those that its
file still holds as finished. A record is taken once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emoe_core.errors import ExperimentError
from workbench.machine.environment import code_hash, describe_environment
from workbench.sweep.file import read_sweep
from workbench.sweep.resume import start_parent
from workbench.tracking.run import DATA_FOLDER, new_run
from workbench.tracking.run_file import ARTIFACT_FOLDER, RecordedRun, recorded_runs
from workbench.tracking.runs import DIGEST_TAG, SUPERSEDED_TAG, SWEEP_TAG, children, find_parent
from workbench.tracking.store import open_store
from workbench.tracking.view import arrange_view

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# Tells the code that was measured where the machine had no checkout to take a revision from.
CODE_TAG = "emoe.code"
COMMIT_TAG, UNKNOWN_COMMIT = "env.commit", "unknown"


def import_runs(file: Path, folder: Path) -> tuple[int, int]:
    """Take the records in a folder into the store, as runs of the sweep of a file or of its rehearsals.

    Returns
    -------
    tuple of int
        How many records were taken, and how many had been before.

    Raises
    ------
    ExperimentError
        When the folder holds none, one is damaged, or one is another sweep's.
    """
    sweep, records = read_sweep(file).file.name, recorded_runs(folder)
    if not records:
        raise ExperimentError(f"{folder} holds no recorded runs. `make gpu` writes them to build/gpu/runs.")
    names = sorted({record.tags.get(SWEEP_TAG, "") for record in records})
    other = [name for name in names if name != sweep and not name.startswith(f"{sweep}-rehearsal-")]
    if other:
        raise ExperimentError(f"{folder} holds runs of {', '.join(map(repr, other))}, {file} is sweep {sweep!r}.")
    client = open_store()
    taken = sum(_import(client, name, records) for name in names)
    return taken, len(records) - taken


def _import(client: MlflowClient, sweep: str, records: Sequence[RecordedRun]) -> int:
    parent = find_parent(client, sweep)
    parent_id = parent.info.run_id if parent else start_parent(client, sweep, {})
    before = children(client, client.get_run(parent_id))
    known = {(item.data.tags.get(DIGEST_TAG), item.info.start_time) for item in before}
    taken = 0
    for record in records:
        digest, started_ms = record.tags[DIGEST_TAG], record.info["start_time"]
        if record.tags[SWEEP_TAG] != sweep or (digest, started_ms) in known:
            continue
        for item in before:
            if item.data.tags.get(DIGEST_TAG) == digest:
                client.set_tag(item.info.run_id, SUPERSEDED_TAG, "true")
        label = str(record.info["run_name"])
        run_id = new_run(client, sweep, label, parent=parent_id, tags=_tags(record), started_ms=started_ms)
        _fill(client, run_id, record)
        client.set_terminated(run_id, record.info["status"], record.info["end_time"])
        taken += 1
    client.set_terminated(parent_id, "FINISHED")
    arrange_view(client, client.get_run(parent_id))
    return taken


def _tags(record: RecordedRun) -> dict[str, str]:
    """Return a record's tags; where no revision could be read, this one's if its code is what was measured."""
    tags = dict(record.tags)
    if tags.get(COMMIT_TAG) == UNKNOWN_COMMIT and tags.get(CODE_TAG) == code_hash():
        tags[COMMIT_TAG] = describe_environment().tags()[COMMIT_TAG]
    return tags


def _fill(client: MlflowClient, run_id: str, record: RecordedRun) -> None:
    from mlflow.entities import Metric, Param

    ended_ms = record.info["end_time"]
    client.log_batch(
        run_id,
        [Metric(name, value, ended_ms, 0) for name, value in record.metrics.items()],
        [Param(name, value) for name, value in record.params.items()],
    )
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(record.folder / ARTIFACT_FOLDER, scratch, dirs_exist_ok=True)
        for file in (Path(scratch) / DATA_FOLDER).glob("*.json"):
            table = record.table(file.stem)
            assert table is not None
            table.to_parquet(file.with_suffix(".parquet"))
            file.unlink()
        client.log_artifacts(run_id, scratch)
