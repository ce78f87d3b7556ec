"""Writes the model card: how the checkpoint was made, from what, and what was measured."""

from __future__ import annotations

from typing import Any

from workbench.models.reference.upcycled.recipe import Recipe

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Upcycled 8x135M

A Mixture-of-Experts instruct model for experiments with expert memory: {experts} experts a layer, {top_k} per token,
{layers} layers, about 0.69 billion parameters, stock `MixtralForCausalLM` in bfloat16. It is grown from
SmolLM2-135M-Instruct and answers like it; do not use it where a wrong answer matters.

## Recipe
Parent: SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights of the package `{package}`, dequantised.
Branch: one rank-{rank} correction of the feed-forward per expert, trained on one domain each. Mix: routers started as
linear classifiers of the domain, then trained together with all corrections under top-{top_k} routing with a
load-balancing loss. Every expert is stored as a full feed-forward; attention, norms and embeddings are the parent's.
Seed {seed}; {branch_steps} branch steps per domain, {mix_steps} joint steps; {seconds} s of optimiser steps on
{threads} threads.

| Expert's domain | Text | Packages | Fitting tokens at hand |
|---|---|---|---|
{domains}

No BIG-bench text was used for fitting. Package versions, checksums of the fitting and held-out text and all losses
are in the recipe's `recipe.json`.
"""


def render_card(recipe: Recipe, figures: dict[str, Any] | None) -> str:
    """Return the card as Markdown; without figures it says that they were not measured."""
    described = recipe.description
    rows = [
        f"| {domain['name']} | {domain['about']} | {', '.join(domain['packages']) or 'stored with the recipe'} "
        f"| {domain['fit_tokens']:,} |"
        for domain in described.get("domains", [])
    ]
    plan = described.get("plan", {})
    text = _HEAD.format(
        experts=recipe.shape.experts,
        top_k=recipe.shape.top_k,
        rank=recipe.shape.rank,
        layers=recipe.layers,
        package=described["parent"].get("package", "a local file"),
        seed=described.get("seed", "unknown"),
        branch_steps=plan.get("branch_steps", "unknown"),
        mix_steps=plan.get("mix_steps", "unknown"),
        seconds=described.get("training", {}).get("seconds", "unknown"),
        threads=described.get("training", {}).get("threads", "unknown"),
        domains="\n".join(rows),
    )
    return text + (_measured(figures) if figures else "\n## Measured\nNot measured yet.\n")


def _measured(figures: dict[str, Any]) -> str:
    lines = [
        "",
        "## Measured",
        f"Held-out text, never used for fitting; weights as stored, computed in {figures['dtype']}, blocks of "
        f"{figures['block_tokens']} tokens.",
        "",
        "| Domain | Tokens | Dense perplexity | This model | Ratio | Best 4 of 8 experts of a prompt cover |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in figures["domains"].items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {row['dense_perplexity']:.2f} | {row['perplexity']:.2f} "
            f"| {row['ratio']:.3f} | {row['best_half_mass']:.1%} |"
        )
    nmi = figures["layers"]["nmi"]
    share = figures["layers"]["min_share"]
    lines += [
        "",
        f"Below the dense parent on {figures['domains_below_dense']} of {len(figures['domains'])} domains; largest "
        f"ratio {figures['worst_ratio']:.3f}.",
        f"Smallest share of tokens of any expert in any layer, balanced mix: {min(share):.1%}.",
        f"Normalised mutual information of domain and expert per layer: mean {sum(nmi) / len(nmi):.3f}, "
        f"from {min(nmi):.3f} to {max(nmi):.3f}.",
        f"Each prompt's best 4 of 8 experts cover {figures['best_half_mass']:.1%} of its top-2 choices, on average "
        f"over prompts of {figures['block_tokens']} tokens and layers (uniform routing: about 50%).",
        "",
        "## Answers",
        "Greedy decoding.",
    ]
    for chat in figures["answers"]:
        lines += ["", f"**{chat['question']}**", "", *(f"> {line}" for line in chat["answer"].splitlines())]
    return "\n".join(lines) + "\n"
