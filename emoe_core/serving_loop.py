"""Continuous batching on one engine: the smallest loop that runs a scheduler of `scheduler`.

One turn: ask the scheduler whom to admit; admit them, which predicts before every p-th and swaps experts; run their
prompts one by one, each giving a first token; take one decode step with everybody. A simulation of the same turn is
`workbench.serving.simulated_engine`. Experts are swapped between forward passes only, and each row keeps its own task,
hence its own tolerance, in a mixed batch.

Why not transformers' ``generate_batch`` (5.23), which batches continuously too (from reading its code; not tried)
* It packs all rows into one sequence of a batch of one, prompts in pieces beside single tokens, on a thread of its own.
  Whose task, tolerance and padding a token has is not told to the model, and our layers need it (`context.py`).
* Its schedulers are made from (cache, safety margin, batch limit) and asked for tokens of one pass: there is no place
  for a clock, costs or loading latency, and no moment at which a prompt is admitted and experts may be swapped, since
  admission, chunking and offloading of starved requests happen inside one call.
* It computes with paged attention, so tokens need not be those of ``generate`` even for a batch of one.
This loop gives tokens identical to `Engine.generate` for a batch of one; rows of a larger batch are padded, and agree
within rounding.

KV memory: the batch limits count each request's prompt and output limit as reserved from its admission; `limits_within`
turns bytes into such tokens. Padding to the longest row comes on top (`batch_cache.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .batch_cache import BatchCache
from .costs import ServingCosts
from .errors import OptionError
from .planner import DEFAULT_OUTPUT_TOKENS, RunningRequest
from .scheduler import BatchLimits, Objective, Scheduler, ServiceRequest, Situation, WaitingQueue

if TYPE_CHECKING:
    from .engine import Engine

NO_PROMISE = Objective(float("inf"), float("inf"))


@dataclass(frozen=True)
class Answer:
    """A finished request; times of the loop's clock, in seconds. ``token_ids`` includes a closing stop token."""

    number: int
    task: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    arrival_s: float
    admitted_s: float
    first_token_s: float
    finished_s: float


@dataclass
class _Row:
    """A running request: its engine number, its tokens, and when it was admitted."""

    request: ServiceRequest
    engine_number: int
    tokens: list[int]
    admitted_s: float


class ServingLoop:
    """Requests in, answers out; one forward pass at a time, on the caller's thread.

    Parameters
    ----------
    engine : Engine
    scheduler : Scheduler
    limits : BatchLimits
    costs : ServingCosts, optional
        Of this model; without, loading is taken to cost nothing when the scheduler asks.
    clock : callable
        Returns seconds; arrivals and objectives are of this clock.
    stop_tokens : collection of int
        Token ids that end an answer.

    Raises
    ------
    CostsError
        When the costs are another model's.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        limits: BatchLimits,
        costs: ServingCosts | None = None,
        clock: Callable[[], float] = time.perf_counter,
        stop_tokens: Collection[int] = (),
    ) -> None:
        if costs is not None:
            costs.require_model(engine.index.source_hash)
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits
        self._costs = costs
        self._clock = clock
        self._stops = frozenset(stop_tokens)
        self._queue = WaitingQueue()
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._rows: list[_Row] = []
        self._cache = BatchCache()
        self._submitted = 0
        self.steps = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not len(self._queue) and not self._rows

    def submit(
        self,
        prompt_ids: Sequence[int],
        task: str,
        max_new_tokens: int = 64,
        objective: Objective = NO_PROMISE,
        expected_output_tokens: float | None = None,
    ) -> int:
        """Take a request that arrives now; return its number.

        Parameters
        ----------
        prompt_ids : sequence of int
        task : str
        max_new_tokens : int
        objective : Objective
        expected_output_tokens : float, optional
            What the scheduler is told; the task profile's mean if not given, at most ``max_new_tokens``.

        Raises
        ------
        RequestTooLargeError
            When the request would not fit the batch's limits alone.
        """
        if expected_output_tokens is None:
            profile = self._engine.control.profile
            known = None if profile is None else profile.expected_output_tokens(task, DEFAULT_OUTPUT_TOKENS)
            expected_output_tokens = min(float(max_new_tokens), known or DEFAULT_OUTPUT_TOKENS)
        request = ServiceRequest(
            self._submitted, task, self._clock(), len(prompt_ids), max_new_tokens, expected_output_tokens, objective
        )
        self._limits.require_fit(request)
        self._submitted += 1
        self._prompts[request.number] = tuple(prompt_ids)
        self._queue.add(request)
        return request.number

    def run(self) -> list[Answer]:
        """Take turns until nothing is left; return the answers in order of completion."""
        answers: list[Answer] = []
        while not self.idle:
            answers += self.turn()
        return answers

    def turn(self) -> list[Answer]:
        """Admit, run the new prompts, take one step; return who is done. Without work, nothing happens.

        An error of a forward pass ends every running request, whose numbers are lost, and is raised.
        """
        if self.idle:
            return []
        try:
            with torch.no_grad():
                done = self._admit()
                if self._rows:
                    done += self._step()
        except BaseException:
            self._abandon()
            raise
        finally:
            self._seat(self._rows)
        return done

    def _admit(self) -> list[Answer]:
        running = [row.request for row in self._rows]
        now_s = self._clock()
        chosen = self._scheduler.choose(Situation(now_s, self._queue, running, self._limits, self._loading_s))
        assert chosen or running, "a scheduler left the engine idle though somebody waits"
        if not chosen:
            return []
        self._queue.take(chosen)
        numbers = self._engine.passes.admit_beside(
            [request.task for request in chosen], [request.input_tokens for request in chosen]
        )
        joining = [_Row(request, number, [], now_s) for request, number in zip(chosen, numbers, strict=True)]
        self._rows += joining
        for row in joining:
            self._prefill(row)
        return self._retire()

    def _prefill(self, row: _Row) -> None:
        ids = torch.tensor([self._prompts.pop(row.request.number)], device=self._engine.device)
        self._seat([row])
        output = self._engine.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        self._cache.join(output.past_key_values, ids.shape[1])
        row.tokens.append(int(output.logits[0, -1].argmax()))
        row.request.generated = 1
        row.request.first_token_s = self._clock()

    def _step(self) -> list[Answer]:
        self._seat(self._rows)
        mask, positions = self._cache.next_inputs(self._engine.device)
        last = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._engine.device)
        output = self._engine.model(
            input_ids=last,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache.cache,
            use_cache=True,
        )
        self._cache.grew()
        self.steps += 1
        for row, token in zip(self._rows, output.logits[:, -1].argmax(dim=-1).tolist(), strict=True):
            row.tokens.append(token)
            row.request.generated += 1
        return self._retire()

    def _retire(self) -> list[Answer]:
        ended = [
            row.tokens[-1] in self._stops or len(row.tokens) >= row.request.output_limit_tokens for row in self._rows
        ]
        if not any(ended):
            return []
        now_s = self._clock()
        done = [row for row, over in zip(self._rows, ended, strict=True) if over]
        self._cache.keep([place for place, over in enumerate(ended) if not over])
        self._rows = [row for row, over in zip(self._rows, ended, strict=True) if not over]
        self._engine.passes.leave([row.engine_number for row in done])
        return [self._answer(row, now_s) for row in done]

    def _answer(self, row: _Row, now_s: float) -> Answer:
        request = row.request
        assert request.first_token_s is not None
        finished_s = now_s if len(row.tokens) > 1 else request.first_token_s
        return Answer(
            request.number,
            request.task,
            tuple(row.tokens),
            request.input_tokens,
            request.arrival_s,
            row.admitted_s,
            request.first_token_s,
            finished_s,
        )

    def _abandon(self) -> None:
        self._engine.passes.leave([row.engine_number for row in self._rows])
        self._rows, self._cache = [], BatchCache()

    def _seat(self, rows: Sequence[_Row]) -> None:
        self._engine.passes.seat([row.engine_number for row in rows] if rows else None)

    def _loading_s(self, task: str) -> float:
        """Return dE: what loading the plan's missing experts would take if a request of the task were admitted now."""
        control, table = self._engine.control, self._engine.loader.table
        if self._costs is None or control.predictor is None or control.replan == "interval":
            return 0.0
        inputs = [request.input_tokens for request in self._queue if request.task == task]
        requests = [RunningRequest(request.task, request.input_tokens) for request in control.running.values()]
        plan = control.plan_for([*requests, RunningRequest(task, round(sum(inputs) / max(1, len(inputs))))])
        missing = sum(len(set(experts) - table.resident(layer)) for layer, experts in enumerate(plan.experts))
        return self._costs.loads_s(missing)


def limits_within(engine: Engine, max_requests: int, kv_bytes: int) -> BatchLimits:
    """Return the limits of a batch whose KV cache, without padding, stays within some bytes.

    Raises
    ------
    OptionError
        When that is less than two tokens.
    """
    token_bytes = engine.memory(1, 1).kv_bytes
    if kv_bytes < 2 * token_bytes:
        raise OptionError(f"{kv_bytes:,} bytes hold no two tokens of {token_bytes:,} bytes of KV cache each: give more")
    return BatchLimits(max_requests, kv_bytes // token_bytes)
