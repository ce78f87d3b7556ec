"""Run a sweep of `device_point.py` without MLflow and papermill, and leave run records and a page.

The sweep file is read as `emoe sweep` reads it, and each of its points is measured by the function that its notebook
calls. A record (`tracking/run_file.py`) carries the point's digest, and ``emoe results import FOLDER`` makes of it
the run that the sweep would have made. What is recorded is not measured again; what failed is tried again.

On another device than the file names, points have digests of their own. Where that device is no GPU the sweep is called
a rehearsal, in the name of each record, in its tags and on the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emoe_core.errors import EmoeError
from workbench.bench.device_page import REHEARSAL_TAG, tests_in, write_page
from workbench.bench.device_point import DevicePoint, measure_point
from workbench.machine.environment import code_hash, describe_environment
from workbench.results.taking import CODE_TAG
from workbench.sweep.file import read_sweep
from workbench.sweep.points import MODEL_PARAMETER, plan_stages, point_digest
from workbench.sweep.record import run_tags
from workbench.tracking.notebook import notebook_parameters
from workbench.tracking.parameters import config_from
from workbench.tracking.run_file import RunFile, recorded_runs
from workbench.tracking.runs import DIGEST_TAG, ERROR_TAG

RUNS, PAGE = "runs", "gpu.md"
# How long after its time the last run may end.
GRACE_S = 25.0
Tell = Callable[[str], object]


@dataclass(frozen=True)
class DeviceRun:
    """One run to make: its name, the notebook's parameters, and the tags that place it in its sweep."""

    label: str
    parameters: dict[str, Any]
    tags: dict[str, str]
    expected_s: float

    @property
    def digest(self) -> str:
        """What the sweep knows it by."""
        return self.tags[DIGEST_TAG]


@dataclass(frozen=True)
class SweepOutcome:
    """How many runs are recorded, failed and left for the next call, and the page."""

    recorded: int
    failed: int
    left: int
    page: Path


def rehearsed(device: str) -> bool:
    """Whether figures of a device say nothing of a GPU."""
    return not device.startswith("cuda")


def planned_runs(file: Path, device: str) -> list[DeviceRun]:
    """Return the runs of a sweep file on a device, in order; ExperimentError, with a line, when the file is wrong."""
    sweep = read_sweep(file)
    name = f"{sweep.file.name}-rehearsal-{device}" if rehearsed(device) else sweep.file.name
    told, marks = (f"REHEARSAL on {device}: ", {REHEARSAL_TAG: device}) if rehearsed(device) else ("", {})
    runs, code = [], code_hash()
    for plan in plan_stages(sweep, file.parent):
        defaults = {key: item.literal() for key, item in notebook_parameters(plan.notebook).items()}
        for point in plan.points:
            swept = {**point.parameters, "device": device}
            digest = point_digest(plan.source, swept, swept.get(MODEL_PARAMETER, plan.model))
            tags = {**run_tags(name, replace(point, parameters=swept, digest=digest)), CODE_TAG: code, **marks}
            seconds = plan.stage.seconds_per_run or 30.0
            runs.append(DeviceRun(told + point.label, defaults | swept, tags, seconds))
    return runs


def run_device_sweep(file: Path, device: str, out: Path, minutes: float, tell: Tell) -> SweepOutcome:
    """Measure what is not recorded yet.

    Parameters
    ----------
    file : Path
        Sweep file whose notebook takes the fields of `DevicePoint`.
    device : str
        In place of the file's.
    out : Path
        Gets ``runs`` and the page; the same call goes on there.
    minutes : float
        No run is begun that is expected to end later than this from now, and none ends much later.
    tell : callable
        Called with a line when a run begins and ends.
    """
    runs, began = planned_runs(file, device), time.monotonic()
    until = began + 60 * minutes
    status = {run.tags[DIGEST_TAG]: run.status for run in recorded_runs(out / RUNS)}
    todo = [run for run in runs if status.get(run.digest) != "FINISHED"]
    taken: dict[float, list[float]] = {}
    failed = left = 0
    for place, run in enumerate(todo):
        seen = taken.setdefault(run.expected_s, [])
        expected_s = sum(seen) / len(seen) if seen else run.expected_s
        if time.monotonic() + expected_s > until:
            left = len(todo) - place
            tell(f"{left} runs are left: {minutes:g} minutes are over. The same command goes on.")
            break
        tell(f"[{len(runs) - len(todo) + place + 1}/{len(runs)}] {run.label} ...")
        started = time.monotonic()
        error = _measure(run, out / RUNS / run.digest, tell, until + GRACE_S - started)
        seen.append(time.monotonic() - started)
        failed += error is not None
        tell(f"    {error or 'done'} ({seen[-1]:.0f} s)")
        page(out, runs)
    return SweepOutcome(len(runs) - failed - left, failed, left, page(out, runs))


def page(out: Path, runs: Sequence[DeviceRun]) -> Path:
    """Write the page of what is recorded of some runs, and return it."""
    known = {record.tags.get(DIGEST_TAG): record for record in recorded_runs(out / RUNS)}
    return write_page(out / PAGE, [known[run.digest] for run in runs if run.digest in known], tests_in(out))


def _measure(run: DeviceRun, folder: Path, tell: Tell, within_s: float) -> str | None:
    """Measure one run and record it; return what went wrong, if anything did."""
    stages: list[str] = []

    def report(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.append(stage)
            tell(f"    {stage}")

    record = RunFile(folder, run.label, run.tags, describe_environment(seed=run.parameters.get("seed")))
    record.log_params(run.parameters)
    try:
        found = measure_point(config_from(DevicePoint, run.parameters), report, within_s)
    except EmoeError as error:
        record.log_tags({ERROR_TAG: error})
        record.end("FAILED")
        return f"FAILED: {error}"
    record.log_environment(describe_environment(**found.identity))
    record.log_metrics(found["speed"].iloc[0].to_dict())
    for name, table in found.tables.items():
        record.log_frame(name, table)
    record.end("FINISHED")
    return None
