"""Teacher forcing: what an engine thinks of continuations that it is given, in place of ones that it chooses.

Two models are compared on the same tokens this way, whatever each would have answered.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import emoe_core
from emoe_core.errors import OptionError, UnsupportedFamilyError
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.serving.generation_rules import require_known_tokens

TokenPair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Scored:
    """Teacher-forced scores of one continuation of n tokens.

    Attributes
    ----------
    request : int
    logprobs : torch.Tensor
        Float32 [n]: natural log-probability of each given token.
    logits : torch.Tensor
        Float32 [n, vocabulary] on the CPU: the distribution each was scored under, before softmax.
    hidden : torch.Tensor
        What entered the output embedding, [n, hidden] on the CPU in the model's dtype; far smaller than the logits.
    total_s : float
        Wall seconds.
    """

    request: int
    logprobs: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    total_s: float


def score(
    engine: emoe_core.Engine,
    sequences: Sequence[TokenPair],
    tasks: Sequence[str | None] | None = None,
    *,
    stepwise: bool = False,
) -> list[Scored]:
    """Return the log-probabilities of given continuations, each a request of its own.

    Parameters
    ----------
    engine : Engine
    sequences : sequence of (prompt ids, continuation ids)
        Both non-empty.
    tasks : sequence of str or None, optional
        Task type of each sequence; None is "unknown".
    stepwise : bool
        False: one forward pass per sequence. True: a pass for the prompt, then one for each token of the continuation,
        so that experts are asked for as they are while generating.

    Raises
    ------
    OptionError
        An empty prompt or continuation, tokens that the model does not have, or not one task a sequence.
    UnsupportedFamilyError
        ``stepwise`` with a model that keeps no cache.
    """
    if tasks is not None and len(tasks) != len(sequences):
        raise OptionError(f"{len(sequences)} sequences came with {len(tasks)} task types: give one each, or none")
    accepts = inspect.signature(type(engine.model).forward).parameters
    scored = []
    for place, (prompt, continuation) in enumerate(sequences):
        if not len(prompt) or not len(continuation):
            raise OptionError(f"sequence {place} needs at least one prompt token and one continuation token")
        require_known_tokens(engine, [*prompt, *continuation])
        task = (tasks[place] if tasks is not None else None) or UNKNOWN
        started = time.perf_counter()
        ids = torch.tensor([[*prompt, *continuation]], device=engine.device)
        requests = engine.admit([task], [ids.shape[1]])
        seen: list[torch.Tensor] = []
        watch = engine.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        # The first pass ends with the prompt's last token, or with the whole sequence; the last row predicts nothing.
        first = len(prompt) if stepwise else ids.shape[1]
        rows, parts, cache = first - len(prompt) + 1, [], None
        try:
            with torch.no_grad():
                for start, end in [(0, first), *((place, place + 1) for place in range(first, ids.shape[1] - 1))]:
                    extra: dict[str, Any] = {"logits_to_keep": rows} if "logits_to_keep" in accepts else {}
                    output = engine.model(
                        input_ids=ids[:, start:end], past_key_values=cache, use_cache=stepwise, **extra
                    )
                    parts.append((output.logits[0, -rows:].float().cpu(), seen[-1][0, -rows:].cpu()))
                    rows, cache = 1, output.past_key_values if stepwise else None
                    if stepwise and cache is None:
                        raise UnsupportedFamilyError(
                            f"{type(engine.model).__name__} keeps no cache, so it cannot be scored step by step: use "
                            f"stepwise=False"
                        )
        finally:
            watch.remove()
            engine.finish(requests)
        logits, hidden = (torch.cat(part)[: len(continuation)] for part in zip(*parts, strict=True))
        targets = torch.tensor(continuation, dtype=torch.long).unsqueeze(-1)
        logprobs = logits.log_softmax(dim=-1).gather(1, targets).squeeze(-1)
        scored.append(Scored(requests[0].engine_number, logprobs, logits, hidden, time.perf_counter() - started))
    return scored
