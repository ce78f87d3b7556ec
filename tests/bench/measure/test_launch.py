"""The measuring instrument: what becomes of a job, whatever ends its process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emoe_core.errors import ExperimentError
from workbench.measure.fresh_process import ProcessRun
from workbench.measure.launch import FAILED, KILLED, MEASURED, NO_MEMORY, TOO_SLOW, Launched, launch, launched_of

JOB = """
import os, sys
from emoe_core.errors import OptionError
from workbench.measure.job import answer_job, report_progress

def work(spec):
    report_progress(1, 2)
    report_progress(2, 2)
    {WHAT}

sys.exit(answer_job(work))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return what writes a module that answers as it is told, and names it."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))

    def write(what: str) -> str:
        (tmp_path / "made_job.py").write_text(JOB.replace("{WHAT}", what))
        return "made_job"

    return write


def test_a_job_answers_its_spec_with_its_peak_and_tells_how_far_it_is(job: Callable[[str], str]) -> None:
    told: list[tuple[int, int]] = []
    what = "return {'twice': 2 * spec['number'], 'load_peak_bytes': 10**15, 'threads': os.environ['OMP_NUM_THREADS']}"
    launched = launch(job(what), {"number": 4}, threads=3, progress=lambda done, total: told.append((done, total)))
    assert (launched.outcome, launched.error, launched.limit_bytes) == (MEASURED, "", None), launched.error
    # The peak of the whole life: the greater of the two that are known.
    assert launched.answer("no") == {"twice": 8, "load_peak_bytes": 10**15, "peak_bytes": 10**15, "threads": "3"}
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("what", "outcome", "said"),
    [
        ("raise OptionError('give more')", FAILED, "it failed: give more"),
        ("raise MemoryError", NO_MEMORY, "it failed: out of memory"),
        ("raise RuntimeError('DefaultCPUAllocator: not enough')", NO_MEMORY, "it failed: out of memory"),
        ("raise RuntimeError('a fault')", FAILED, "it failed: RuntimeError: a fault"),
        ("os._exit(0)", FAILED, "it failed: exit code 0"),
    ],
)
def test_a_job_without_an_answer_has_one_clear_error(
    job: Callable[[str], str], what: str, outcome: str, said: str
) -> None:
    launched = launch(job(what), {})
    assert (launched.outcome, launched.found) == (outcome, {})
    with pytest.raises(ExperimentError, match=f"^{said}$"):
        launched.answer("it failed")


ENDED = {"output": "", "errors": "", "duration_s": 1.0}


@pytest.mark.parametrize(
    ("run", "found", "outcome"),
    [
        (ProcessRun(-9, **ENDED, limit_bytes=10**9, limit_hits=1, killed_by_limit=True), None, KILLED),
        (ProcessRun(-9, **ENDED, timed_out=True), None, TOO_SLOW),
        (ProcessRun(-9, **ENDED), None, FAILED),
    ],
)
def test_what_ended_a_process_is_told_apart(run: ProcessRun, found: dict[str, Any] | None, outcome: str) -> None:
    launched = launched_of(run, found)
    assert isinstance(launched, Launched) and (launched.outcome, launched.limit_bytes) == (outcome, run.limit_bytes)
