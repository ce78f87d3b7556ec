"""What the experts of one forward pass need to know of it: whose rows these are, and which are padding.

The engine publishes one frozen `StepContext` per forward pass on the object that all MoE layers of a model share;
layers read it and never change it. There are no thread-locals and no globals, so two engines in one process cannot
see each other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepContext:
    """One forward pass over ``batch`` rows of ``length`` tokens.

    Attributes
    ----------
    forward : int
        Number of the pass, from 0.
    requests : tuple of int
        Request id of each batch row.
    tasks : tuple of str
        Task type of each batch row ("unknown" when nobody said).
    length : int
        Tokens per row in this pass: the prompt at prefill, 1 at decode.
    is_prefill : bool
        Whether the pass starts its requests.
    real : torch.Tensor or None
        Bool [batch * length] on the CPU, False at padding; None when there is no padding.
    tolerances : tuple of (float or None)
        Miss tolerance that each row's request brought; None where the engine's holds. Empty: the engine's for all.
    """

    forward: int
    requests: tuple[int, ...]
    tasks: tuple[str, ...]
    length: int
    is_prefill: bool
    real: torch.Tensor | None = None
    tolerances: tuple[float | None, ...] = ()

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return len(self.requests)

    @property
    def tokens(self) -> int:
        """Rows that the experts see: batch * length."""
        return self.batch * self.length

    def own_tolerance(self, row: int) -> float | None:
        """Return the miss tolerance that a row's request brought, or None."""
        return self.tolerances[row] if self.tolerances else None

    def row_of_token(self) -> torch.Tensor:
        """Return the batch row of each token, int64 [batch * length]."""
        return torch.arange(self.batch).repeat_interleave(self.length)
