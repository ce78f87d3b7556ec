"""Choosing a token: the most likely one, or one drawn by temperature and nucleus (top p), reproducibly.

Each request draws from a generator of its own, so its draws do not depend on who shares its batch. Distribution and
draw are those of transformers: with ``torch.manual_seed(seed)`` and ``top_k=0``, its ``generate`` draws the same. What
the checkpoint's generation_config does to logits (`generation_rules`) comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from emoe_core.errors import OptionError

LARGEST_SEED = 2**63 - 1
# Below, logits divided by it may leave float32.
LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes
    ----------
    temperature : float
        At least `LEAST_TEMPERATURE`; logits are divided by it.
    top_p : float
        In (0, 1]: only the most likely tokens that together reach this probability are drawn from.
    seed : int
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= LEAST_TEMPERATURE:
            raise OptionError(f"temperature is {self.temperature}: give 0 (greedy), or {LEAST_TEMPERATURE} or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise OptionError(f"seed is {self.seed}: give 0 to {LARGEST_SEED}")


class Sampler:
    """The tokens of one request, in order; without a `Sampling` the most likely ones.

    Parameters
    ----------
    sampling : Sampling or None
    processors : LogitsProcessorList, optional
        What changes the logits first, given the prompt and all tokens chosen so far.
    prompt_ids : sequence of int
    max_new_tokens : int
        Tokens that will be chosen at most; needed with processors.
    """

    def __init__(
        self,
        sampling: Sampling | None,
        processors: LogitsProcessorList | None = None,
        prompt_ids: Sequence[int] = (),
        max_new_tokens: int = 0,
    ) -> None:
        self._processors = LogitsProcessorList(processors or ())
        self._length = 0
        # The warpers ask for what was said so far, and do not look at it.
        self._ids: Any = torch.empty(1, 0, dtype=torch.long)
        if processors:
            self._length = len(prompt_ids)
            self._ids = torch.empty(1, self._length + max_new_tokens, dtype=torch.long)
            self._ids[0, : self._length] = torch.tensor(prompt_ids, dtype=torch.long)
        self._generator: torch.Generator | None = None
        if sampling is not None:
            self._generator = torch.Generator().manual_seed(sampling.seed)
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token id, given its logits [vocabulary]; when that fails, nothing was chosen."""
        token = self._pick(logits)
        if self._length < self._ids.shape[1]:
            self._ids[0, self._length] = token
            self._length += 1
        return token

    def _pick(self, logits: torch.Tensor) -> int:
        if not self._processors:
            return int(logits.argmax())
        # On the CPU in float32, as its generator: the same token on every device.
        scores = logits[None].to(device="cpu", dtype=torch.float32, copy=True)
        scores = self._processors(self._ids[:, : self._length], scores)
        if self._generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
