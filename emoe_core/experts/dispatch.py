"""The "emoe" experts function: transformers asks it to compute a layer's experts, and it asks who serves that layer.

transformers dispatches every decorated experts module through ``ALL_EXPERTS_FUNCTIONS``. One function is registered
there under the name "emoe". Who serves a module hangs on the module itself, never on globals: a `LayerHandle` of an
engine, or for one pass a watcher (`router.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from emoe_core.errors import IntegrationError

IMPLEMENTATION = "emoe"
_ATTRIBUTE = "_emoe_layer"


class ServesExperts(Protocol):
    """Who computes the experts of one module."""

    def forward(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the layer: hidden [T, H], index and weights [T, k] -> [T, H]."""


def emoe_experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Serve one call of an experts module; the function that is registered with transformers."""
    layer = attached_to(module)
    if layer is None:
        raise IntegrationError(
            f"a {type(module).__name__} was asked to run as 'emoe' but belongs to no engine: load the model with "
            f"emoe_core.load(), or choose another experts_implementation for this model."
        )
    return layer.forward(module, hidden_states, top_k_index, top_k_weights)


def attach(module: torch.nn.Module, layer: ServesExperts) -> None:
    """Let a layer serve an experts module, in place of who did."""
    module.__dict__[_ATTRIBUTE] = layer


def detach(module: torch.nn.Module) -> None:
    """Untie an experts module; a later call then raises IntegrationError instead of reading freed slots."""
    module.__dict__.pop(_ATTRIBUTE, None)


def attached_to(module: torch.nn.Module) -> ServesExperts | None:
    """Return who serves an experts module."""
    layer: ServesExperts | None = module.__dict__.get(_ATTRIBUTE)
    return layer


def register() -> None:
    """Make "emoe" known to transformers. Idempotent; the only global state of this package."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, emoe_experts_forward)
