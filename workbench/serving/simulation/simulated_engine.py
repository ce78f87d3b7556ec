"""One engine as a discrete-event simulation: what it would do, by the costs that were measured.

The loop is the real driver's. Between steps the scheduler is asked; those it admits are planned for (a swap, and a
prediction every p admitted requests), then their prompts run one by one, each giving its first token; then everybody
who runs takes a step. Nothing else happens at the same time: a swap, a prompt and a step each hold up all others.

A request arrives between steps or waits for the end of the one in progress. Steps in which nobody can join are taken
together, which changes no result. Whether a request ends is known to the simulation alone; schedulers see expectations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from emoe_core.scheduler import BatchLimits, Request, Scheduler, SchedulingContext, WaitingQueue
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.simulation.residents import Residents


@dataclass(frozen=True)
class Served:
    """One request as it was served; times in seconds of the simulation."""

    number: int
    task: str
    arrival_s: float
    admitted_s: float
    first_token_s: float
    finished_s: float
    input_tokens: int
    output_tokens: int
    ttft_objective_s: float
    tpot_objective_s: float
    held_mass: float
    batch: int
    replica: int = 0


@dataclass
class _Running:
    """A request in the batch, with what the simulation alone knows of it: how long it really is, and what it met."""

    request: Request
    left: int
    held_mass: float
    batch: int


class SimulatedEngine:
    """One replica.

    Parameters
    ----------
    costs : ServingCosts
    scheduler : Scheduler
    limits : BatchLimits
    residents : Residents or None
        None: every expert is resident, nothing is ever loaded.
    replica : int
        Number of the replica, for the records.

    Attributes
    ----------
    clock_s : float
        End of what was simulated last.
    served : list of Served
        In order of completion.
    busy_s : float
        Time in which something ran.
    """

    def __init__(
        self,
        costs: ServingCosts,
        scheduler: Scheduler,
        limits: BatchLimits,
        residents: Residents | None,
        replica: int = 0,
    ) -> None:
        self.costs = costs
        self.scheduler = scheduler
        self.limits = limits
        self.residents = residents
        self.clock_s = 0.0
        self.busy_s = self.loading_s = 0.0
        self.decisions = self.steps = 0
        self.served: list[Served] = []
        self._replica = replica
        self._queue = WaitingQueue()
        self._running: list[_Running] = []
        self._lengths: dict[int, int] = {}
        self._steps_s = [float(value) for value in costs.step_table_s(limits.max_requests)]
        self._mean_input = {name: sum(load.input_tokens) / len(load.input_tokens) for name, load in costs.tasks.items()}

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not len(self._queue) and not self._running

    def submit(self, request: Request, output_tokens: int) -> None:
        """Take a request that arrives now; everything up to its arrival must have been simulated (`advance`).

        Raises
        ------
        RequestTooLargeError
            When it would not fit alone.
        """
        self.limits.require_fit(request)
        assert output_tokens >= 1, request
        if self.idle:
            self.clock_s = max(self.clock_s, request.arrival_s)
        assert self.clock_s >= request.arrival_s, "advance to the arrival first"
        self._lengths[request.number] = min(output_tokens, request.output_limit_tokens)
        self._queue.add(request)

    def advance(self, until_s: float = math.inf) -> None:
        """Simulate everything that starts before a moment; what has started is finished, so the clock may pass it."""
        while self.clock_s < until_s and not self.idle:
            started = self.clock_s
            self._admit()
            if self._running:
                self._step(until_s)
            assert self.clock_s > started, "a turn of the loop takes time"
            self.busy_s += self.clock_s - started

    def missing_for(self, task: str) -> int:
        """Return how many of a task's own experts are absent."""
        return 0 if self.residents is None else self.residents.missing_for(task)

    def _admit(self) -> None:
        if not len(self._queue) or len(self._running) >= self.limits.max_requests:
            return
        running = [entry.request for entry in self._running]
        chosen = self.scheduler.choose(
            SchedulingContext(self.clock_s, self._queue, running, self.limits, self._loading_cost(running))
        )
        self.decisions += 1
        assert chosen or running, "a scheduler left the engine idle though somebody waits"
        if not chosen:
            return
        self._queue.take(chosen)
        admitted_s = self.clock_s
        if self.residents is not None:
            loads, predictions = self.residents.admit(chosen, running)
            spent = self.costs.loads_s(loads) + predictions * self.costs.prediction_s
            self.clock_s += spent
            self.loading_s += spent
        for request in chosen:
            mass = 1.0 if self.residents is None else self.residents.mass(request.task)
            self.clock_s += self.costs.prefill_s(request.input_tokens)
            request.admitted_s, request.first_token_s = admitted_s, self.clock_s
            request.generated = 1
            left = self._lengths.pop(request.number) - 1
            self._running.append(_Running(request, left, mass, len(self._running) + 1))
        self._retire()

    def _step(self, until_s: float) -> None:
        """Take a decode step, or as many as nobody could join anyway."""
        step_s = self._steps_s[len(self._running)]
        count = 1
        if not len(self._queue) or len(self._running) == self.limits.max_requests:
            count = min(entry.left for entry in self._running)
            if until_s < math.inf:
                count = min(count, max(1, math.ceil((until_s - self.clock_s) / step_s)))
        self.clock_s += count * step_s
        self.steps += count
        for entry in self._running:
            entry.left -= count
            entry.request.generated += count
        self._retire()

    def _retire(self) -> None:
        going = []
        for entry in self._running:
            if entry.left > 0:
                going.append(entry)
                continue
            request = entry.request
            assert request.admitted_s is not None and request.first_token_s is not None
            self.served.append(
                Served(
                    request.number,
                    request.task,
                    request.arrival_s,
                    request.admitted_s,
                    request.first_token_s,
                    self.clock_s if request.generated > 1 else request.first_token_s,
                    request.input_tokens,
                    request.generated,
                    request.objective.ttft_s,
                    request.objective.tpot_s,
                    entry.held_mass,
                    entry.batch,
                    self._replica,
                )
            )
        self._running = going

    def _loading_cost(self, running: list[Request]) -> Callable[[str], float]:
        known: dict[str, float] = {}

        def loading_s(task: str) -> float:
            if self.residents is None:
                return 0.0
            if task not in known:
                loads = self.residents.loads_for(task, self._mean_input[task], running)
                known[task] = self.costs.loads_s(loads)
            return known[task]

        return loading_s
