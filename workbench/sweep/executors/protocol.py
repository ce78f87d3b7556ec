"""What a sweep asks of the place that carries out its runs.

Terms: a *job* is one notebook with its parameters and the MLflow run it writes to. An executor starts jobs while it has
room and hands over their *endings*, each once. It does not write to the store: the sweep records what ended how. A
job that is *lost* ended with the machine it ran on, through no fault of its own, and is worth another attempt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from workbench.sweep.schema import Needs

Kind = Literal["timing", "quality"]


@dataclass(frozen=True)
class Job:
    """One run to carry out.

    Attributes
    ----------
    run_id : str
        The MLflow run that the notebook writes to.
    kind : {"timing", "quality"}
        Timing wants the machine to itself.
    """

    run_id: str
    notebook: Path
    parameters: dict[str, Any]
    needs: Needs
    kind: Kind


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes
    ----------
    error, traceback : str
        One line, and all of it, after a failure.
    lost : bool
        The machine or its worker is gone; the notebook is not to blame.
    files : tuple of Path
        What is worth keeping with the run (executed notebook, output of the process), until `Executor.forget`.
    """

    run_id: str
    ok: bool
    error: str = ""
    traceback: str = ""
    lost: bool = False
    files: tuple[Path, ...] = ()


class Executor(Protocol):
    """A place that carries out jobs."""

    def stage(self, kind: Kind) -> AbstractContextManager[None]:
        """Hold what a stage of this kind needs, such as the machine alone, for as long as it lasts."""

    def has_room(self, needs: Needs, kind: Kind) -> bool:
        """Say whether such a job can start now; one that can never start is refused with an error."""

    def start(self, job: Job) -> None:
        """Start a job that there is room for."""

    def wait(self) -> list[Ending]:
        """Return the endings since the last call, after a short while also none."""

    def forget(self, ending: Ending) -> None:
        """Remove what was kept of a job that is recorded."""

    def stop(self) -> None:
        """End every job that runs, with all its processes, and let go of the place."""
