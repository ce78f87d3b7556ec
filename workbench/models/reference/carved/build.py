"""Puts the carved kind together: a stock ``Qwen2MoeForCausalLM`` with a shared expert and small routed ones.

What a layer computes, and why its matrices carry factors, is said in `layer`.
"""

from __future__ import annotations

import itertools

import torch
from transformers import Qwen2MoeConfig

from workbench.models.reference import dense
from workbench.models.reference.carved.card import render_card
from workbench.models.reference.carved.layer import assemble
from workbench.models.reference.carved.recipe import Recipe
from workbench.models.reference.checkpoint import Assembly
from workbench.models.reference.parent import on_parent, parent_options


def qwen2_moe_config(parent: dense.DenseSource, recipe: Recipe) -> Qwen2MoeConfig:
    """Return the configuration of the built model."""
    options = parent_options(parent)
    shape = recipe.shape
    config = Qwen2MoeConfig(
        **options,
        qkv_bias=False,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        moe_intermediate_size=shape.width(options["intermediate_size"]),
        shared_expert_intermediate_size=shape.shared,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    config.architectures = ["Qwen2MoeForCausalLM"]
    return config


def experts(parent: dense.DenseSource, recipe: Recipe, layer: int) -> dict[str, torch.Tensor]:
    """Return router, shared expert and routed experts of one layer under Qwen2-MoE's names, in bfloat16."""
    prefix = f"model.layers.{layer}.mlp"
    gate, up, down = (parent.tensor(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
    shape = recipe.shape
    made = assemble(shape, (gate, up, down), recipe.layer(layer))
    neurons, hidden = made.gate.shape
    ends = range(shape.shared, neurons + 1, shape.width(neurons))
    pieces = {f"experts.{i}": slice(start, end) for i, (start, end) in enumerate(itertools.pairwise(ends))}
    pieces["shared_expert"] = slice(0, shape.shared)
    tensors = {"gate.weight": made.router, "shared_expert_gate.weight": torch.zeros(1, hidden)}
    for name, piece in pieces.items():
        tensors[f"{name}.gate_proj.weight"] = made.gate[piece]
        tensors[f"{name}.up_proj.weight"] = made.up[piece]
        tensors[f"{name}.down_proj.weight"] = made.down[:, piece]
    return {f"{prefix}.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


ASSEMBLY = Assembly("carved-24x135m", 1, Recipe, on_parent(qwen2_moe_config, experts), render_card)
build, verify, is_built = ASSEMBLY.build, ASSEMBLY.verify, ASSEMBLY.is_built
