"""What a sweep would do: its runs, which of them are finished, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from emoe_core.errors import did_you_mean
from workbench.sweep.file import read_sweep
from workbench.sweep.points import Point, StagePlan, chosen, plan_stages
from workbench.sweep.schema import Scalar, SweepFile
from workbench.tracking.runs import DIGEST_TAG, NOTEBOOK_TAG, children, find_parent, search
from workbench.tracking.store import encode, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class PlannedRun:
    """A run as a dry run shows it; `expected_s` is None where nothing is known."""

    label: str
    kind: str
    finished: bool
    expected_s: float | None


@dataclass(frozen=True)
class SweepPreview:
    """What a sweep would do, and what looks wrong about it."""

    file: SweepFile
    runs: list[PlannedRun]
    warnings: list[str]


def describe_plan(path: Path, given: Mapping[str, Scalar] | None = None, stage: str | None = None) -> SweepPreview:
    """Return what a sweep file would do; see `read_sweep` for what is given, `chosen` for a stage."""
    sweep = read_sweep(path, given)
    client = open_store()
    parent = find_parent(client, sweep.file.name)
    runs = [] if parent is None else children(client, parent)
    digests = {item.data.tags.get(DIGEST_TAG) for item in runs if item.info.status == "FINISHED"}
    expected = Expectation(client)
    plans = chosen(plan_stages(sweep, path.parent), stage)
    found = SweepPreview(sweep.file, [], expected.warnings(plans))
    for plan in plans:
        kind, seconds = plan.stage.kind, expected.seconds(plan)
        found.runs.extend(PlannedRun(point.label, kind, point.digest in digests, seconds) for point in plan.points)
    return found


class Expectation:
    """How long runs take and what they record, by earlier runs of the same notebook.

    Finished runs with the stage's fixed settings say it best, then the sweep file, then runs with other settings.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._found: dict[str, list[MlflowRun]] = {}
        self._alike: dict[tuple[str, str], list[MlflowRun]] = {}

    def seconds(self, of: Point | StagePlan) -> float | None:
        """Return the seconds that a point, or each run of a stage, is expected to take; None where nothing is known."""
        return mean_seconds(self._runs_like(of)) or of.stage.seconds_per_run or mean_seconds(self._runs(of))

    def warnings(self, plans: Sequence[StagePlan]) -> list[str]:
        """Return what is to be said of metrics that stages ask for and finished runs like theirs did not record."""
        told: dict[str, None] = {}
        for plan in plans:
            recorded = {name for item in self._runs_like(plan) for name in item.data.metrics}
            for name in plan.stage.metrics if recorded else ():
                if name not in recorded:
                    meant = did_you_mean(get_close_matches(name, recorded))
                    told[f"No finished run of {plan.notebook.stem} recorded the metric {name!r}.{meant}"] = None
        return list(told)

    def _runs_like(self, of: Point | StagePlan) -> list[MlflowRun]:
        fixed = {name: encode(value) for name, value in of.stage.fixed.items()}
        key = (of.notebook.stem, repr(sorted(fixed.items())))
        if key not in self._alike:
            self._alike[key] = [item for item in self._runs(of) if fixed.items() <= item.data.params.items()]
        return self._alike[key]

    def _runs(self, of: Point | StagePlan) -> list[MlflowRun]:
        name = of.notebook.stem
        if name not in self._found:
            wanted = f"tags.`{NOTEBOOK_TAG}` = '{name}' AND attributes.status = 'FINISHED'"
            self._found[name] = search(self._client, wanted)
        return self._found[name]


def mean_seconds(runs: Sequence[MlflowRun]) -> float | None:
    """Return how long runs took on average, None of none."""
    spans = [(item.info.end_time - item.info.start_time) / 1000 for item in runs if item.info.end_time]
    return sum(spans) / len(spans) if spans else None
