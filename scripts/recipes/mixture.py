"""The trainable mixture: eight low-rank adapted copies of one feed-forward, computed at about the price of one.

An expert e of a layer is the dense feed-forward with rank-r corrections ``W + B_e A_e`` on gate, up and down. The base
products are shared, so for a token x with routing weights w over its chosen experts

    h_e = silu((W_g + B_ge A_ge) x) * ((W_u + B_ue A_ue) x)
    y   = W_d sum_e w_e h_e  +  sum_e w_e B_de A_de h_e

needs ``W_g x``, ``W_u x`` and ``W_d (...)`` once. The adapters of all experts are stacked, and the chosen ones are
picked by a mask over the stacked rank. Routing follows Mixtral: softmax over all experts, the best k, renormalised.
The result equals the materialised `MixtralForCausalLM` up to rounding; nothing here is used at inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from workbench.models.reference.upcycled.recipe import Shape

BASE = -1


class MixtureFeedForward(nn.Module):
    """A feed-forward with stacked expert adapters and a router; takes the place of ``LlamaMLP``.

    Attributes
    ----------
    fixed_expert : int or None
        While set, every token uses this one expert with weight one (the branch phase); `BASE` means no correction.
    probabilities, chosen : Tensor or None
        Router probabilities [tokens, experts] and chosen experts [tokens, k] of the last forward.
    inputs : Tensor or None
        Router inputs [tokens, hidden] of the last forward, kept only while `keep_inputs` is set.
    """

    def __init__(self, dense: Any, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.gate: Tensor
        self.up: Tensor
        self.down: Tensor
        self.register_buffer("gate", dense.gate_proj.weight.detach(), persistent=False)
        self.register_buffer("up", dense.up_proj.weight.detach(), persistent=False)
        self.register_buffer("down", dense.down_proj.weight.detach(), persistent=False)
        inner, hidden = self.gate.shape
        self.shape = shape
        self.fixed_expert: int | None = None
        self.keep_inputs = False
        self.inputs: Tensor | None = None
        self.probabilities: Tensor | None = None
        self.chosen: Tensor | None = None

        def start(columns: int) -> nn.Parameter:
            values = torch.randn(shape.experts, shape.rank, columns, generator=generator)
            return nn.Parameter(values / columns**0.5)

        self.gate_a, self.up_a, self.down_a = start(hidden), start(hidden), start(inner)
        self.gate_b = nn.Parameter(torch.zeros(shape.experts, inner, shape.rank))
        self.up_b = nn.Parameter(torch.zeros(shape.experts, inner, shape.rank))
        self.down_b = nn.Parameter(torch.zeros(shape.experts, hidden, shape.rank))
        self.router = nn.Parameter(torch.zeros(shape.experts, hidden))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the feed-forward's output, same shape as the input [batch, length, hidden]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.keep_inputs:
            self.inputs = x.detach()
        gate, up = functional.linear(x, self.gate), functional.linear(x, self.up)
        output = self._one(x, gate, up) if self.fixed_expert is not None else self._mixed(x, gate, up)
        return output.view_as(hidden_states)

    def _one(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        e = self.fixed_expert
        if e == BASE:
            return functional.linear(functional.silu(gate) * up, self.down)
        gate = gate + x @ self.gate_a[e].T @ self.gate_b[e].T
        up = up + x @ self.up_a[e].T @ self.up_b[e].T
        h = functional.silu(gate) * up
        return functional.linear(h, self.down) + h @ self.down_a[e].T @ self.down_b[e].T

    def _mixed(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        shape = self.shape
        self.probabilities = torch.softmax(functional.linear(x, self.router), dim=-1)
        weights, self.chosen = self.probabilities.topk(shape.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        gate_low, up_low = x @ self.gate_a.flatten(0, 1).T, x @ self.up_a.flatten(0, 1).T
        gate_b = self.gate_b.transpose(1, 2).flatten(0, 1)
        up_b = self.up_b.transpose(1, 2).flatten(0, 1)
        down_a = self.down_a.flatten(0, 1).T
        combined = torch.zeros_like(gate)
        low = torch.zeros_like(gate_low)
        for slot in range(shape.top_k):
            picked = functional.one_hot(self.chosen[:, slot], shape.experts).to(x.dtype)
            mask = picked.repeat_interleave(shape.rank, dim=1)
            h = functional.silu(gate + (gate_low * mask) @ gate_b) * (up + (up_low * mask) @ up_b)
            weight = weights[:, slot, None]
            combined = combined + weight * h
            low = low + weight * (h @ down_a) * mask
        return functional.linear(combined, self.down) + low @ self.down_b.transpose(1, 2).flatten(0, 1)

    def balance_loss(self) -> Tensor:
        """Return the load-balancing loss of Switch and Mixtral: experts times sum of share times mean probability."""
        assert self.probabilities is not None and self.chosen is not None
        counts = torch.bincount(self.chosen.flatten(), minlength=self.shape.experts)
        share = counts.to(self.probabilities.dtype) / self.chosen.numel()
        return self.shape.experts * (share * self.probabilities.mean(dim=0)).sum()


def grow(model: LlamaForCausalLM, shape: Shape, seed: int) -> list[MixtureFeedForward]:
    """Replace every feed-forward of a dense model by a mixture, freeze the rest, and return the mixtures by layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mixtures = []
    for layer in model.model.layers:
        layer.mlp = MixtureFeedForward(layer.mlp, shape, generator)
        mixtures.append(layer.mlp)
    return mixtures


def adapter_parameters(mixtures: list[MixtureFeedForward]) -> list[nn.Parameter]:
    """Return the adapter parameters of all layers, in a fixed order."""
    names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
    return [getattr(mixture, name) for mixture in mixtures for name in names]
