"""Measures a built carved model: perplexity beside the dense parent, routing, and the price of keeping few experts.

The weights are those stored (bfloat16), the dense parent's are rounded alike. Terms are those of `summary`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from recipes import corpora
from recipes.evaluation import Built
from recipes.held_out import counts, cut, dense_losses, held_out_blocks, losses, predicted_tokens
from recipes.keeping import keeping, most_used
from recipes.summary import summarise
from workbench.models.reference import dense
from workbench.models.reference.carved.recipe import Recipe

KEPT = (19, 14, 10)
# Of each domain.
KEEPING_BLOCKS = 2


def measured(built: Built) -> dict[str, Any]:
    """Return the figures of a built carved model."""
    source = dense.DenseSource.open(dense.fetch_gguf())
    blocks, changed = held_out_blocks(built.recipe, source, built.block_tokens)
    base = dense_losses(source, blocks, built.compute)
    shape = built.recipe.shape
    mixed = [losses(built.model, part, shape.top_k) for part in tqdm(blocks.values(), desc="carved", unit="domain")]
    found = np.array([loss for loss, _ in mixed])
    used = np.stack([counts(picked, shape.experts) for _, picked in mixed])
    figures = summarise(list(blocks), predicted_tokens(blocks), base, found, used)
    del figures["shares"]  # experts are no domains here
    few = {name: part[:KEEPING_BLOCKS] for name, part in blocks.items()}
    return figures | {
        "mean_ratio": float(np.exp(np.mean(found - base))),
        "keeping": keeping_table(built.model, built.recipe, source, few),
        "held_out_text_changed": changed,
    }


def keeping_table(
    model: PreTrainedModel, recipe: Recipe, source: dense.DenseSource, blocks: dict[str, Tensor]
) -> dict[str, Any]:
    """Return perplexity over that of all experts, for each number of kept experts and way to choose them.

    "global": the most used on fitting text, as much of it as there is of `blocks`; "own": the most used by each block
    itself; "random": drawn once for each layer.
    """
    shape = recipe.shape
    together = torch.cat(list(blocks.values()))
    tokenizer = source.tokenizer()
    fit = [
        cut(corpora.split(domain, tokenizer, recipe.description["seed"]).fit, part.shape[1])[: len(part)]
        for domain, part in zip(corpora.DOMAINS, blocks.values(), strict=True)
    ]
    _, seen = losses(model, torch.cat(fit), shape.top_k)
    everything, own = losses(model, together, shape.top_k)
    overall = torch.from_numpy(counts(seen, shape.experts)).sum(dim=0)
    by_block = torch.from_numpy(counts(own, shape.experts))
    lottery = torch.rand(overall.shape, generator=torch.Generator().manual_seed(0))
    ways = {"global": overall.expand_as(by_block), "own": by_block, "random": lottery.expand(by_block.shape)}
    rows = []
    for kept in tqdm([count for count in KEPT if count < shape.experts], desc="keeping", unit="count"):
        row: dict[str, float] = {"kept": kept}
        for way, ranking in ways.items():
            row[way] = float(np.exp(_loss_keeping(model, together, most_used(ranking, kept)) - everything))
        rows.append(row)
    return {"tokens": len(together) * (together.shape[1] - 1), "rows": rows}


def _loss_keeping(model: PreTrainedModel, blocks: Tensor, kept: Tensor) -> float:
    total = 0.0
    for ids, mask in zip(blocks.split(4), kept.split(4), strict=True):
        with keeping(model, mask):
            total += losses(model, ids)[0] * len(ids)
    return total / len(blocks)
