"""What a sweep writes to the store: its parent run, and how each of its runs began and ended.

Each attempt at a point is a run of its own, so that metrics of an attempt that was lost with its machine do not mix
with those of the next. Reading what earlier calls left behind is `sweep_state`'s matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.machine.environment import git_revision
from workbench.sweep.executors.protocol import Ending, Job
from workbench.sweep.points import Point, StagePlan
from workbench.sweep.resume import ERROR_LETTERS, owner_tag, reconcile, refuse_running_elsewhere, start_parent
from workbench.sweep.schema import SweepFile
from workbench.tracking.run import NOTEBOOK_FOLDER, new_run
from workbench.tracking.runs import (
    AXES_TAG,
    DIGEST_TAG,
    DRIFT_TAG,
    ERROR_TAG,
    INDEX_TAG,
    KIND_TAG,
    METRICS_TAG,
    NOTEBOOK_TAG,
    OWNER_TAG,
    SOURCE_TAG,
    SUPERSEDED_TAG,
    SWEEP_TAG,
    children,
    drift_of,
    find_parent,
)
from workbench.tracking.store import encode, experiment_id, recorded_metrics
from workbench.tracking.store_errors import DeletedError, StoreError
from workbench.tracking.view import arrange_view

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient


class SweepRecord:
    """One sweep's parent run and the runs under it.

    Attributes
    ----------
    parent_id : str
    finished : dict of str to run
        Finished runs of earlier calls by digest.
    """

    def __init__(
        self,
        client: MlflowClient,
        sweep: SweepFile,
        plans: Sequence[StagePlan],
        *,
        fresh: bool,
        take_over: bool = False,
    ) -> None:
        self._client, self._sweep = client, sweep
        points = [point for plan in plans for point in plan.points]
        self._open: dict[str, Point] = {}
        self.finished: dict[str, MlflowRun] = {}
        parent = None if fresh else find_parent(client, sweep.name)
        if parent is None:
            tags = {"mlflow.note.content": sweep.description, SOURCE_TAG: sweep.name}
            self.parent_id = start_parent(client, sweep.name, tags)
        else:
            if not take_over:
                refuse_running_elsewhere(parent)
            self.parent_id = parent.info.run_id
            self.finished = reconcile(client, parent, {point.digest for point in points}, take_over=take_over)
            client.update_run(self.parent_id, status="RUNNING")
        client.set_tag(self.parent_id, OWNER_TAG, owner_tag())
        for point in points:
            if point.digest in self.finished:
                client.set_tag(self.finished[point.digest].info.run_id, INDEX_TAG, point.index)

    def other_commits(self) -> list[str]:
        """Return the revisions, shortened, that finished runs come from and that are not today's."""
        commit = git_revision()[0] or "unknown"
        found = {item.data.tags.get("env.commit", "unknown").partition(" ")[0] for item in self.finished.values()}
        return sorted(revision[:10] for revision in found - {commit})

    def refuse_deleted(self) -> None:
        """Refuse to go on with a sweep that was deleted: nobody would find its runs.

        Raises
        ------
        ExperimentError
            That says how to have it back.
        """
        experiment_id(self._client, self._sweep.name)
        if self._client.get_run(self.parent_id).info.lifecycle_stage != "active":
            raise DeletedError(
                f"the run {self.parent_id} of sweep {self._sweep.name!r} was deleted in MLflow. The same command "
                "starts the sweep anew; restore that run first to go on from here."
            )

    def begin(self, point: Point) -> Job:
        """Make a run for a point and return the job to carry out; refuses a sweep that was deleted meanwhile."""
        self.refuse_deleted()
        tags = {OWNER_TAG: owner_tag(), **run_tags(self._sweep.name, point)}
        run_id = new_run(self._client, self._sweep.name, point.label, parent=self.parent_id, tags=tags)
        self._open[run_id] = point
        for name, value in point.parameters.items():
            self._client.log_param(run_id, name, encode(value))
        return Job(run_id, point.notebook, point.parameters, point.needs, point.stage.kind)

    def end(self, ending: Ending, *, again: bool = False) -> dict[str, float]:
        """Record how a run ended and return its metrics; `again` says that another attempt takes its place.

        Raises
        ------
        DeletedError
            When the run was deleted meanwhile.
        """
        for file in ending.files:
            self._client.log_artifact(ending.run_id, str(file), NOTEBOOK_FOLDER)
        if not ending.ok:
            self._client.set_tag(ending.run_id, ERROR_TAG, ending.error[:ERROR_LETTERS])
        if ending.traceback:
            self._client.log_text(ending.run_id, ending.traceback, f"{NOTEBOOK_FOLDER}/traceback.txt")
        if again:
            self._client.set_tag(ending.run_id, SUPERSEDED_TAG, "true")
        status = "FINISHED" if ending.ok else "KILLED" if again else "FAILED"
        self._client.set_terminated(ending.run_id, status)
        self._open.pop(ending.run_id)
        return recorded_metrics(self._client.get_run(ending.run_id))

    def mark_drift(self, plans: Sequence[StagePlan]) -> tuple[str, float] | None:
        """Tag the sweep with how far its controls drifted and return that; None without a finished pair."""
        parent = self._client.get_run(self.parent_id)
        runs = {item.data.tags[DIGEST_TAG]: item for item in reversed(children(self._client, parent))}
        moved: dict[str, float] = {}
        for plan in plans:
            pair = [stage.points[0].digest for stage in (plan.repeats, plan) if stage and plan.repeats]
            if not pair or not set(pair) <= set(runs):
                continue
            first, last = (recorded_metrics(runs[digest]) for digest in pair)
            for name in plan.stage.metrics:
                if first.get(name) and name in last:
                    moved[name] = max(moved.get(name, 0.0), last[name] / first[name] - 1, key=abs)
        if moved:
            most = max(moved, key=lambda name: abs(moved[name]))
            self._client.set_tag(self.parent_id, DRIFT_TAG, f"{moved[most]:+.4f} {most}")
        return drift_of(self._client.get_run(self.parent_id))

    def close(self, status: str) -> None:
        """End the sweep: runs that are still open were killed. A store that cannot be written does not stop this."""
        with contextlib.suppress(StoreError):  # at the first one: each would wait for a lock
            for run_id in self._open:
                self._terminate(run_id, "KILLED")
            self._terminate(self.parent_id, status)
            with contextlib.suppress(DeletedError):
                arrange_view(self._client, self._client.get_run(self.parent_id))
        self._open.clear()

    def _terminate(self, run_id: str, status: str) -> None:
        with contextlib.suppress(DeletedError):
            self._client.set_terminated(run_id, status)


def run_tags(sweep: str, point: Point) -> dict[str, str]:
    """Return the tags by which a run is found as a point's of a sweep."""
    return {
        SWEEP_TAG: sweep,
        DIGEST_TAG: point.digest,
        NOTEBOOK_TAG: point.notebook.stem,
        KIND_TAG: point.stage.kind,
        AXES_TAG: ",".join(point.axes),
        METRICS_TAG: ",".join(point.stage.metrics),
        INDEX_TAG: str(point.index),
        SUPERSEDED_TAG: "false",
        SOURCE_TAG: point.stage.notebook,
    }
