"""Runs that were recorded elsewhere become runs of this store: results that ship, and what `make gpu` wrote.

Of results that ship, a sweep of their own is made, ``NAME-recorded``: a user's own runs of sweep ``NAME`` are still to
be made, and lie beside them. What another machine measured for this store joins its sweep instead, with the digests of
what ran, so that `emoe sweep` counts it as finished. A run is taken once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emoe_core.errors import ExperimentError
from workbench.machine.environment import code_hash, describe_environment
from workbench.results.export import NOTE_TAG
from workbench.sweep.resume import start_parent
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import read_results, recorded_sweeps
from workbench.tracking.run import DATA_FOLDER, new_run
from workbench.tracking.run_file import recorded_runs
from workbench.tracking.runs import DIGEST_TAG, RECORDED_TAG, SUPERSEDED_TAG, SWEEP_TAG, children, find_parent
from workbench.tracking.view import arrange_view

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

RECORDED_ENDING = "-recorded"
# Tells the code that was measured where the machine had no checkout to take a revision from.
CODE_TAG = "emoe.code"
COMMIT_TAG, UNKNOWN_COMMIT = "env.commit", "unknown"


@dataclass(frozen=True)
class Taken:
    """What became of a sweep's recorded runs: how many are new in the store, and how many were there."""

    sweep: str
    new: int
    known: int


def take_results(client: MlflowClient, folder: Path, sweeps: Iterable[str] = (), *, join: bool = False) -> list[Taken]:
    """Take a folder of results, or of what `make gpu` recorded, into the store.

    Parameters
    ----------
    client : MlflowClient
    folder : Path
        With files of results (``NAME.runs.parquet``), or with folders of run files.
    sweeps : iterable of str
        Only these; all if empty.
    join : bool
        Make results runs of the sweep itself, which has them measured no more. Run files always join.

    Raises
    ------
    ExperimentError
        When the folder holds neither, or none of a sweep that was named, or something there is damaged.
    """
    shipped = recorded_sweeps(folder)
    if shipped:
        chosen = list(sweeps) or shipped
        found = [read_results(name, folder) for name in chosen]
        return [
            _take(client, each.sweep if join else each.sweep + RECORDED_ENDING, each.runs, each.description)
            for each in found
        ]
    records = recorded_runs(folder)
    by_sweep: dict[str, list[RecordedRun]] = {}
    for record in records:
        by_sweep.setdefault(record.tags.get(SWEEP_TAG, ""), []).append(record)
    missing = [name for name in sweeps if name not in by_sweep]
    if not records or missing:
        what = f"no recorded runs of {', '.join(map(repr, missing))}" if records else "no recorded runs"
        raise ExperimentError(
            f"{folder} holds {what}. Results that ship lie in results, and `make gpu` writes runs to build/gpu/runs."
        )
    return [_take(client, name, by_sweep[name], "") for name in (list(sweeps) or by_sweep)]


def _take(client: MlflowClient, sweep: str, records: Sequence[RecordedRun], description: str) -> Taken:
    parent = find_parent(client, sweep)
    parent_id = parent.info.run_id if parent else start_parent(client, sweep, {NOTE_TAG: description})
    before = children(client, client.get_run(parent_id))
    known = {_identity(item) for item in before}
    fresh = [record for record in records if not _identities(record) & known]
    for record in fresh:
        for item in before:
            if record.digest and item.data.tags.get(DIGEST_TAG) == record.digest:
                client.set_tag(item.info.run_id, SUPERSEDED_TAG, "true")
        tags = {**_tags(record), SWEEP_TAG: sweep, SUPERSEDED_TAG: "false"}
        run_id = new_run(client, sweep, record.name, parent=parent_id, tags=tags, started_ms=record.started_ms)
        _fill(client, run_id, record)
        client.set_terminated(run_id, record.status, record.ended_ms)
    client.set_terminated(parent_id, "FINISHED")
    arrange_view(client, client.get_run(parent_id))
    return Taken(sweep, len(fresh), len(records) - len(fresh))


def _identity(run: MlflowRun) -> tuple[str, int]:
    tags = run.data.tags
    return tags.get(RECORDED_TAG) or tags.get(DIGEST_TAG, ""), run.info.start_time


def _identities(record: RecordedRun) -> set[tuple[str, int]]:
    return {(name, record.started_ms) for name in (record.run_id, record.digest) if name}


def _tags(record: RecordedRun) -> dict[str, str]:
    """Return a record's tags; where no revision could be read, this one's if its code is what was measured."""
    tags = dict(record.tags) | ({RECORDED_TAG: record.run_id} if record.run_id else {})
    if tags.get(COMMIT_TAG) == UNKNOWN_COMMIT and tags.get(CODE_TAG) == code_hash():
        tags[COMMIT_TAG] = describe_environment().tags()[COMMIT_TAG]
    return tags


def _fill(client: MlflowClient, run_id: str, record: RecordedRun) -> None:
    from mlflow.entities import Metric, Param

    client.log_batch(
        run_id,
        [Metric(name, value, record.ended_ms, 0) for name, value in record.metrics.items()],
        [Param(name, value) for name, value in record.params.items()],
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in record.texts.items():
            file = Path(scratch) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        (Path(scratch) / DATA_FOLDER).mkdir()
        for name, table in record.tables.items():
            table.to_parquet(Path(scratch) / DATA_FOLDER / f"{name}.parquet")
        client.log_artifacts(run_id, scratch)
