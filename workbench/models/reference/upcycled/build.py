"""Puts the upcycled kind together: eight full feed-forwards a layer, a stock ``MixtralForCausalLM`` checkpoint."""

from __future__ import annotations

import torch
from transformers import MixtralConfig

from workbench.models.reference import dense
from workbench.models.reference.checkpoint import Assembly
from workbench.models.reference.parent import corrected, on_parent, parent_options
from workbench.models.reference.upcycled.card import render_card
from workbench.models.reference.upcycled.recipe import Recipe

# Name of the parent's projection, the recipe's part, and Mixtral's name of the same matrix.
_MATRICES = (("gate_proj", "gate", "w1"), ("up_proj", "up", "w3"), ("down_proj", "down", "w2"))


def mixtral_config(parent: dense.DenseSource, recipe: Recipe) -> MixtralConfig:
    """Return the configuration of the built model."""
    config = MixtralConfig(
        **parent_options(parent),
        head_dim=parent.config.hidden_size // parent.config.num_attention_heads,
        num_local_experts=recipe.shape.experts,
        num_experts_per_tok=recipe.shape.top_k,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def experts(parent: dense.DenseSource, recipe: Recipe, layer: int) -> dict[str, torch.Tensor]:
    """Return router and experts of one layer under Mixtral's names, in bfloat16."""
    prefix = f"model.layers.{layer}"
    parts = recipe.layer(layer)
    tensors = {f"{prefix}.block_sparse_moe.gate.weight": parts["router"].to(torch.bfloat16)}
    for projection, part, name in _MATRICES:
        weight = parent.tensor(f"{prefix}.mlp.{projection}.weight")
        for expert in range(recipe.shape.experts):
            made = corrected(weight, parts[f"{part}_a"][expert], parts[f"{part}_b"][expert])
            tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = made.to(torch.bfloat16)
    return tensors


ASSEMBLY = Assembly("upcycled-8x135m", 1, Recipe, on_parent(mixtral_config, experts), render_card)
build, verify, is_built = ASSEMBLY.build, ASSEMBLY.verify, ASSEMBLY.is_built
