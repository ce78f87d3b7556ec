"""Schedulers that are an order: first come, due first, shortest first, task-affine.

They admit whenever there is room; which one is next is all that differs. Only `SloAware` (`slo_aware.py`) ever leaves a
place free.
"""

from __future__ import annotations

from operator import attrgetter

from emoe_core.scheduler.admission import MAX_BYPASSED, SchedulingContext, admit_in_order, require_bypasses
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.scheduler.requests import Request


class FirstComeFirstServed:
    """Order of arrival. One that does not fit holds up all behind it."""

    name = "fcfs"

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Admit in order of arrival."""
        return admit_in_order(context, context.queue, 0, skip=False)


class EarliestDueFirst:
    """The one whose first token is due first (EDF)."""

    name = "edf"

    def __init__(self, max_bypassed: int = MAX_BYPASSED) -> None:
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Admit by due time."""
        order = sorted(context.queue, key=attrgetter("due_s"))
        return admit_in_order(context, order, self._max_bypassed, skip=True)


class ShortestExpectedFirst:
    """The one expected to be done first: its prompt's time and its expected output, alone."""

    name = "shortest"

    def __init__(self, costs: ServingCosts, max_bypassed: int = MAX_BYPASSED) -> None:
        self._token_s = costs.prefill_token_s
        self._step_s = float(costs.step_table_s(1)[1])
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Admit by expected time."""
        token_s, step_s = self._token_s, self._step_s
        order = sorted(
            context.queue,
            key=lambda request: request.input_tokens * token_s + request.expected_output_tokens * step_s,
        )
        return admit_in_order(context, order, self._max_bypassed, skip=True)


class TaskAffine:
    """Tasks together whose experts are resident: the one that makes the least loading necessary, then by arrival."""

    name = "affine"

    def __init__(self, max_bypassed: int = MAX_BYPASSED) -> None:
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Admit by loading latency. A task counts as resident once one of its requests runs or was admitted."""
        tasks = {request.task for request in context.queue}
        running = {request.task for request in context.running}
        loading = {task: 0.0 if task in running else context.loading_s(task) for task in tasks}
        order = sorted(context.queue, key=lambda request: (loading[request.task], request.task, request.place))
        return admit_in_order(context, order, self._max_bypassed, skip=True)
