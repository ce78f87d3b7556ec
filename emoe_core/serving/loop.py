"""Continuous batching on one engine: the smallest loop that runs a scheduler of `scheduler`.

One turn: ask the scheduler whom to admit; admit them, which predicts before every p-th and swaps experts; run their
prompts one by one, each giving a first token; take one decode step with everybody. A simulation of the same turn is
`workbench.serving.simulation.simulated_engine`. Experts are swapped between forward passes only, and each row keeps its
own task, hence its own tolerance, in a mixed batch.

Why not transformers' ``generate_batch`` (5.23), which batches continuously too (from reading its code; not tried)
* It packs all rows into one sequence of a batch of one, prompts in pieces beside single tokens, on a thread of its own.
  Whose task, tolerance and padding a token has is not told to the model, and our layers need it (`experts/step.py`).
* Its schedulers are made from (cache, safety margin, batch limit) and asked for tokens of one pass: there is no place
  for a clock, costs or loading latency, and no moment at which a prompt is admitted and experts may be swapped, since
  admission, chunking and offloading of starved requests happen inside one call.
* It computes with paged attention, so tokens need not be those of ``generate`` even for a batch of one.
This loop gives tokens identical to `Engine.generate` for a batch of one; rows of a larger batch are padded, and agree
within rounding.

A request that cannot be admitted, whose pass fails (an expert that cannot be read, memory that runs out) or whose token
cannot be chosen ends alone where ``on_failure`` is given: a failed step is taken again row by row, and who fails alone
is out (`batch.py`). Experts that a pass wanted before it failed are in the history twice.

Sequences of many families cannot share a batch (`Engine.one_at_a_time`): theirs run one at a time, whatever the limits.

KV memory: the batch limits count each request's prompt and output limit as reserved from its admission; `limits_within`
turns bytes into such tokens. Padding to the longest row comes on top (`kv_cache.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from emoe_core.errors import OptionError
from emoe_core.planning.planner import DEFAULT_OUTPUT_TOKENS
from emoe_core.scheduler import NO_PROMISE, BatchLimits, Objective, Request, Scheduler, SchedulingContext, WaitingQueue
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.serving.batch import RunningBatch
from emoe_core.serving.generation_rules import GenerationRules, require_known_tokens
from emoe_core.serving.records import Answer, Pass, answer_of
from emoe_core.serving.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from emoe_core.engine import Engine


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
    on_token : callable, optional
        Called with (number, token id) as each token comes.
    on_failure : callable, optional
        Called with (number, error) when a request ends without an answer. Without it, the error of a pass ends all that
        run, and is raised; the error of an admission is raised, and those who wait go on waiting.
    on_pass : callable, optional
        Told of every forward pass that gave all its rows a token.

    Raises
    ------
    CostsError
        When the costs are another model's.
    OptionError
        When the checkpoint's generation_config asks for what is not served.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        limits: BatchLimits,
        costs: ServingCosts | None = None,
        clock: Callable[[], float] = time.perf_counter,
        stop_tokens: Collection[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_failure: Callable[[int, Exception], None] | None = None,
        on_pass: Callable[[Pass], None] | None = None,
    ) -> None:
        if costs is not None:
            costs.require_model(engine.index.source_hash)
        self._engine = engine
        self._scheduler = scheduler
        self._limits = limits if engine.one_at_a_time is None else replace(limits, max_requests=1)
        self._costs = costs
        self._clock = clock
        self._stops = frozenset(stop_tokens)
        self._queue = WaitingQueue()
        self._on_token = on_token
        self._on_failure = on_failure
        self._rules = GenerationRules(engine)
        self._batch = RunningBatch(engine, on_pass, clock)
        self._submitted = 0
        self.steps = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not len(self._queue) and not self._batch.rows

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._batch.rows)

    def submit(
        self,
        prompt_ids: Sequence[int],
        task: str,
        max_new_tokens: int = 64,
        objective: Objective = NO_PROMISE,
        expected_output_tokens: float | None = None,
        tolerance: float | None = None,
        arrival_s: float | None = None,
        sampling: Sampling | None = None,
        ends: Callable[[int], bool] | None = None,
        to_limit: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> int:
        """Take a request; return its number.

        Parameters
        ----------
        prompt_ids : sequence of int
        task : str
        max_new_tokens : int
        objective : Objective
        expected_output_tokens : float, optional
            What the scheduler is told; the task profile's mean if not given, at most ``max_new_tokens``.
        tolerance : float, optional
            The request's own miss tolerance in [0, 1], whatever the engine's, its profile or quality target.
        arrival_s : float, optional
            When it came, by the loop's clock; now if not given. Who comes during a turn waits from then on.
        sampling : Sampling, optional
            How tokens are drawn; greedy if not given.
        ends : callable, optional
            Told each token; returns whether the answer ends with it.
        to_limit : bool
            Go on past the loop's stop tokens, to ``max_new_tokens``.
        settings : mapping, optional
            What it changes of the checkpoint's generation_config (see `generation_rules`).

        Raises
        ------
        OptionError
            When the tolerance is out of range, the family is served exactly only, a token id has no embedding, or a
            setting is refused.
        RequestTooLargeError
            When the request would not fit the batch's limits alone.
        """
        if tolerance is not None and not 0.0 <= tolerance <= 1.0:
            raise OptionError(f"tolerance is {tolerance}: it must lie in [0, 1], 0 being exact")
        if tolerance and not self._engine.reroutable:
            raise OptionError(f"{self._engine.index.model_type} is served exactly only: leave tolerance out, or give 0")
        require_known_tokens(self._engine, prompt_ids)
        if expected_output_tokens is None:
            profile = self._engine.control.profile
            known = None if profile is None else profile.expected_output_tokens(task, DEFAULT_OUTPUT_TOKENS)
            expected_output_tokens = min(float(max_new_tokens), known or DEFAULT_OUTPUT_TOKENS)
        came_s = self._clock() if arrival_s is None else arrival_s
        request = Request(
            task,
            len(prompt_ids),
            self._submitted,
            came_s,
            max_new_tokens,
            expected_output_tokens,
            objective,
            tolerance,
            tuple(prompt_ids),
            stop_tokens=() if to_limit else self._stops,
            ends=ends,
        )
        self._limits.require_fit(request)
        processors = self._rules.processors(prompt_ids, max_new_tokens, settings)
        request.sampler = Sampler(sampling, processors, prompt_ids, max_new_tokens)
        self._submitted += 1
        self._queue.add(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """Drop a request, waiting or running, and free its place; False when there is none (any more).

        Between turns only, on the thread that takes them.
        """
        waiting = [request for request in self._queue if request.number == number]
        if waiting:
            self._queue.take(waiting)
            return True
        places = {place for place, request in enumerate(self._batch.rows) if request.number == number}
        if places:
            self._batch.remove(places)
            self._batch.seat(self._batch.rows)
        return bool(places)

    def run(self) -> list[Answer]:
        """Take turns until nothing is left; return the answers in order of completion."""
        answers: list[Answer] = []
        while not self.idle:
            answers += self.turn()
        return answers

    def turn(self) -> list[Answer]:
        """Admit, run the new prompts, take one step; return who is done. Without work, nothing happens.

        Without ``on_failure``, an error of a forward pass ends every running request, whose numbers are lost, and is
        raised. So does an interrupt, or an error of the scheduler, in any case.
        """
        if self.idle:
            return []
        try:
            with torch.no_grad():
                done = self._admit()
                if self._batch.rows:
                    done += self._step()
        except BaseException:
            self._batch.abandon()
            raise
        finally:
            self._batch.seat(self._batch.rows)
        return done

    def _admit(self) -> list[Answer]:
        running, now_s = self._batch.rows, self._clock()
        chosen = self._scheduler.choose(SchedulingContext(now_s, self._queue, running, self._limits, self._loading_s))
        assert chosen or running, "a scheduler left the engine idle though somebody waits"
        if not chosen:
            return []
        try:
            self._engine.passes.admit(chosen)
        except Exception as error:
            if self._on_failure is None:
                raise
            self._queue.take(chosen)
            for request in chosen:
                self._fail(request, error)
            return []
        self._queue.take(chosen)
        joining = list(chosen)
        try:
            while joining:
                joining[0].admitted_s = now_s
                self._prefill(joining[0])
                del joining[0]
        finally:
            # After an error that is raised: those whose turn to be read has not come.
            self._engine.passes.finish(joining)
        return self._retire()

    def _prefill(self, request: Request) -> None:
        try:
            self._batch.prefill(request)
        except Exception as error:
            if self._on_failure is None:
                raise
            self._engine.passes.finish([request])
            self._fail(request, error)
            return
        request.first_token_s = self._clock()
        self._tell_all([request])

    def _step(self) -> list[Answer]:
        failures = self._batch.step()
        if failures and self._on_failure is None:
            raise next(iter(failures.values()))
        for request, failure in failures.items():
            self._fail(request, failure)
        self.steps += 1
        self._tell_all(self._batch.rows)
        return self._retire()

    def _fail(self, request: Request, error: Exception) -> None:
        assert self._on_failure is not None
        self._on_failure(request.number, error)

    def _tell_all(self, requests: Sequence[Request]) -> None:
        """Tell of the latest token of some requests; one whose own listener fails ends with that failure."""
        failures: dict[int, Exception] = {}
        for request in requests:
            try:
                self._tell(request)
            except Exception as error:
                if self._on_failure is None:
                    raise
                failures[self._batch.rows.index(request)] = error
        if failures:
            for request, failure in zip(self._batch.remove(failures), failures.values(), strict=True):
                self._fail(request, failure)

    def _tell(self, request: Request) -> None:
        token = request.tokens[-1]
        request.stopped = token in request.stop_tokens or (request.ends is not None and request.ends(token))
        if self._on_token is not None:
            self._on_token(request.number, token)

    def _retire(self) -> list[Answer]:
        rows = self._batch.rows
        ended = {place for place, one in enumerate(rows) if one.stopped or one.generated >= one.output_limit_tokens}
        if not ended:
            return []
        now_s = self._clock()
        return [answer_of(request, now_s) for request in self._batch.remove(ended)]

    def _loading_s(self, task: str) -> float:
        """Return dE: what loading the plan's missing experts would take if a request of the task were admitted now."""
        control, table = self._engine.control, self._engine.loader.table
        if self._costs is None or control.predictor is None or control.replan == "interval":
            return 0.0
        inputs = [request.input_tokens for request in self._queue if request.task == task]
        joining = Request(task, round(sum(inputs) / max(1, len(inputs))))
        plan = control.plan_for([*control.running.values(), joining])
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
