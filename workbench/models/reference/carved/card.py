"""Writes the carved model's card: how the checkpoint was made, from what, and what was measured."""

from __future__ import annotations

from typing import Any

from workbench.models.reference.carved.recipe import Recipe

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Carved 24x135M

A fine-grained Mixture-of-Experts model for experiments with expert memory, the counter-case to the upcycled one: its
experts are pieces of one feed-forward and complement each other, so leaving some out hurts. A shared expert of {shared}
neurons and {experts} routed experts a layer, {top_k} of them per token, {layers} layers, stock `Qwen2MoeForCausalLM` in
bfloat16. It is weaker than its parent, SmolLM2-135M-Instruct; do not use it where a wrong answer matters.

## Recipe
Parent: SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights of the package `{package}`, dequantised; its
attention, norms and embeddings are kept. Layer by layer (the idea is CMoE's, arXiv 2502.04416): the neurons that are
most often among the largest contributors become the shared expert, the others are clustered by their contributions
into experts of one size; the router is the linear map that predicts the experts' energy best. Then the down
projections get the correction, by ridge regression, that brings the layer's output back to the dense parent's,
stored in 4 bits; not in {unrepaired} layer(s), where a few tokens' massive activations would decide it.
{tokens:,} tokens; the parent is the only teacher: no language-model loss is used.
Seed {seed}; {seconds} s on {threads} thread(s).

| Text | Packages |
|---|---|
{domains}

Only the fitting side of each domain was used, and no BIG-bench text. Package versions, checksums of the text and the
losses of all layers are in the recipe's `recipe.json`.
"""


def render_card(recipe: Recipe, figures: dict[str, Any] | None) -> str:
    """Return the card as Markdown; without figures it says that they were not measured."""
    described = recipe.description
    shape = recipe.shape
    rows = [
        f"| {domain['about']} | {', '.join(domain['packages']) or 'stored with the upcycled recipe'} |"
        for domain in described.get("domains", [])
    ]
    training = described.get("training", {})
    text = _HEAD.format(
        shared=shape.shared,
        experts=shape.experts,
        top_k=shape.top_k,
        layers=recipe.layers,
        package=described["parent"].get("package", "a local file"),
        unrepaired=sum("repaired" not in layer for layer in training.get("losses", [])),
        tokens=training.get("tokens", 0),
        seed=described.get("seed", "unknown"),
        seconds=training.get("seconds", "unknown"),
        threads=training.get("threads", "unknown"),
        domains="\n".join(rows),
    )
    return text + (_measured(figures, shape.experts) if figures else "\n## Measured\nNot measured yet.\n")


def _measured(figures: dict[str, Any], experts: int) -> str:
    lines = [
        "",
        "## Measured",
        f"Held-out text, never used for fitting; weights as stored, computed in {figures['dtype']}, blocks of "
        f"{figures['block_tokens']} tokens.",
        "",
        f"| Domain | Tokens | Dense perplexity | This model | Ratio | Best {experts // 2} of {experts} cover |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in figures["domains"].items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {row['dense_perplexity']:.2f} | {row['perplexity']:.2f} "
            f"| {row['ratio']:.3f} | {row['best_half_mass']:.1%} |"
        )
    lines += [
        "",
        f"All domains together (geometric mean): {figures['mean_ratio']:.3f} times the dense perplexity; largest "
        f"{figures['worst_ratio']:.3f}. Smallest share of any expert: {min(figures['layers']['min_share']):.2%}.",
        "",
        f"Keeping few experts a layer: perplexity over that of all {experts}, on {figures['keeping']['tokens']:,} of "
        "these tokens. Global: the most used on fitting text; own: the most used by the block itself, the upper bound "
        "of a predictor; random: drawn for each layer, seed 0.",
        "",
        "| Kept | Global frequency | Own frequency | Random |",
        "|---|---|---|---|",
    ]
    for row in figures["keeping"]["rows"]:
        lines.append(
            f"| {row['kept']} ({row['kept'] / experts:.0%}) | {row['global']:.3f} | {row['own']:.3f} "
            f"| {row['random']:.3f} |"
        )
    lines += ["", "## Answers", "Greedy decoding."]
    for chat in figures["answers"]:
        lines += ["", f"**{chat['question']}**", "", *(f"> {line}" for line in chat["answer"].splitlines())]
    return "\n".join(lines) + "\n"
