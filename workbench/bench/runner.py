"""Run the processes of a bench, interleaved, and keep each result the moment it is there.

Repeats go round all systems before any is measured again, in an order that turns by one each round, so that what the
machine does meanwhile meets all of them. A system that the limit ended, or that was too slow, is not tried again. An
interrupted bench goes on where it stopped; failed processes are tried again then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.bench.plan import RESULTS_FILE, BenchPlan
from workbench.bench.prepare import Prepared
from workbench.machine.control_groups import Controller
from workbench.measure.decoding import measure_decoding
from workbench.measure.launch import FAILED, MEASURED, Launched
from workbench.systems.systems import System


@dataclass(frozen=True)
class Step:
    """One process to run."""

    system: System
    repeat: int


def schedule(systems: list[System], repeats: int) -> list[Step]:
    """Return every process in order: round by round, each round starting one system further on."""
    steps = []
    for repeat in range(repeats):
        turn = repeat % len(systems)
        steps += [Step(system, repeat) for system in (*systems[turn:], *systems[:turn])]
    return steps


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results that a bench's folder holds, the newest of each (system, repeat), in the order they ended.

    A line that an interruption cut short is left out.
    """
    file = folder / RESULTS_FILE
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        newest.pop((row["system"], row["repeat"]), None)
        newest[row["system"], row["repeat"]] = row
    return list(newest.values())


def run_bench(
    plan: BenchPlan,
    prepared: Prepared,
    folder: Path,
    controller: Controller | None,
    on_result: Callable[[Step, dict[str, Any] | None, int, int], None],
) -> list[dict[str, Any]]:
    """Run what is missing, and return all results.

    Parameters
    ----------
    plan : BenchPlan
    prepared : Prepared
    folder : Path
    controller : Controller or None
        Needed with a limit.
    on_result : callable
        Called with (step, its result, processes done, processes in all); result None when the step starts.

    Raises
    ------
    LimitError
        When the limit cannot be set: no figure is taken without it.
    """
    steps = schedule(plan.found_systems(), plan.repeats)
    known = {(row["system"], row["repeat"]) for row in read_results(folder) if row["outcome"] != FAILED}
    given_up = {row["system"] for row in read_results(folder) if row["outcome"] not in (MEASURED, FAILED)}
    with (folder / RESULTS_FILE).open("a") as stream:
        if stream.tell():
            # A line that was cut short must not swallow the next one.
            stream.write("\n")
        for done, step in enumerate(steps):
            if (step.system.name, step.repeat) in known or step.system.name in given_up:
                continue
            on_result(step, None, done, len(steps))
            row = _row(step, _run(plan, prepared, step.system, controller))
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            if row["outcome"] not in (MEASURED, FAILED):
                given_up.add(step.system.name)
            on_result(step, row, done + 1, len(steps))
    return read_results(folder)


def _run(plan: BenchPlan, prepared: Prepared, system: System, controller: Controller | None) -> Launched:
    limit_bytes = plan.limit_bytes if plan.is_limited(system) else None
    spec = prepared.spec(plan, system)
    return measure_decoding(spec, prepared.files, limit_bytes=limit_bytes, controller=controller)


def _row(step: Step, launched: Launched) -> dict[str, Any]:
    return {
        "system": step.system.name,
        "repeat": step.repeat,
        "outcome": launched.outcome,
        "limited": launched.limit_bytes is not None,
        "limit_bytes": launched.limit_bytes,
        "group_peak_bytes": launched.group_peak_bytes,
        "limit_hits": launched.limit_hits,
        "error": launched.error,
        "ended": time.time(),
        **launched.found,
    }
