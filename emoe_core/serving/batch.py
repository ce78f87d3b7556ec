"""The requests of an engine that run together: their tokens and their shared cache, one row each.

Prompts are read alone and join as a row; a step gives every row a token. Whose rows a forward pass holds is told to the
engine before each one. Who is admitted, when, and when a request is done is `serving_loop`'s.

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from emoe_core.scheduler import ServiceRequest
from emoe_core.serving.kv_cache import BatchCache
from emoe_core.serving.records import Pass
from emoe_core.serving.rope import forget_lengths, rope_by_length
from emoe_core.serving.sampling import Sampler

if TYPE_CHECKING:
    from emoe_core.engine import Engine


@dataclass(eq=False)
class Row:
    """A running request: its engine number, what it asks, when it was admitted, its tokens.

    Tokens are chosen by its ``sampler``, whose state moves on with each one.
    """

    request: ServiceRequest
    engine_number: int
    prompt_ids: Sequence[int]
    sampler: Sampler
    admitted_s: float
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    _ids: torch.Tensor | None = None

    def ids(self, device: torch.device) -> torch.Tensor:
        """Return prompt and tokens, int64 [1, length]."""
        known = 0 if self._ids is None else self._ids.shape[1]
        said = self.tokens[known - len(self.prompt_ids) :] if known else [*self.prompt_ids, *self.tokens]
        if self._ids is None or said:
            fresh = torch.tensor([said], dtype=torch.long, device=device)
            self._ids = fresh if self._ids is None else torch.cat([self._ids, fresh], dim=1)
        return self._ids


class RunningBatch:
    """Rows of one engine, in the order they joined; used under ``torch.no_grad``, on the thread that runs the model.

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
        self.rows: list[Row] = []
        self._engine = engine
        self._on_pass = on_pass
        self._clock = clock
        self._cache = BatchCache()
        self._remembers_lengths = rope_by_length(engine.model.config) is not None
        # A prompt's last position only: all its logits would cost a tenth of a small model's pass.
        accepts = inspect.signature(type(engine.model).forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def prefill(self, row: Row) -> None:
        """Read a row's prompt and choose its first token; the row then is in the batch, or, on an error, it is not."""
        self.seat([row])
        if self._remembers_lengths:
            forget_lengths(self._engine.model)
        token, cache = self._alone(row, None)
        self._cache.join(cache, len(row.prompt_ids))
        row.tokens.append(token)
        self.rows.append(row)

    def step(self) -> dict[Row, Exception]:
        """Take a step with all rows, which gives each a token; return those who got none, with the reason.

        They have left the batch. Rows that were taken again alone come last in it.
        """
        if len(self.rows) == 1:
            return self._step_of_one(self.rows[0])
        self.seat(self.rows)
        started, chosen = self._started(), dict[Row, int]()
        try:
            for row, logits in zip(self.rows, self._together(), strict=True):
                # Whose own choice fails is found below: it has no token.
                with suppress(Exception):
                    chosen[row] = row.sampler.choose(logits)
        except Exception:
            return self._step_again({})
        if len(chosen) < len(self.rows):
            return self._step_again(chosen)
        self._cache.grew()
        for row, token in chosen.items():
            row.tokens.append(token)
        self._tell(started, is_prompt=False, size=len(self.rows))
        return {}

    def remove(self, places: Collection[int]) -> list[Row]:
        """Remove rows by place, and return them."""
        gone = [row for place, row in enumerate(self.rows) if place in places]
        self._keep([place for place in range(len(self.rows)) if place not in places])
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

    def _step_of_one(self, row: Row) -> dict[Row, Exception]:
        self.seat([row])
        try:
            token, self._cache.cache = self._alone(row, self._cache.cache)
        except Exception as error:
            self.abandon()
            return {row: error}
        self._cache.grew()
        row.tokens.append(token)
        return {}

    def _step_again(self, chosen: Mapping[Row, int]) -> dict[Row, Exception]:
        """Finish a step that gave only some rows a token: take the others alone, and put the batch together anew."""
        everybody, lengths = self.rows, self._cache.lengths
        retried: list[tuple[Row, int, Any]] = []
        failures: dict[Row, Exception] = {}
        for place, row in enumerate(everybody):
            if row in chosen:
                continue
            self.seat([row])
            try:
                retried.append((row, *self._alone(row, self._cache.alone(place))))
            except Exception as error:
                failures[row] = error
        self._cache.grew()
        self._keep([place for place, row in enumerate(everybody) if row in chosen])
        for row, token in chosen.items():
            row.tokens.append(token)
        for row, token, cache in retried:
            try:
                self._cache.join(cache, lengths[everybody.index(row)] + 1)
            except Exception as error:
                failures[row] = error
            else:
                row.tokens.append(token)
                self.rows.append(row)
        self._leave(list(failures))
        return failures

    def _alone(self, row: Row, cache: Any) -> tuple[int, Any]:
        """Run one row as ``generate`` would, from its cache or (None) from its prompt; return token and cache."""
        started, ids = self._started(), row.ids(self._engine.device)
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
        token = row.sampler.choose(output.logits[0, -1])
        self._tell(started, is_prompt=cache is None, size=ids.shape[1] if cache is None else 1)
        return token, output.past_key_values

    def _together(self) -> torch.Tensor:
        """Run all rows on their shared cache; return logits [rows, vocabulary]."""
        mask, positions = self._cache.next_inputs(self._engine.device)
        output = self._engine.model(
            input_ids=torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._engine.device),
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

    def _leave(self, rows: Sequence[Row]) -> None:
        self._engine.passes.leave([row.engine_number for row in rows])

    def _started(self) -> float:
        return 0.0 if self._on_pass is None else self._clock()

    def _tell(self, started: float, *, is_prompt: bool, size: int) -> None:
        if self._on_pass is not None:
            self._on_pass(Pass(is_prompt, size, self._clock() - started))
