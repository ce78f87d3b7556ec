"""eMoE's scheduler: admit whom the batch can serve without breaking a promise (paper, section 3.5, Algorithm 1).

Waiting requests are sorted by how soon their first token is due. One is admitted if the batch stays within its limits,
its own objective can be met, and every running request that meets its objective still does, all by Eq. 3
(`latency.py`).

Where this departs from the printed algorithm
* T starts from the tokens of the running batch (printed: the number of running requests) and R is added (printed: S).
* R's own objective is checked too. A request that is late already has none left to check: it comes after all that can
  still be in time, in order of arrival.
* Nobody starves (`admission.py`): one that was bypassed too often is admitted without regard to anybody's objective.
* An empty batch always admits somebody.

Only the first `WINDOW` candidates are looked at in one decision, so that a decision's time does not grow with the queue
(but for sorting it); it runs again after the next step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from emoe_core.scheduler.admission import MAX_BYPASSED, Admission, SchedulingContext, require_bypasses
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.scheduler.latency import DecodeForecast
from emoe_core.scheduler.requests import Request

WINDOW = 64
DUE = attrgetter("due_s")


class SloAware:
    """Algorithm 1 as corrected.

    Parameters
    ----------
    costs : ServingCosts
    max_bypassed : int
    counts_loading : bool
        False takes dE for 0: the ablation.
    """

    def __init__(self, costs: ServingCosts, max_bypassed: int = MAX_BYPASSED, counts_loading: bool = True) -> None:
        self.name = "emoe" if counts_loading else "emoe_no_loading"
        self._costs = costs
        self._max_bypassed = require_bypasses(max_bypassed)
        self._counts_loading = counts_loading
        self._steps = costs.step_table_s(1)

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Admit by due time whom the estimate allows, then those that are late anyway."""
        if not len(context.queue) or len(context.running) >= context.limits.max_requests:
            return []
        if len(self._steps) < context.limits.max_requests + 2:
            self._steps = self._costs.step_table_s(context.limits.max_requests + 1)
        admission = Admission(context, self._max_bypassed)
        batch = _Batch(context, self._costs, self._steps, self._counts_loading)
        by_due = sorted(context.queue, key=DUE)
        late = bisect_left(by_due, context.now_s, key=DUE)
        if self._admit(admission, batch, by_due[late : late + WINDOW], own=True):
            # Sorting by arrival is the queue's own order; the late ones are few unless all are.
            overdue = sorted(by_due[:late], key=attrgetter("place"))[:WINDOW]
            self._admit(admission, batch, overdue, own=False)
        if not admission.chosen and not context.running:
            admission.admit(by_due[late] if late < len(by_due) else next(iter(context.queue)))
        return admission.chosen

    def _admit(self, admission: Admission, batch: _Batch, candidates: Sequence[Request], *, own: bool) -> bool:
        """Admit what may be admitted of the candidates, in their order; False when all must wait for the oldest."""
        for request in candidates:
            if admission.full:
                return False
            while (next_one := admission.overdue()) is not None:
                if not admission.fits(next_one):
                    return False
                admission.admit(next_one)
                batch.add(next_one)
            if admission.waits(request) and admission.fits(request) and batch.allows(request, own=own):
                admission.admit(request)
                batch.add(request)
        return True


class _Batch:
    """The running batch and those admitted in this decision, with what each still has time for."""

    def __init__(
        self, context: SchedulingContext, costs: ServingCosts, steps: np.ndarray, counts_loading: bool
    ) -> None:
        self._costs = costs
        self._steps = steps
        self._context = context
        self._counts_loading = counts_loading
        self._loading: dict[str, float] = {}
        # Time until the requests admitted in this decision have their first tokens.
        self._delay_s = 0.0
        self._remaining: list[float] = []
        self._deadline_s: list[float] = []
        for request in context.running:
            first_s = context.now_s if request.first_token_s is None else request.first_token_s
            self._append(request, request.remaining_tokens, first_s)
        self._refresh()

    def loading_s(self, task: str) -> float:
        """Return dE of a task: asked once in a decision, and nothing once one of the task was admitted in it."""
        if not self._counts_loading:
            return 0.0
        if task not in self._loading:
            self._loading[task] = self._context.loading_s(task)
        return self._loading[task]

    def allows(self, request: Request, *, own: bool) -> bool:
        """Return whether the request can join, by the estimate; ``own``: with its own objective met."""
        delay_s = self.loading_s(request.task) + self._costs.prefill_s(request.input_tokens)
        if delay_s > self._least_slack_s:
            return False
        # The first token comes with the prompt.
        tokens = max(0.0, request.expected_output_tokens - 1)
        if own:
            if self._context.now_s + self._delay_s + delay_s > request.due_s:
                return False
            if self._forecast.joined_s(np.array(tokens)) > request.objective.tpot_s * tokens:
                return False
        if not len(self._slack_s):
            return True
        added = np.minimum(self._added_s, self._forecast.added_s(np.array(tokens)))
        return bool((self._slack_s >= delay_s + added).all())

    def add(self, request: Request) -> None:
        """Take the request in."""
        self._delay_s += self.loading_s(request.task) + self._costs.prefill_s(request.input_tokens)
        self._loading[request.task] = 0.0
        self._append(request, max(0.0, request.expected_output_tokens - 1), self._context.now_s + self._delay_s)
        self._refresh()

    def _append(self, request: Request, remaining: float, first_token_s: float) -> None:
        total = max(1, request.generated) + remaining
        if total > 1 and remaining > 0:
            self._remaining.append(remaining)
            self._deadline_s.append(first_token_s + request.objective.tpot_s * (total - 1))

    def _refresh(self) -> None:
        """Compute what the running requests that meet their objectives can still wait, and what a newcomer adds."""
        remaining = np.array(self._remaining)
        self._forecast = DecodeForecast(remaining, self._steps)
        slack = np.array(self._deadline_s) - self._context.now_s - self._delay_s - self._forecast.alone_s(remaining)
        meets = slack >= 0
        self._slack_s = slack[meets]
        self._added_s = self._forecast.added_s(remaining[meets])
        self._least_slack_s = float(self._slack_s.min()) if len(self._slack_s) else float("inf")
