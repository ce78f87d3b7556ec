"""What the kinds that grow from the dense model take from it: its attention, norms, embeddings, tokenizer and sizes.

Corrections are added as rank-one products in a fixed order by elementwise operations, so that sums are rounded the
same way on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from emoe_core.errors import CheckpointError
from workbench.fetch import sha256_file
from workbench.models.reference import dense
from workbench.models.reference.checkpoint import Ingredients
from workbench.models.reference.recipe import Recipe

_KEPT = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def on_parent(
    config: Callable[[dense.DenseSource, Any], PreTrainedConfig],
    experts: Callable[[dense.DenseSource, Any, int], dict[str, torch.Tensor]],
) -> Callable[[Recipe, dense.DenseSource | None], Ingredients]:
    """Return what `Assembly.ingredients` is for a kind that replaces the dense model's feed-forwards.

    Parameters
    ----------
    config : callable
        From parent and recipe to the configuration of the built model.
    experts : callable
        From parent, recipe and layer to the tensors that take the place of the layer's feed-forward, in bfloat16.
    """

    def ingredients(recipe: Recipe, source: dense.DenseSource | None) -> Ingredients:
        parent = source or dense.DenseSource.open(dense.fetch_gguf())
        if sha256_file(parent.path) != recipe.base_sha256:
            raise CheckpointError(
                f"the recipe belongs to other dense weights than {parent.path}; fetch the parent again."
            )
        made = config(parent, recipe)
        if made.num_hidden_layers != recipe.layers:
            raise CheckpointError(f"the recipe adapts {recipe.layers} layers, the parent has {made.num_hidden_layers}.")
        return Ingredients(
            made,
            parent.tokenizer(),
            lambda: _ends(parent),
            lambda layer: _kept(parent, layer) | experts(parent, recipe, layer),
        )

    return ingredients


def corrected(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``weight + up @ down`` in float32, rounded the same way everywhere.

    Parameters
    ----------
    weight : Tensor, shape [rows, columns], float32
    down : Tensor, shape [rank, columns], float32
    up : Tensor, shape [rows, rank], float32
    """
    total = weight.clone()
    product = torch.empty_like(weight)
    for index in range(down.shape[0]):
        torch.mul(up[:, index, None], down[None, index], out=product)
        total += product
    return total


def parent_options(parent: dense.DenseSource) -> dict[str, Any]:
    """Return the configuration values that a mixture takes over from its parent."""
    base = parent.config
    return {
        "vocab_size": base.vocab_size,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.num_hidden_layers,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": int(base.num_key_value_heads or base.num_attention_heads),
        "max_position_embeddings": base.max_position_embeddings,
        "rms_norm_eps": base.rms_norm_eps,
        "rope_parameters": dict(base.rope_parameters or {}),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
        "pad_token_id": base.pad_token_id,
    }


def _ends(parent: dense.DenseSource) -> dict[str, torch.Tensor]:
    names = ("model.embed_tokens.weight", "model.norm.weight")
    return {name: parent.tensor(name).to(torch.bfloat16) for name in names}


def _kept(parent: dense.DenseSource, layer: int) -> dict[str, torch.Tensor]:
    names = (f"model.layers.{layer}.{name}.weight" for name in _KEPT)
    return {name: parent.tensor(name).to(torch.bfloat16) for name in names}
