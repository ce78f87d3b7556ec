"""What a notebook draws: tables that it has just measured, or those that were recorded at full settings.

Recorded is what ships in ``results`` (`results_file`): of several runs of a notebook, the first in its sweep counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.machine.environment import IDENTITY
from workbench.progress import stage_bars
from workbench.tracking import run as tracking
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import RESULTS, read_results, recorded_sweeps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS_TAG = "emoe.prompts"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Findings:
    """Tables, and what they were measured on.

    Attributes
    ----------
    tables : mapping of str to DataFrame
        By the name under which they are logged; empty ones are left out.
    identity : mapping of str to scalar
        Model hash, data hash, dtype, seed, ...
    prompts : int
        Prompts of each stream (or requests) that the tables rest on: what a figure calls n.
    recorded : bool
        Whether they were read from a file.
    """

    tables: Mapping[str, pd.DataFrame]
    identity: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 0
    recorded: bool = False

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    def get(self, name: str) -> pd.DataFrame | None:
        """Return a table, None where there was nothing to put in it."""
        return self.tables.get(name)

    def log(
        self,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        tables: Mapping[str, pd.DataFrame] | None = None,
        figures: Mapping[str, Figure] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Log everything as one run (`tracking.run`) and return what became of it; what was recorded is logged already.

        Parameters
        ----------
        experiment, name : str
        parameters, metrics, tags : mapping
        tables, figures : mapping, optional
            What was made of the findings, beside their own tables.
        """
        if self.recorded:
            return f"not logged: this result was recorded ({self.provenance})"
        every = {PROMPTS_TAG: self.prompts, **(tags or {})}
        with tracking.run(experiment, name, params=parameters, tags=every, **self.identity) as run:
            run.log_metrics(metrics)
            for title, table in {**self.tables, **(tables or {})}.items():
                run.log_frame(title, table)
            for title, figure in (figures or {}).items():
                run.log_figure(title, figure)
        return "logged"

    @property
    def provenance(self) -> str:
        """What was measured, in one line."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.identity.items())


def findings(notebook: str, measure: bool, measuring: Callable[[Progress], Findings]) -> Findings:
    """Return a notebook's recorded result, or what ``measuring`` finds where it is to be measured.

    That is where ``measure`` says so, where nothing is recorded, and in a sweep, whose run must be its own.

    Parameters
    ----------
    notebook : str
        The notebook's file name without extension.
    measure : bool
    measuring : callable
        Takes a callback (stage, done, total), which draws bars.
    """
    if not measure and tracking.RUN_VARIABLE not in os.environ:
        recorded = recorded_run(notebook)
        if recorded is not None:
            return findings_of(recorded)
        print(f"No recorded result of {notebook} is at hand in {RESULTS}: it is measured.", file=sys.stderr)
    with stage_bars() as progress:
        return measuring(progress)


def recorded_run(notebook: str, folder: Path | None = None) -> RecordedRun | None:
    """Return the first recorded run of a notebook, None where there is none."""
    place = folder or RESULTS
    runs = (run for sweep in recorded_sweeps(place) for run in read_results(sweep, place).runs)
    return next((run for run in runs if run.notebook == notebook and run.status == "FINISHED"), None)


def findings_of(run: RecordedRun) -> Findings:
    """Return what a recorded run found."""
    identity = {name: run.environment[name] for name in IDENTITY if run.environment.get(name) is not None}
    return Findings(run.tables, identity, int(run.tags.get(PROMPTS_TAG, 0)), recorded=True)
