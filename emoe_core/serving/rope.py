"""Rotary embeddings whose frequencies depend on how long a sequence has become.

"longrope" has other frequencies beyond a length, "dynamic" other ones with every token beyond it. Both go by the
longest row of a pass, so the rows of one batch would change each other's. "dynamic" also keeps the frequencies of the
longest sequence so far, whoever's it was, until a short one comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

BY_LENGTH = ("dynamic", "longrope")


def rope_by_length(config: PreTrainedConfig) -> str | None:
    """Return the type of a model's rotary embedding if its frequencies depend on the length, or None."""
    kinds = _kinds(getattr(config.get_text_config(), "rope_parameters", None))
    return next((kind for kind in kinds if any(name in kind for name in BY_LENGTH)), None)


def forget_lengths(model: torch.nn.Module) -> None:
    """Let a model's rotary embeddings forget how long earlier sequences were, as if it had just been loaded."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or not hasattr(module, "max_seq_len_cached"):
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if "dynamic" in kind:
                # By its own code, which begins anew at a short sequence.
                device = next(module.buffers()).device
                extra = {} if layer_type is None else {"layer_type": layer_type}
                module(torch.empty(1, device=device), torch.zeros(1, 1, dtype=torch.long, device=device), **extra)


def _kinds(parameters: Any) -> Iterator[str]:
    """Yield the types in a configuration's parameters, which may lie one level deeper, by layer type."""
    if isinstance(parameters, Mapping):
        kind = parameters.get("rope_type")
        if isinstance(kind, str):
            yield kind
        for value in parameters.values():
            yield from _kinds(value)
