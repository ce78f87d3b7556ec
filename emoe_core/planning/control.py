"""The control loop: who is running, what they used, when to predict, when to swap (paper, sections 3.3 and 3.4).

Requests are numbered as they are admitted. Before every p-th one the predictor is asked for each task's expert
frequencies; these are cached. A plan (Eq. 2) is made from them

* ``replan="admission"``: whenever requests are admitted, for the requests that then run, or
* ``replan="interval"``: only together with a prediction, for the task mix of the last p requests; the experts are
  then kept until the next prediction (Fig. 10).

Experts are swapped between forward passes only, and only when the plan's sets differ from those of the last plan.
The predictor learns at the end of a request from what its router *wanted*, not from what it got.

Until the first plan, residents are what came first (a cold start, flagged).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from emoe_core.experts.step import StepContext
from emoe_core.metrics import Counters
from emoe_core.planning.planner import DEFAULT_OUTPUT_TOKENS, Plan, expected_tokens, make_plan
from emoe_core.planning.tasks import Profile
from emoe_core.predictor import Predictor
from emoe_core.scheduler.requests import Request
from emoe_core.timeline import Timeline

REPLANS = ("admission", "interval")


class Layer(Protocol):
    """What is asked of a layer: how many experts it has."""

    @property
    def num_experts(self) -> int: ...


class Table(Protocol):
    """What is asked of the residency table: how many experts each layer may hold."""

    @property
    def capacity(self) -> Sequence[int]: ...


class Loader(Protocol):
    """What the control loop needs of a loader; a replay of recorded routing has one that moves nothing."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def table(self) -> Table: ...

    @property
    def counters(self) -> Counters: ...

    def swap(self, targets: Sequence[Sequence[int]]) -> int:
        """Make each layer hold its target experts; return the loads started."""


class ControlLoop:
    """Admission, history, prediction and planning of one engine.

    Parameters
    ----------
    loader : Loader
    predictor : Predictor or None
        None: experts come on demand only.
    interval : int
        p: predict before every p-th request.
    replan : str
        Of `REPLANS`.
    profile : Profile or None
        Sensitivity and expected output lengths per task.
    """

    def __init__(
        self,
        loader: Loader,
        predictor: Predictor | None,
        interval: int,
        replan: str,
        profile: Profile | None,
    ) -> None:
        self.loader = loader
        self.predictor = predictor
        self.interval = interval
        self.replan = replan
        self.profile = profile
        self.shape = (len(loader.layers), max(layer.num_experts for layer in loader.layers))
        # A predictor that knows no model may give shares to experts that a smaller layer does not have.
        self._exists = np.arange(self.shape[1]) < np.array([[layer.num_experts] for layer in loader.layers])
        self.running: dict[int, Request] = {}
        self.admitted = 0
        self.finished = 0
        self.plan: Plan | None = None
        self.prediction_s = 0.0
        self.timeline: Timeline | None = None
        self._frequencies: dict[str, np.ndarray | None] = {}
        self._predicted = False
        self._recent: deque[Request] = deque(maxlen=interval)

    @property
    def cold(self) -> bool:
        """Whether residents are still what came first, for want of history."""
        return self.predictor is not None and self.plan is None

    def admit(self, requests: Sequence[Request]) -> None:
        """Number new requests, predict if one is due, plan, and start swapping.

        Nobody is admitted when planning or swapping fails.
        """
        due = False
        for request in requests:
            due |= self.admitted % self.interval == 0
            request.engine_number, request.counts = self.admitted, np.zeros(self.shape)
            self.running[self.admitted] = request
            # What is planned for, without its tokens and counts: they need not outlive the request.
            self._recent.append(Request(request.task, request.input_tokens))
            self.admitted += 1
        try:
            if due:
                self._frequencies.clear()
                self._predicted = True
                self.loader.counters.predictions += self.predictor is not None
            if self._predicted and (due or self.replan == "admission"):
                self._make_plan()
        except BaseException:
            for request in requests:
                del self.running[request.engine_number]
            raise

    def observe(self, layer: int, chosen: torch.Tensor, demand: Sequence[int], step: StepContext | None) -> None:
        """Add one layer's desired experts, int64 [real tokens, k], to the histories of the pass's requests.

        ``demand`` counts them: how many of these choices fell on each of the layer's experts, [E].
        """
        if step is None:
            return
        experts = self.shape[1]
        if step.batch == 1:
            # A layer may have fewer experts than the largest one.
            step.requests[0].counts[layer, : len(demand)] += demand
            return
        rows = step.row_of_token()
        if step.real is not None:
            rows = rows[step.real]
        flat = (rows.unsqueeze(-1).to(chosen.device) * experts + chosen).flatten()
        table = torch.bincount(flat, minlength=step.batch * experts).view(step.batch, experts).cpu().numpy()
        for row, request in enumerate(step.requests):
            request.counts[layer] += table[row]

    def finish(self, requests: Sequence[Request]) -> None:
        """End requests: their history goes to the predictor. Those that do not run (any more) are ignored."""
        for request in requests:
            if self.running.get(request.engine_number) is not request:
                continue
            del self.running[request.engine_number]
            self.finished += 1
            if self.predictor is not None:
                self.predictor.observe(request.task, request.counts)

    def plan_for(self, requests: Sequence[Request]) -> Plan:
        """Return the plan that some requests would get by the cached frequencies; nothing is swapped.

        A task that nothing was predicted for since the last prediction is predicted now.
        """
        assert self.predictor is not None, "on demand there is no plan"
        for task in sorted({request.task for request in requests}):
            if task not in self._frequencies:
                self._frequencies[task] = self.predictor.predict(task)
        return self._plan(requests, {task: f for task, f in self._frequencies.items() if f is not None})

    def wanted(self, task: str) -> Plan | None:
        """Return the plan of a task alone by what is known of it now, or None where nothing is.

        Neither the cached frequencies nor the residents change.
        """
        shares = None if self.predictor is None else self.predictor.predict(task)
        return None if shares is None else self._plan([Request(task, 1)], {task: shares})

    def _plan(self, requests: Sequence[Request], known: Mapping[str, np.ndarray]) -> Plan:
        profile = self.profile
        demand = expected_tokens(
            requests,
            known,
            lambda task, layer: profile is None or profile.sensitive(task, layer),
            lambda task: (
                DEFAULT_OUTPUT_TOKENS
                if profile is None
                else profile.expected_output_tokens(task, DEFAULT_OUTPUT_TOKENS)
            ),
        )
        return make_plan(demand * self._exists if demand.size else demand, self.loader.table.capacity)

    def _make_plan(self) -> None:
        if self.predictor is None:
            return
        started = time.perf_counter()
        plan = self.plan_for(list(self._recent if self.replan == "interval" else self.running.values()))
        self.prediction_s += time.perf_counter() - started
        if self.timeline is not None:
            self.timeline.add("prediction", started, tasks=sorted({item.task for item in self.running.values()}))
        if plan.is_empty:
            return
        before = None if self.plan is None else [set(experts) for experts in self.plan.experts]
        if before != [set(experts) for experts in plan.experts]:
            started = time.perf_counter()
            loads = self.loader.swap(plan.experts)
            if self.timeline is not None:
                self.timeline.add("swap", started, loads=loads)
        self.plan = plan
