"""Run a sweep: one fresh process per point, recorded in MLflow, resumable.

A sweep resumes by default: finished runs are skipped, failed and killed ones are done again, under the same parent
run. One run that fails is recorded as FAILED with its error and its executed notebook, and the sweep goes on; a run
that is lost with its machine is tried again; only a disk that cannot be written stops a sweep.

What a file may say is the matter of `sweep_schema`, which runs it stands for that of `sweep_points`, where they are
carried out that of `executors`, what has been done before that of `sweep_state`, what is written that of
`sweep_record`, and what is seen meanwhile that of `sweep_screen`.
"""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from emoe_core.errors import ExperimentError, OptionError
from workbench.sweep.executors.choice import ExecutorMaker
from workbench.sweep.executors.local import LocalExecutor
from workbench.sweep.executors.protocol import Ending, Executor, Kind
from workbench.sweep.file import read_sweep
from workbench.sweep.plan import Expectation
from workbench.sweep.points import Point, StagePlan, chosen, plan_stages
from workbench.sweep.record import SweepRecord
from workbench.sweep.schema import Scalar
from workbench.sweep.screen import SweepScreen
from workbench.tracking.place import server_uri, store_dir
from workbench.tracking.runs import DRIFT_LIMIT
from workbench.tracking.store import locked, open_store
from workbench.tracking.store_errors import DeletedError, disk_reason

MAX_WRITERS = 4  # more sqlite writers than this want an MLflow server
MAX_SERVER_WRITERS = 64
ATTEMPTS = 3  # of a run that is lost with its machine


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


@dataclass(frozen=True)
class Part:
    """Successive points of a sweep that may run at the same time."""

    kind: Kind
    points: list[Point]
    expected_s: float | None


@dataclass(frozen=True)
class Attempt:
    """A point that is carried out for the n-th time."""

    point: Point
    number: int = 1


def run_sweep(
    path: Path,
    *,
    given: Mapping[str, Scalar] | None = None,
    stage: str | None = None,
    fresh: bool = False,
    jobs: int | None = None,
    take_over: bool = False,
    console: Console | None = None,
    executor: ExecutorMaker | None = None,
) -> SweepResult:
    """Run every point of a sweep file that the store does not hold as finished.

    Parameters
    ----------
    path : Path
        The sweep file.
    given : mapping of str to scalar, optional
        Values in place of what its stages fix; see `read_sweep`.
    stage : str, optional
        Only the stages with this label (`chosen`); the others' runs stay as they are.
    fresh : bool
        Start a new parent run and do everything again.
    jobs : int, optional
        Runs at once in `quality` stages; by default as many as the machine has cores, memory and GPUs for.
    take_over : bool
        Go on with a sweep that the store calls running on a machine that is gone.
    console : Console, optional
        Where progress is shown.
    executor : callable, optional
        Makes the place to run at; this machine when missing.

    Raises
    ------
    ExperimentError
        When the file, a notebook or a parameter is not usable, the sweep already runs, or the disk is full.
    KeyboardInterrupt
        On Ctrl-C and SIGTERM, after the runs under way were marked as KILLED.
    """
    most = MAX_SERVER_WRITERS if server_uri() else MAX_WRITERS
    if jobs is not None and not 1 <= jobs <= most:
        more = "" if server_uri() else "; more writers than that need an MLflow server (`mlflow server`)"
        raise OptionError(f"--jobs {jobs}: give 1 to {most}{more}.")
    sweep = read_sweep(path, given)
    plans = plan_stages(sweep, path.parent)
    wanted = chosen(plans, stage)
    screen = SweepScreen(console or Console(stderr=True))
    client = open_store()
    with locked(f"sweep-{sweep.file.name}", wait=False) as mine:
        if not mine:
            raise ExperimentError(f"sweep {sweep.file.name!r} is already running. Wait for it, or stop it first.")
        scratch = store_dir() / "running" / sweep.file.name
        place = (executor or LocalExecutor)(scratch, most=most, jobs=jobs, tell=screen.say)
        with terminated_like_interrupted():
            record = SweepRecord(client, sweep.file, plans, fresh=fresh, take_over=take_over)
            return _Sweep(record, place, screen, Expectation(client)).run(wanted)


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

    def __init__(self, record: SweepRecord, place: Executor, screen: SweepScreen, expected: Expectation) -> None:
        self.record, self.place, self.screen, self.expected = record, place, screen, expected
        self.running: dict[str, Attempt] = {}
        self.result = SweepResult(record.parent_id)

    def run(self, plans: Sequence[StagePlan]) -> SweepResult:
        status = "KILLED"
        try:
            for warning in self.expected.warnings(plans):
                self.screen.say(f"[yellow]{escape(warning)}[/]")
            parts = self._parts(plans)
            self._announce(parts)
            with self.screen.shown():
                for part in parts:
                    with self.place.stage(part.kind):
                        self._run_part(part)
            self.record.refuse_deleted()
            self._tell_drift(plans)
            status = "FAILED" if self.result.failed else "FINISHED"
        except KeyboardInterrupt:
            self.screen.say("[yellow]Stopped.[/] The same command goes on from here.")
            raise
        finally:
            self.place.stop()
            self.record.close(status)
        return self.result

    def _tell_drift(self, plans: Sequence[StagePlan]) -> None:
        drift = self.record.mark_drift(plans)
        if drift is not None and abs(drift[1]) > DRIFT_LIMIT:
            self.screen.say(
                f"[yellow]The machine drifted: {drift[0]} of the control moved by {drift[1]:+.1%} from its first to "
                "its last run.[/] --fresh times all again."
            )

    def _parts(self, plans: Sequence[StagePlan]) -> list[Part]:
        """Return what is left to do; neighbours of one kind are one part."""
        parts: list[Part] = []
        for kind, stages in groupby(plans, key=lambda plan: plan.stage.kind):
            points = [point for plan in stages for point in plan.points]
            todo = [point for point in points if point.digest not in self.record.finished]
            self.result.skipped.extend(point.label for point in points if point.digest in self.record.finished)
            expected = [self.expected.seconds(point) for point in todo]
            known_s = sum(value for value in expected if value)
            parts.append(Part(kind, todo, known_s if all(expected) else None))
        return [part for part in parts if part.points]

    def _announce(self, parts: Sequence[Part]) -> None:
        total = sum(len(part.points) for part in parts)
        if done := len(self.result.skipped):
            self.screen.say(f"{done} of {total + done} runs are already finished.")
            if elsewhere := self.record.other_commits():
                self.screen.say(
                    f"[yellow]Some come from another commit ({', '.join(elsewhere)});[/] --fresh runs all again."
                )
        seconds = [part.expected_s for part in parts]
        self.screen.announce(total, None if None in seconds else sum(value or 0.0 for value in seconds))

    def _run_part(self, part: Part) -> None:
        waiting = deque(Attempt(point) for point in part.points)
        while self.running or waiting:
            while waiting and self._start_if_room(waiting[0]):
                waiting.popleft()
            for ending in self.place.wait():
                again = self._end(ending)
                if again is not None:
                    waiting.appendleft(again)

    def _start_if_room(self, attempt: Attempt) -> bool:
        if not self.place.has_room(attempt.point.needs, attempt.point.stage.kind):
            return False
        job = self.record.begin(attempt.point)
        self.place.start(job)
        self.running[job.run_id] = attempt
        self.screen.began(job.run_id, attempt.point, self.expected.seconds(attempt.point))
        return True

    def _end(self, ending: Ending) -> Attempt | None:
        """Record how a run ended; return what to try again when it was lost."""
        attempt = self.running.pop(ending.run_id)
        again = ending.lost and attempt.number < ATTEMPTS
        metrics: dict[str, float] = {}
        try:
            metrics = self.record.end(ending, again=again)
        except DeletedError as error:
            again, ending = False, replace(ending, ok=False, error=str(error))
        self.place.forget(ending)
        label = attempt.point.label
        outcome = "finished" if ending.ok else "lost" if again else "failed"
        self.screen.ended(ending.run_id, outcome, ending.error, metrics)
        if again:
            return Attempt(attempt.point, attempt.number + 1)
        (self.result.finished if ending.ok else self.result.failed).append(label)
        if full := None if ending.ok else disk_reason(ending.error):
            raise ExperimentError(
                f"a run could not write: {full}. Make room and run the same command again; finished runs are kept."
            )
        return None
