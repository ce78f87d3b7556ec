"""Orders of serving that the engine's schedulers are compared with, and every scheduler by name.

``shortest`` shortest expected first; ``affine`` tasks together whose experts are resident; the others are the engine's
(`emoe_core.scheduler`).
"""

from __future__ import annotations

from emoe_core import scheduler as engine
from emoe_core.errors import require_known
from emoe_core.scheduler.admission import MAX_BYPASSED, Scheduler, Situation, admit_in_order, require_bypasses
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.scheduler.requests import ServiceRequest

COSTLESS = (*engine.COSTLESS, "affine")
SCHEDULERS = ("fcfs", "edf", "shortest", "affine", "emoe", "emoe_no_loading")


class ShortestExpectedFirst:
    """The one expected to be done first: its prompt's time and its expected output, alone."""

    name = "shortest"

    def __init__(self, costs: ServingCosts, max_bypassed: int = MAX_BYPASSED) -> None:
        self._token_s = costs.prefill_token_s
        self._step_s = float(costs.step_table_s(1)[1])
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, situation: Situation) -> list[ServiceRequest]:
        """Admit by expected time."""
        token_s, step_s = self._token_s, self._step_s
        order = sorted(
            situation.queue,
            key=lambda request: request.input_tokens * token_s + request.expected_output_tokens * step_s,
        )
        return admit_in_order(situation, order, self._max_bypassed, skip=True)


class TaskAffine:
    """Tasks together whose experts are resident: the one that makes the least loading necessary, then by arrival."""

    name = "affine"

    def __init__(self, max_bypassed: int = MAX_BYPASSED) -> None:
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, situation: Situation) -> list[ServiceRequest]:
        """Admit by loading latency. A task counts as resident once one of its requests runs or was admitted."""
        tasks = {request.task for request in situation.queue}
        running = {request.task for request in situation.running}
        loading = {task: 0.0 if task in running else situation.loading_s(task) for task in tasks}
        order = sorted(situation.queue, key=lambda request: (loading[request.task], request.task, request.place))
        return admit_in_order(situation, order, self._max_bypassed, skip=True)


def make_scheduler(name: str, costs: ServingCosts | None, max_bypassed: int = MAX_BYPASSED) -> Scheduler:
    """Return a scheduler by name, of `SCHEDULERS`; raises as `emoe_core.scheduler.make_scheduler` does."""
    require_known(name, SCHEDULERS, "scheduler")
    if name == TaskAffine.name:
        return TaskAffine(max_bypassed)
    if name == ShortestExpectedFirst.name:
        return ShortestExpectedFirst(engine.require_costs(name, costs), max_bypassed)
    return engine.make_scheduler(name, costs, max_bypassed)
