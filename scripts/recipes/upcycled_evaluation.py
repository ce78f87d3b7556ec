"""Measures a built mixture on held-out text: perplexity beside the dense parent, routing, and five answers.

Terms: a block is a run of held-out tokens read as one prompt; the share of an expert is its part of all top-k choices
of a layer over equally long text of every domain; NMI is the mutual information of domain and chosen expert over the
mean of their entropies. The weights are those stored (bfloat16), the dense parent's are rounded alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes.evaluation import Built
from recipes.held_out import counts, dense_losses, held_out_blocks, losses, predicted_tokens
from recipes.summary import summarise
from workbench.models.reference import dense

HEATMAP = "routing.png"


def measured(built: Built) -> dict[str, Any]:
    """Return the figures of a built mixture; its heatmap is drawn beside the recipe."""
    source = dense.DenseSource.open(dense.fetch_gguf())
    blocks, changed = held_out_blocks(built.recipe, source, built.block_tokens)
    base = dense_losses(source, blocks, built.compute)
    shape = built.recipe.shape
    mixed = [losses(built.model, part, shape.top_k) for part in tqdm(blocks.values(), desc="mixture", unit="domain")]
    figures = summarise(
        list(blocks),
        predicted_tokens(blocks),
        base,
        np.array([loss for loss, _ in mixed]),
        np.stack([counts(found, shape.experts) for _, found in mixed]),
    )
    draw_heatmap(figures, built.recipe.folder / HEATMAP)
    return figures | {"held_out_text_changed": changed}


def draw_heatmap(figures: dict[str, Any], path: Path) -> None:
    """Draw domain by expert shares (mean over layers) beside NMI and the smallest share by layer."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    shares = np.array(figures["shares"])
    names = list(figures["domains"])
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1.15, 1), layout="constrained")
    labels = [f"{index}: {name}" for index, name in enumerate(names)]
    if len(labels) != shares.shape[2]:
        labels = [str(index) for index in range(shares.shape[2])]
    seaborn.heatmap(
        100 * shares.mean(axis=1),
        ax=axes[0],
        annot=True,
        fmt=".0f",
        cmap="viridis",
        yticklabels=names,
        xticklabels=labels,
        cbar_kws={"label": "share of top-2 choices, %"},
    )
    axes[0].set(title="Choices by domain, mean over layers", xlabel="expert", ylabel="held-out text")
    axes[0].tick_params(axis="x", rotation=40)
    layers = np.arange(shares.shape[1])
    axes[1].plot(layers, figures["layers"]["nmi"], color="tab:blue", label="NMI of domain and expert")
    axes[1].plot(layers, figures["layers"]["min_share"], color="tab:orange", label="smallest share of an expert")
    axes[1].axhline(0.02, color="grey", linestyle=":", label="2% of choices")
    axes[1].set(title="By layer", xlabel="layer", ylim=(0, None))
    axes[1].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
