"""Run one system in a fresh process, with its files out of the page cache and, where asked for, under a hard limit.

What became of it is one of the outcomes below. A system that the limit ends is a result, not an error. Without a limit
the process runs in no control group, and the result says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.machine.control_groups import Controller
from workbench.measure import decode_job as measured_run
from workbench.measure import job as measured_job
from workbench.measure.hard_limit import drop_cached, run_limited

MEASURED, KILLED, NO_MEMORY = "measured", "killed by the limit", "out of memory"
TOO_SLOW, FAILED = "too slow", "failed"
# Loading and warming up come on top of what decoding may take.
EXTRA_SECONDS = 1800.0


@dataclass(frozen=True)
class Launched:
    """One measured process.

    Attributes
    ----------
    outcome : str
        `MEASURED`, `KILLED`, `NO_MEMORY`, `TOO_SLOW` or `FAILED`.
    found : dict
        What `measured_run.measure` returned; empty unless measured.
    limit_bytes, group_peak_bytes : int or None
        The limit as the kernel took it, and the group's peak, page cache included; None without a limit.
    limit_hits : int
    error : str
        Last line of what a failed process said.
    """

    outcome: str
    found: dict[str, Any]
    limit_bytes: int | None = None
    group_peak_bytes: int | None = None
    limit_hits: int = 0
    error: str = ""


def launch(
    spec: dict[str, Any],
    files: Sequence[Path],
    *,
    limit_bytes: int | None = None,
    controller: Controller | None = None,
    timeout_s: float | None = None,
) -> Launched:
    """Run a spec of `measured_run` and wait for it.

    Parameters
    ----------
    spec : dict
    files : sequence of Path
        Dropped from the page cache first.
    limit_bytes : int, optional
    controller : Controller, optional
        From `find_controller`; needed with a limit.
    timeout_s : float, optional
        Left out: the spec's ``max_seconds`` and `EXTRA_SECONDS`.

    Raises
    ------
    LimitError
        When the limit cannot be set; nothing ran then.
    """
    drop_cached(file for file in files if file.exists())
    threads = str(spec["threads"])
    env = {**os.environ, "EMOE_RUN_ID": "", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    patience_s = timeout_s or 1.25 * spec["max_seconds"] + EXTRA_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        source.write_text(json.dumps(spec))
        command = [sys.executable, "-m", measured_run.__name__, str(source), str(target)]
        if limit_bytes is None:
            return _unlimited(command, env, patience_s, target)
        assert controller is not None
        run = run_limited(command, limit_bytes, controller=controller, timeout_s=patience_s, env=env)
        found = _found(target) if run.returncode == 0 else {}
        limits = (run.limit_bytes, run.peak_bytes, run.limit_hits)
    if run.timed_out:
        return Launched(TOO_SLOW, {}, *limits)
    if run.killed_by_limit:
        return Launched(KILLED, {}, *limits)
    return _ended(run.returncode, run.errors, found, limits)


def _unlimited(command: list[str], env: dict[str, str], patience_s: float, target: Path) -> Launched:
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=patience_s)
    except subprocess.TimeoutExpired:
        return Launched(TOO_SLOW, {})
    return _ended(run.returncode, run.stderr, _found(target) if run.returncode == 0 else {}, (None, None, 0))


def _ended(returncode: int, errors: str, found: dict[str, Any], limits: tuple[int | None, int | None, int]) -> Launched:
    if returncode == measured_job.NO_MEMORY:
        return Launched(NO_MEMORY, {}, *limits)
    if returncode != 0 or not found:
        last = errors.strip().splitlines()[-1:] or [f"exit code {returncode}"]
        return Launched(FAILED, {}, *limits, error=last[0])
    return Launched(MEASURED, found, *limits)


def _found(target: Path) -> dict[str, Any]:
    return dict(json.loads(target.read_text())) if target.exists() else {}
