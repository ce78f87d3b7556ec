"""Run a sweep: one fresh process per point, recorded in MLflow, resumable.

A sweep resumes by default: finished runs are skipped, failed and killed ones are done again, under the same parent
run. One run that fails is recorded as FAILED with its error and its executed notebook, and the sweep goes on; only a
disk that cannot be written stops it. `timing` stages run alone on the machine (an exclusive lock that other sweeps of
the same store wait for), `quality` stages may run several runs at once.

What a file may say is `sweep_file`'s matter, what has been done before `sweep_state`'s, and how one notebook is
executed `sweep_run`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emoe_core.errors import ExperimentError, OptionError
from workbench.busy import busy_warning
from workbench.environment import available_cores, git_revision
from workbench.quantities import show, show_seconds, words_of
from workbench.store import (
    HOME_VARIABLE,
    disk_errors,
    disk_reason,
    encode,
    locked,
    open_store,
    project_root,
    store_dir,
)
from workbench.sweep_file import Point, SweepFile, expand, read_sweep
from workbench.sweep_state import (
    DIGEST_TAG,
    ERROR_TAG,
    METRICS_TAG,
    NOTEBOOK_TAG,
    OWNER_TAG,
    SWEEP_TAG,
    find_parent,
    owner_tag,
    reconcile,
    search,
    start_parent,
)
from workbench.tracking import RUN_VARIABLE, new_run

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

POLL_S = 0.1
KILL_WAIT_S = 5.0
MAX_JOBS = 4  # more sqlite writers than this want an MLflow server
SHOWN_METRICS = 4


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: labels of the runs by outcome, and the parent run."""

    parent_run_id: str
    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Return 1 when a run failed, else 0."""
        return 1 if self.failed else 0


@dataclass
class Active:
    """A point whose process is running."""

    point: Point
    run_id: str
    folder: Path
    process: subprocess.Popen[bytes]
    started_s: float


def run_sweep(path: Path, *, fresh: bool = False, jobs: int = 1, console: Console | None = None) -> SweepResult:
    """Run every point of a sweep file that the store does not hold as finished.

    Parameters
    ----------
    path : Path
        The sweep file.
    fresh : bool
        Start a new parent run and do everything again.
    jobs : int
        Runs at once in `quality` stages, 1 to 4.
    console : Console, optional
        Where progress is shown.

    Raises
    ------
    ExperimentError
        When the file, a notebook or a parameter is not usable, the sweep already runs, or the disk is full.
    KeyboardInterrupt
        On Ctrl-C and SIGTERM, after the runs under way were marked as KILLED.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise OptionError(f"--jobs {jobs}: give 1 to {MAX_JOBS}; more writers than that need an MLflow server.")
    sweep = read_sweep(path)
    points = expand(sweep, path.parent)
    screen = console or Console(stderr=True)
    client = open_store()
    with locked(f"sweep-{sweep.name}", wait=False) as mine, terminated_like_interrupted():
        if not mine:
            raise ExperimentError(f"sweep {sweep.name!r} is already running. Wait for it, or stop it first.")
        return _Sweep(client, sweep, points, screen, jobs).run(fresh)


def describe_plan(path: Path) -> tuple[SweepFile, list[tuple[Point, str, float | None]]]:
    """Return the points of a sweep, each with ``finished`` or ``to do`` and its expected seconds if known."""
    sweep = read_sweep(path)
    points = expand(sweep, path.parent)
    client = open_store()
    parent = find_parent(client, sweep.name)
    done: set[str] = set()
    if parent is not None:
        found = search(client, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' AND attributes.status = 'FINISHED'")
        done = {item.data.tags.get(DIGEST_TAG, "") for item in found}
    seconds = {point.notebook.stem: expected_seconds(client, point) for point in points}
    return sweep, [(p, "finished" if p.digest in done else "to do", seconds[p.notebook.stem]) for p in points]


def expected_seconds(client: MlflowClient, point: Point) -> float | None:
    """Return the mean duration of finished runs of the point's notebook, else what the sweep file expects."""
    found = search(client, f"tags.`{NOTEBOOK_TAG}` = '{point.notebook.stem}' AND attributes.status = 'FINISHED'")
    spans = [(item.info.end_time - item.info.start_time) / 1000 for item in found if item.info.end_time]
    return sum(spans) / len(spans) if spans else point.stage.seconds_per_run


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM raise `KeyboardInterrupt` meanwhile, where this thread may handle signals."""

    def raise_interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, raise_interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Sweep:
    """The state of one call of `run_sweep`."""

    def __init__(
        self, client: MlflowClient, sweep: SweepFile, points: Sequence[Point], screen: Console, jobs: int
    ) -> None:
        self.client, self.sweep, self.points, self.screen, self.jobs = client, sweep, points, screen, jobs
        self.active: list[Active] = []
        self.scratch = store_dir() / "running" / sweep.name
        self.result = SweepResult("")

    def run(self, fresh: bool) -> SweepResult:
        todo = self._prepare(fresh)
        status = "KILLED"
        self._announce([point for _, point in todo])
        try:
            with self._progress() as bar:
                task = bar.add_task(self.sweep.name, total=len(todo))
                for kind, group in groupby(todo, key=lambda entry: entry[1].stage.kind):
                    with self._machine(kind):
                        self._run_group(list(group), 1 if kind == "timing" else self.jobs, bar, task)
            status = "FAILED" if self.result.failed else "FINISHED"
        except KeyboardInterrupt:
            self.screen.print("[yellow]Stopped.[/] The same command goes on from here.")
            raise
        finally:
            self._stop_active()
            with contextlib.suppress(ExperimentError), disk_errors():
                self.client.set_terminated(self.result.parent_run_id, status)
            shutil.rmtree(self.scratch, ignore_errors=True)
        return self.result

    def _prepare(self, fresh: bool) -> list[tuple[int, Point]]:
        """Find or make the parent run and return the points left to run, with their place in the sweep."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        parent = None if fresh else find_parent(self.client, self.sweep.name)
        finished: dict[str, Any] = {}
        commit = git_revision()[0] or "unknown"
        with disk_errors():
            if parent is None:
                tags = {"mlflow.note.content": self.sweep.description, "mlflow.source.name": self.sweep.name}
                run_id = start_parent(self.client, self.sweep.name, tags)
            else:
                run_id = parent.info.run_id
                finished = reconcile(self.client, parent, {point.digest for point in self.points})
                self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, OWNER_TAG, owner_tag())
            for index, point in enumerate(self.points):
                if point.digest in finished:
                    self.client.set_tag(finished[point.digest].info.run_id, "emoe.index", index)
        skipped = [point.label for point in self.points if point.digest in finished]
        self.result = SweepResult(run_id, skipped=skipped)
        if skipped:
            self.screen.print(f"{len(skipped)} of {len(self.points)} runs are already finished.")
            elsewhere = {item.data.tags.get("env.commit", "unknown").split()[0] for item in finished.values()} - {
                commit
            }
            if elsewhere:
                listing = ", ".join(sorted(revision[:10] for revision in elsewhere))
                self.screen.print(f"[yellow]Some come from another commit ({listing});[/] --fresh runs all again.")
        return [(index, point) for index, point in enumerate(self.points) if point.digest not in finished]

    def _announce(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        seconds = [expected_seconds(self.client, point) for point in todo]
        known = sum(value for value in seconds if value)
        about = f", about {show_seconds(known)}" if all(seconds) else ""
        self.screen.print(f"{len(todo)} runs to do{about}.")

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.screen,
            transient=True,
            disable=not self.screen.is_terminal,
        )

    @contextlib.contextmanager
    def _machine(self, kind: str) -> Iterator[None]:
        """Hold the machine alone for timing, shared for quality; say so when that means waiting."""
        shared = kind == "quality"
        with locked("machine", shared=shared, wait=False) as mine:
            if mine:
                yield
                return
        self.screen.print("Waiting for another sweep that measures time on this machine.")
        with locked("machine", shared=shared):
            yield

    def _run_group(self, todo: list[tuple[int, Point]], jobs: int, bar: Progress, task: Any) -> None:
        waiting = list(todo)
        while waiting or self.active:
            while waiting and len(self.active) < jobs:
                index, point = waiting.pop(0)
                bar.update(task, description=escape(point.label))
                self._start(index, point, jobs)
            for item in [item for item in self.active if item.process.poll() is not None]:
                self._finish(item)
                bar.advance(task)
            if self.active:
                time.sleep(POLL_S)

    def _start(self, index: int, point: Point, jobs: int) -> None:
        if not self.screen.is_terminal:
            # A terminal shows it in the bar.
            self.screen.print(f"started  {escape(point.label)}")
        tags = {
            OWNER_TAG: owner_tag(),
            SWEEP_TAG: self.sweep.name,
            DIGEST_TAG: point.digest,
            NOTEBOOK_TAG: point.notebook.stem,
            "emoe.kind": point.stage.kind,
            "emoe.axes": ",".join(point.axes),
            METRICS_TAG: ",".join(point.stage.metrics),
            "emoe.index": str(index),
            "mlflow.source.name": point.stage.notebook,
        }
        with disk_errors():
            run_id = new_run(self.client, self.sweep.name, point.label, parent=self.result.parent_run_id, tags=tags)
            for name, value in point.parameters.items():
                self.client.log_param(run_id, name, encode(value))
            folder = self.scratch / run_id
            folder.mkdir(parents=True)
            job = {
                "notebook": str(point.notebook),
                "output": str(folder / point.notebook.name),
                "parameters": point.parameters,
                "status": str(folder / "status.json"),
                "owner_pid": os.getpid(),
            }
            (folder / "job.json").write_text(json.dumps(job))
            environment = {**os.environ, HOME_VARIABLE: str(project_root()), RUN_VARIABLE: run_id}
            if jobs > 1:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
            with (folder / "process.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "workbench.sweep_run", str(folder / "job.json")],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self.active.append(Active(point, run_id, folder, process, time.monotonic()))

    def _finish(self, item: Active) -> None:
        """Record how a run ended and show it in one line."""
        outcome = self._outcome(item)
        with disk_errors():
            for name in (item.point.notebook.name, "process.log"):
                if (item.folder / name).is_file() and (item.folder / name).stat().st_size:
                    self.client.log_artifact(item.run_id, str(item.folder / name), "notebook")
            if not outcome["ok"]:
                self.client.set_tag(item.run_id, ERROR_TAG, outcome["error"][:2000])
                if "traceback" in outcome:
                    self.client.log_text(item.run_id, outcome["traceback"], "notebook/traceback.txt")
            self.client.set_terminated(item.run_id, "FINISHED" if outcome["ok"] else "FAILED")
        self.active.remove(item)
        shutil.rmtree(item.folder, ignore_errors=True)
        took = show_seconds(time.monotonic() - item.started_s)
        if outcome["ok"]:
            self.result.finished.append(item.point.label)
            self.screen.print(
                f"[green]finished[/] {escape(item.point.label)}  [dim]{took}[/]  {self._key_metrics(item)}"
            )
            return
        self.result.failed.append(item.point.label)
        self.screen.print(f"[red]failed[/]   {escape(item.point.label)}  [dim]{took}[/]  {escape(outcome['error'])}")
        full = disk_reason(outcome["error"])
        if full:
            raise ExperimentError(
                f"a run could not write: {full}. Make room and run the same command again; finished runs are kept."
            )

    def _outcome(self, item: Active) -> dict[str, Any]:
        status = item.folder / "status.json"
        if status.is_file() and status.stat().st_size:
            return dict(json.loads(status.read_text()))
        code = item.process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        lines = (item.folder / "process.log").read_text(errors="replace").strip().splitlines()
        return {"ok": False, "error": f"the run's process ended without a result ({how}) {lines[-1] if lines else ''}"}

    def _key_metrics(self, item: Active) -> str:
        metrics = self.client.get_run(item.run_id).data.metrics
        names = [name for name in item.point.stage.metrics if name in metrics] or sorted(metrics)[:SHOWN_METRICS]
        told = ", ".join(f"{words_of(name)} {show(name, metrics[name])}" for name in names)
        warning = busy_warning(metrics.get("others_cpu_share"))
        return f"{told}  [yellow]{warning}[/]" if warning else told

    def _stop_active(self) -> None:
        """Kill what still runs, kernels included, and record it as KILLED."""
        for item in self.active:
            victims: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                victims = psutil.Process(item.process.pid).children(recursive=True)
            item.process.kill()
            item.process.wait()
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            psutil.wait_procs(victims, timeout=KILL_WAIT_S)
            with contextlib.suppress(ExperimentError), disk_errors():
                self.client.set_terminated(item.run_id, "KILLED")
        self.active.clear()
