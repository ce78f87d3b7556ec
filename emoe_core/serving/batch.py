"""The requests of an engine that run together: their tokens and their shared cache, one row each.

Prompts are read alone and join as a row; a step gives every row a token. Whose rows a forward pass holds is told to the
engine before each one. Who is admitted, when, and when a request is done is the loop's (`loop.py`).

A row alone is fed as transformers' ``generate`` feeds a sequence, by the model's own ``prepare_inputs_for_generation``:
some families start their cache anew at a certain length. Rows together are padded on the left (`kv_cache.py`).

A row becomes one when its token has been chosen and its cache has joined, and a step counts for a row when that row's
token has been chosen. Whoever gets no token, because the whole pass failed or its own choice did, is taken again alone,
from the cache before the step, and leaves if that fails too. Nobody else's tokens are drawn twice.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from emoe_core.scheduler.requests import Request
from emoe_core.serving.kv_cache import BatchCache
from emoe_core.serving.records import Pass
from emoe_core.serving.rope import forget_lengths, rope_by_length

if TYPE_CHECKING:
    from emoe_core.engine import Engine


class RunningBatch:
    """Requests of one engine, a row each, in the order they joined.

    Used under ``torch.no_grad``, on the thread that runs the model.

    Parameters
    ----------
    engine : Engine
    on_pass : callable, optional
        Told of every forward pass that gave all its rows a token.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        engine: Engine,
        on_pass: Callable[[Pass], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rows: list[Request] = []
        self._engine = engine
        self._on_pass = on_pass
        self._clock = clock
        self._cache = BatchCache()
        self._remembers_lengths = rope_by_length(engine.model.config) is not None
        # A prompt's last position only: all its logits would cost a tenth of a small model's pass.
        accepts = inspect.signature(type(engine.model).forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def prefill(self, request: Request) -> None:
        """Read a prompt and choose its first token; the request then is in the batch, or, on an error, it is not."""
        self.seat([request])
        if self._remembers_lengths:
            forget_lengths(self._engine.model)
        token, cache = self._alone(request, None)
        self._cache.join(cache, request.input_tokens)
        request.put_out(token)
        self.rows.append(request)

    def step(self) -> dict[Request, Exception]:
        """Take a step with all rows, which gives each a token; return those who got none, with the reason.

        They have left the batch. Rows that were taken again alone come last in it.
        """
        if len(self.rows) == 1:
            return self._step_of_one(self.rows[0])
        self.seat(self.rows)
        started, chosen = self._started(), dict[Request, int]()
        try:
            for request, logits in zip(self.rows, self._together(), strict=True):
                # Whose own choice fails is found below: it has no token.
                with suppress(Exception):
                    chosen[request] = _chosen(request, logits)
        except Exception:
            return self._step_again({})
        if len(chosen) < len(self.rows):
            return self._step_again(chosen)
        self._cache.grew()
        for request, token in chosen.items():
            request.put_out(token)
        self._tell(started, is_prompt=False, size=len(self.rows))
        return {}

    def remove(self, places: Collection[int]) -> list[Request]:
        """Remove rows by place, and return them."""
        gone = [request for place, request in enumerate(self.rows) if place in places]
        self._keep([place for place in range(len(self.rows)) if place not in places])
        self._engine.passes.finish(gone)
        return gone

    def abandon(self) -> list[Request]:
        """Remove all rows and their cache, whatever state it is in, and return the rows."""
        gone, self.rows, self._cache = self.rows, [], BatchCache()
        self._engine.passes.finish(gone)
        return gone

    def seat(self, requests: Sequence[Request]) -> None:
        """Tell the engine whose rows the passes to come hold."""
        self._engine.passes.seat(requests)

    def _step_of_one(self, request: Request) -> dict[Request, Exception]:
        self.seat([request])
        try:
            token, self._cache.cache = self._alone(request, self._cache.cache)
        except Exception as error:
            self.abandon()
            return {request: error}
        self._cache.grew()
        request.put_out(token)
        return {}

    def _step_again(self, chosen: Mapping[Request, int]) -> dict[Request, Exception]:
        """Finish a step that gave only some rows a token: take the others alone, and put the batch together anew."""
        everybody, lengths = self.rows, self._cache.lengths
        retried: list[tuple[Request, int, Any]] = []
        failures: dict[Request, Exception] = {}
        for place, request in enumerate(everybody):
            if request in chosen:
                continue
            self.seat([request])
            try:
                retried.append((request, *self._alone(request, self._cache.alone(place))))
            except Exception as error:
                failures[request] = error
        self._cache.grew()
        self._keep([place for place, request in enumerate(everybody) if request in chosen])
        for request, token in chosen.items():
            request.put_out(token)
        for request, token, cache in retried:
            try:
                self._cache.join(cache, lengths[everybody.index(request)] + 1)
            except Exception as error:
                failures[request] = error
            else:
                request.put_out(token)
                self.rows.append(request)
        self._engine.passes.finish(list(failures))
        return failures

    def _alone(self, request: Request, cache: Any) -> tuple[int, Any]:
        """Run one request as ``generate`` would, from its cache or (None) from its prompt; return token and cache."""
        started, ids = self._started(), _sequence(request, self._engine.device)
        model: Any = self._engine.model
        inputs = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if cache is None else 1,
            past_key_values=cache,
            is_first_iteration=cache is None,
            use_cache=True,
            **self._last_only,
        )
        output = model(**inputs)
        token = _chosen(request, output.logits[0, -1])
        self._tell(started, is_prompt=cache is None, size=ids.shape[1] if cache is None else 1)
        return token, output.past_key_values

    def _together(self) -> torch.Tensor:
        """Run all rows on their shared cache; return logits [rows, vocabulary]."""
        mask, positions = self._cache.next_inputs(self._engine.device)
        output = self._engine.model(
            input_ids=torch.tensor([[request.tokens[-1]] for request in self.rows], device=self._engine.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache.cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _keep(self, places: Sequence[int]) -> None:
        self._cache.keep(places)
        self.rows = [self.rows[place] for place in places]

    def _started(self) -> float:
        return 0.0 if self._on_pass is None else self._clock()

    def _tell(self, started: float, *, is_prompt: bool, size: int) -> None:
        if self._on_pass is not None:
            self._on_pass(Pass(is_prompt, size, self._clock() - started))


def _chosen(request: Request, logits: torch.Tensor) -> int:
    assert request.sampler is not None, "a request without a sampler puts nothing out"
    return request.sampler.choose(logits)


def _sequence(request: Request, device: torch.device) -> torch.Tensor:
    """Return prompt and tokens, int64 [1, length]; what is there from the last time is added to."""
    known = 0 if request.sequence is None else request.sequence.shape[1]
    said = request.tokens[known - request.input_tokens :] if known else [*request.prompt_ids, *request.tokens]
    if request.sequence is None or said:
        fresh = torch.tensor([said], dtype=torch.long, device=device)
        request.sequence = fresh if request.sequence is None else torch.cat([request.sequence, fresh], dim=1)
    return request.sequence
