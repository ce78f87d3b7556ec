"""What the experts of one forward pass need to know of it: whose rows these are, and which are padding.

The engine publishes one frozen `StepContext` per forward pass on the object that all MoE layers of a model share;
layers read it and never change it. There are no thread-locals and no globals, so two engines in one process cannot
see each other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from emoe_core.scheduler.requests import Request


@dataclass(frozen=True)
class StepContext:
    """One forward pass over ``batch`` rows of ``length`` tokens.

    Attributes
    ----------
    forward : int
        Number of the pass, from 0.
    requests : tuple of Request
        Whose row each batch row is.
    length : int
        Tokens per row in this pass: the prompt at prefill, 1 at decode.
    is_prefill : bool
        Whether the pass starts its requests.
    real : torch.Tensor or None
        Bool [batch * length] on the CPU, False at padding; None when there is no padding.
    """

    forward: int
    requests: tuple[Request, ...]
    length: int
    is_prefill: bool
    real: torch.Tensor | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The engine's number of each batch row's request."""
        return tuple(request.engine_number for request in self.requests)

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return len(self.requests)

    @property
    def tokens(self) -> int:
        """Rows that the experts see: batch * length."""
        return self.batch * self.length

    def row_of_token(self) -> torch.Tensor:
        """Return the batch row of each token, int64 [batch * length]."""
        return torch.arange(self.batch).repeat_interleave(self.length)
