"""Puts the native kind together: a stock ``OlmoeForCausalLM`` whose weights are all the recipe's own."""

from __future__ import annotations

import torch

from workbench.models.reference import dense
from workbench.models.reference.checkpoint import Assembly, Ingredients
from workbench.models.reference.native.card import render_card
from workbench.models.reference.native.recipe import Recipe, restored


def ingredients(recipe: Recipe, source: dense.DenseSource | None) -> Ingredients:
    """Return what the checkpoint consists of; there is no dense parent, whatever `source` is."""

    def ends() -> dict[str, torch.Tensor]:
        found = {f"model.{rest}": tensor for rest, tensor in recipe.parts("model.").items()}
        return restored({name: tensor for name, tensor in found.items() if not name.startswith("model.layers.")})

    def layer(index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}"
        return {f"{prefix}.{name}": tensor for name, tensor in apart(recipe.layer(index)).items()}

    return Ingredients(recipe.shape.config(), recipe.tokenizer(), ends, layer)


def apart(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a layer's tensors under the names of OLMoE's published checkpoints, which list experts one by one."""
    tensors = {name: tensor for name, tensor in layer.items() if not name.startswith("mlp.experts.")}
    # Stacked [experts, 2 * width, hidden] and [experts, hidden, width].
    both, down = (layer[f"mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    for expert in range(len(both)):
        matrices = (*both[expert].chunk(2), down[expert])
        for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
            tensors[f"mlp.experts.{expert}.{name}_proj.weight"] = matrix.contiguous()
    return tensors


ASSEMBLY = Assembly("native-16x13m", 1, Recipe, ingredients, render_card)
build, verify, is_built = ASSEMBLY.build, ASSEMBLY.verify, ASSEMBLY.is_built
