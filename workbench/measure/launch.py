"""The measuring instrument: a spec goes into a fresh process, an answer or an outcome comes back.

Everything that is measured apart from this process passes here: answers that are served (`serving_job.py`), forced
tokens that are decoded (`decode_job.py`), what survives under a limit (`limit_job.py`), the all-resident reference and
the routing of a bench's tokens. A job is a module that answers with `job.answer_job`.

Two figures of memory come back, never to be mixed: ``peak_bytes`` of the answer is what was resident in the process
(VmHWM); `Launched.group_peak_bytes` is what the kernel held against a limit, page cache included. Both count the
interpreter and its libraries; who wants the model's share subtracts the same figure of a control process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe_core.errors import ExperimentError
from workbench.machine.control_groups import Controller
from workbench.measure.fresh_process import ProcessRun, run_process
from workbench.measure.job import NO_MEMORY as NO_MEMORY_CODE
from workbench.measure.job import PROGRESS

MEASURED, KILLED, NO_MEMORY = "measured", "killed by the limit", "out of memory"
TOO_SLOW, FAILED = "too slow", "failed"


@dataclass(frozen=True)
class Launched:
    """What became of a job. One that its limit ended is a result, not an error.

    Attributes
    ----------
    outcome : str
        `MEASURED`, `KILLED`, `NO_MEMORY`, `TOO_SLOW` or `FAILED`.
    found : dict
        The job's answer; empty unless measured.
    limit_bytes, group_peak_bytes : int or None
        The limit as the kernel took it, and the group's peak, page cache included; None without a limit.
    limit_hits : int
    error : str
        Last line of what a failed process said.
    duration_s : float
    """

    outcome: str
    found: dict[str, Any]
    limit_bytes: int | None = None
    group_peak_bytes: int | None = None
    limit_hits: int = 0
    error: str = ""
    duration_s: float = 0.0

    def answer(self, failure: str) -> dict[str, Any]:
        """Return what the job found, or raise ExperimentError with `failure` and the reason."""
        if self.outcome != MEASURED:
            raise ExperimentError(f"{failure}: {self.error or self.outcome}")
        return self.found


def launch(
    job: str,
    spec: dict[str, Any],
    *,
    uncached: Iterable[Path] = (),
    limit_bytes: int | None = None,
    controller: Controller | None = None,
    timeout_s: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Launched:
    """Run a job in a process of its own and wait for it.

    Parameters
    ----------
    job : str
        Module that answers, as in ``python -m``.
    spec : dict
        What it is told; JSON values.
    uncached : iterable of Path
        Files to drop from the page cache first, so that reading them is the process's own. Pages that another process
        maps stay: nothing else should have the model loaded.
    limit_bytes : int, optional
        Hard limit of its memory.
    controller : Controller, optional
        What sets the limit; found when missing.
    timeout_s : float, optional
    threads : int, optional
        Computing threads; left out: as here.
    progress : callable, optional
        Called with (done, total) where the job tells it (`job.report_progress`).

    Raises
    ------
    LimitError
        When the limit cannot be set; nothing ran then.
    """

    def told(line: str) -> None:
        if progress is not None and line.startswith(f"{PROGRESS} "):
            done, total = line.split()[1:]
            progress(int(done), int(total))

    drop_cached(uncached)
    # Nothing of it belongs to the MLflow run that this process may be in.
    env = {**os.environ, "EMOE_RUN_ID": "", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads is not None:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "spec.json", Path(scratch) / "answer.json"
        source.write_text(json.dumps(spec))
        run = run_process(
            [sys.executable, "-m", job, str(source), str(target)],
            limit_bytes=limit_bytes,
            controller=controller,
            timeout_s=timeout_s,
            env=env,
            on_line=told,
        )
        answered = run.returncode == 0 and target.exists()
        found = dict(json.loads(target.read_text())) if answered else None
    return launched_of(run, found)


def launched_of(run: ProcessRun, found: dict[str, Any] | None) -> Launched:
    """Return what a process and its answer (None: it gave none) amount to."""
    outcome, error = MEASURED, ""
    if run.timed_out:
        outcome = TOO_SLOW
    elif run.killed_by_limit:
        outcome = KILLED
    elif run.returncode == NO_MEMORY_CODE:
        outcome = NO_MEMORY
    elif found is None:
        outcome, error = FAILED, next(reversed(run.errors.strip().splitlines()), f"exit code {run.returncode}")
    kept = found if outcome == MEASURED and found is not None else {}
    return Launched(outcome, kept, run.limit_bytes, run.group_peak_bytes, run.limit_hits, error, run.duration_s)


def drop_cached(files: Iterable[Path]) -> None:
    """Drop files, where they exist, from the page cache; pages that others map stay."""
    for file in files:
        if not file.exists():
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
