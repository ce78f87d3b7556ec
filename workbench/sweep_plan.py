"""What a sweep would do: its runs, which of them are finished, and how long the rest may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.store import open_store
from workbench.sweep_file import read_sweep
from workbench.sweep_points import Point, StagePlan, plan_stages
from workbench.sweep_schema import SweepFile
from workbench.sweep_search import known_points
from workbench.sweep_state import DIGEST_TAG, NOTEBOOK_TAG, children, find_parent, search

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class PlannedRun:
    """A run as a dry run shows it; `expected_s` is None where nothing is known."""

    label: str
    kind: str
    finished: bool
    expected_s: float | None


def describe_plan(path: Path) -> tuple[SweepFile, list[PlannedRun]]:
    """Return a sweep file and its runs; those that a search has not chosen yet are called by their number."""
    sweep = read_sweep(path)
    client = open_store()
    parent = find_parent(client, sweep.file.name)
    runs = [] if parent is None else children(client, parent)
    digests = {item.data.tags.get(DIGEST_TAG) for item in runs if item.info.status == "FINISHED"}
    expected = Expectation(client)
    planned: list[PlannedRun] = []
    for plan in plan_stages(sweep, path.parent):
        kind, seconds = plan.stage.kind, expected.of_stage(plan)
        points = [point for point, _ in known_points(plan, runs)] if plan.study else plan.points
        planned += [PlannedRun(point.label, kind, point.digest in digests, seconds) for point in points]
        if plan.study and plan.stage.search:
            label = " ".join(filter(None, [plan.notebook.stem, plan.stage.label, "search"]))
            rest = range(len(points), plan.stage.search.runs)
            planned += [PlannedRun(f"{label} {number + 1}", kind, False, seconds) for number in rest]
    return sweep.file, planned


class Expectation:
    """How long runs take: the mean of finished runs of the notebook, else what the sweep file expects."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._means: dict[str, float | None] = {}

    def of_point(self, point: Point) -> float | None:
        """Return the seconds that a point is expected to take, None where nothing is known."""
        return self._seconds(point.notebook.stem, point.stage.seconds_per_run)

    def of_stage(self, plan: StagePlan) -> float | None:
        """Return the seconds that each run of a stage is expected to take, None where nothing is known."""
        return self._seconds(plan.notebook.stem, plan.stage.seconds_per_run)

    def _seconds(self, name: str, otherwise: float | None) -> float | None:
        if name not in self._means:
            found = search(self._client, f"tags.`{NOTEBOOK_TAG}` = '{name}' AND attributes.status = 'FINISHED'")
            spans = [(item.info.end_time - item.info.start_time) / 1000 for item in found if item.info.end_time]
            self._means[name] = sum(spans) / len(spans) if spans else None
        mean = self._means[name]
        return otherwise if mean is None else mean
