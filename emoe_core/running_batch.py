"""The requests of an engine that run together: their tokens and their shared cache, one row each.

Prompts are read alone and join as a row; a step gives every row a token. Whose rows a forward pass holds is told to the
engine before each one. Who is admitted, when, and when a request is done is `serving_loop`'s.

A step that failed can be taken again row by row (`RunningBatch.step_again`), which tells who fails alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .batch_cache import BatchCache
from .sampling import Sampler
from .scheduler import ServiceRequest

if TYPE_CHECKING:
    from .engine import Engine


@dataclass
class Row:
    """A running request: its engine number, what it asks, when it was admitted, its tokens, what it failed with.

    Tokens are chosen by its ``sampler``, whose state moves on with each one.
    """

    request: ServiceRequest
    engine_number: int
    prompt_ids: Sequence[int]
    sampler: Sampler
    admitted_s: float
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    failure: Exception | None = None


class RunningBatch:
    """Rows of one engine, in the order they joined; used under ``torch.no_grad``, on the thread that runs the model."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[Row] = []
        self._engine = engine
        self._cache = BatchCache()
        # A prompt's last position only: all its logits would cost a tenth of a small model's pass.
        accepts = inspect.signature(type(engine.model).forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def prefill(self, row: Row) -> int:
        """Read a row's prompt, which joins the cache; return its first token. The row must join ``rows`` next."""
        ids = torch.tensor([row.prompt_ids], device=self._engine.device)
        self.seat([row])
        output = self._engine.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **self._last_only
        )
        self._cache.join(output.past_key_values, ids.shape[1])
        return row.sampler.choose(output.logits[0, -1])

    def step(self) -> list[int]:
        """Take a step with all rows; return a token of each."""
        self.seat(self.rows)
        mask, positions = self._cache.next_inputs(self._engine.device)
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._engine.device)
        output = self._engine.model(
            input_ids=last,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache.cache,
            use_cache=True,
        )
        self._cache.grew()
        return [row.sampler.choose(logits) for row, logits in zip(self.rows, output.logits[:, -1], strict=True)]

    def step_again(self, error: Exception) -> list[int]:
        """Take a step that failed with ``error`` row by row; return the tokens of those who succeed, in order.

        The others bear their ``failure`` and leave with `take_failed`.
        """
        self._cache.restore()
        if len(self.rows) == 1:
            self.rows[0].failure = error
            return []
        batch, tokens = BatchCache(), []
        for place, row in enumerate(self.rows):
            self.seat([row])
            try:
                cache = self._cache.alone(place)
                output = self._engine.model(
                    input_ids=torch.tensor([[row.tokens[-1]]], device=self._engine.device),
                    past_key_values=cache,
                    use_cache=True,
                )
                batch.join(cache, self._cache.lengths[place] + 1)
                tokens.append(row.sampler.choose(output.logits[0, -1]))
            except Exception as failure:
                row.failure = failure
        self._cache = batch
        return tokens

    def take_failed(self) -> list[Row]:
        """Remove the rows that failed in `step_again`, and return them."""
        failed = [row for row in self.rows if row.failure is not None]
        self.rows = [row for row in self.rows if row.failure is None]
        if not self.rows:
            self._cache = BatchCache()
        self._leave(failed)
        return failed

    def remove(self, places: Collection[int]) -> list[Row]:
        """Remove rows by place, and return them."""
        gone = [row for place, row in enumerate(self.rows) if place in places]
        self._cache.keep([place for place in range(len(self.rows)) if place not in places])
        self.rows = [row for place, row in enumerate(self.rows) if place not in places]
        self._leave(gone)
        return gone

    def abandon(self) -> list[Row]:
        """Remove all rows and their cache, whatever state it is in, and return the rows."""
        gone, self.rows, self._cache = self.rows, [], BatchCache()
        self._leave(gone)
        return gone

    def seat(self, rows: Sequence[Row]) -> None:
        """Tell the engine whose rows the passes to come hold."""
        self._engine.passes.seat([row.engine_number for row in rows] if rows else None)

    def _leave(self, rows: Sequence[Row]) -> None:
        self._engine.passes.leave([row.engine_number for row in rows])
