"""How long a scheduler takes to decide, with many waiting: a benchmark, not a test.

    python scripts/decision_time.py --waiting 1000

Each decision starts from a queue of that many requests of six tasks and a batch of ``--max-batch`` with ``--free``
places, and is timed in processor time of this thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import numpy as np
import typer

from emoe_core.planning.tasks import TASK_TYPES
from emoe_core.scheduler import (
    BatchLimits,
    Objective,
    ServiceRequest,
    Situation,
    WaitingQueue,
)
from emoe_core.scheduler.costs import ServingCosts, TaskLoad
from workbench.cli import run_script
from workbench.serving.orders import SCHEDULERS, make_scheduler


def decision_times_s(name: str, waiting: int, max_batch: int, free: int, repeats: int, seed: int = 0) -> np.ndarray:
    """Return the seconds of each of ``repeats`` decisions, float [repeats]; arrivals differ from one to the next."""
    scheduler = make_scheduler(name, _costs(), max_bypassed=10 * waiting)
    seconds = []
    for repeat in range(repeats):
        generator = np.random.default_rng([seed, repeat])
        queue = WaitingQueue()
        for number in range(waiting):
            queue.add(_request(number, generator, arrival_s=float(generator.uniform(0, 4))))
        running = [_request(waiting + number, generator, arrival_s=0.0) for number in range(max_batch - free)]
        for request in running:
            request.first_token_s, request.generated = 1.0, int(generator.integers(1, 20))
        loading = dict.fromkeys(TASK_TYPES, 0.02)
        situation = Situation(4.0, queue, running, BatchLimits(max_batch, 10**7), loading.__getitem__)
        started = time.thread_time()
        scheduler.choose(situation)
        seconds.append(time.thread_time() - started)
    return np.array(seconds)


def _request(number: int, generator: np.random.Generator, arrival_s: float) -> ServiceRequest:
    task = TASK_TYPES[int(generator.integers(len(TASK_TYPES)))]
    objective = Objective(float(generator.uniform(1, 10)), float(generator.uniform(0.05, 0.5)))
    inputs, expected = int(generator.integers(10, 400)), float(generator.integers(2, 90))
    return ServiceRequest(number, task, arrival_s, inputs, 96, expected, objective)


def _costs() -> ServingCosts:
    load = TaskLoad((100,), (30,), 30.0, ((1.0,),))
    return ServingCosts(
        "0" * 64, 5e-4, 0.02, (1, 8, 32), (0.04, 0.06, 0.1), 0.004, 0.0, 1e-4, (1,), 1, dict.fromkeys(TASK_TYPES, load)
    )


def time_decisions(
    waiting: Annotated[int, typer.Option(help="Requests in the queue.")] = 1000,
    max_batch: Annotated[int, typer.Option(help="Places in the batch.")] = 32,
    free: Annotated[
        list[int] | None, typer.Option(help="Free places in it; repeatable. 1 and 32 if not given.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Decisions that are timed.")] = 200,
) -> None:
    """Print a line of JSON for each scheduler: median and P99 of its decisions, in milliseconds."""
    for places in free or [1, 32]:
        for name in SCHEDULERS:
            times = decision_times_s(name, waiting, max_batch, min(places, max_batch), repeats)
            figures = {"median_ms": round(1e3 * float(np.median(times)), 3)}
            figures["p99_ms"] = round(1e3 * float(np.percentile(times, 99)), 3)
            print(json.dumps({"scheduler": name, "waiting": waiting, "free": places} | figures))


if __name__ == "__main__":
    run_script(time_decisions)
