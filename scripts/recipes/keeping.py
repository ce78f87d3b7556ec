"""Keeps only some experts of every layer resident, to read what that costs a carved model.

A token whose chosen experts are not all kept takes its best kept ones instead, all of them when fewer than top-k are
kept, and their weights are scaled to the total of the weights it had chosen: the rule of `emoe_core.experts.rerouting`
at tolerance 1. This is a reading aid on stock transformers; memory is not saved here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def reroute(logits: Tensor, kept: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the weights and the experts [tokens, k'] of tokens that may use kept experts only.

    Parameters
    ----------
    logits : Tensor, shape [tokens, experts]
    kept : Tensor of bool, shape [tokens, experts]
        The same number of kept experts for every token.
    top_k : int
    """
    probabilities = torch.softmax(logits.float(), dim=-1)
    total = probabilities.topk(top_k, dim=-1).values.sum(dim=-1, keepdim=True)
    able = min(top_k, int(kept[0].sum()))
    weights, chosen = probabilities.masked_fill(~kept, -1.0).topk(able, dim=-1)
    return (weights * total / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), chosen


@contextmanager
def keeping(model: Any, kept: Tensor) -> Iterator[None]:
    """Restrict every layer of a Qwen2-MoE model to kept experts.

    Parameters
    ----------
    model : Qwen2MoeForCausalLM
    kept : Tensor of bool, shape [blocks, layers, experts]
        For each block of the batch that is read meanwhile.
    """

    def restrict(layer: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def hook(router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits = output[0]
            mask = kept[:, layer].repeat_interleave(len(logits) // len(kept), dim=0)
            weights, chosen = reroute(logits, mask, int(router.top_k))  # type: ignore[arg-type]
            return logits, weights, chosen

        return hook

    handles = [layer.mlp.gate.register_forward_hook(restrict(i)) for i, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_used(counts: Tensor, keep: int) -> Tensor:
    """Return a mask of the `keep` largest of the last dimension of counts [..., experts]; ties go to lower ids."""
    best = counts.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, best, True)
