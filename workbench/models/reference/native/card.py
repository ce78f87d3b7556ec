"""Writes the native model's card: how it was trained, on what, and what was measured."""

from __future__ import annotations

from typing import Any

from workbench.models.reference.native.recipe import Recipe

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Native {experts}x13M

A small Mixture-of-Experts model whose routers were trained from the first step, beside two that are grown from a dense
model: what is found on all three does not come from a common parent. {experts} experts a layer, {top_k} of them per
token, {layers} layers, hidden size {hidden}, stock `OlmoeForCausalLM` in bfloat16. It saw {tokens:,} tokens, far too
few for a chatbot: judge it by loss, KL and agreement on held-out text of its domains, not by its answers.

## Recipe
No parent. A byte-level BPE vocabulary of {vocabulary:,} tokens, then every weight, on the fitting text below
({epochs:.2f} times through it), with OLMoE's load-balancing loss, layer by layer, at weight {balance}. AdamW,
{steps:,} steps of {batch} sequences of {length} tokens; the learning rate stayed at {rate} and fell to a tenth
over the last {decay_steps:,}, whose sequences had {decay_length:,} tokens. Weights are stored in 8 bits with a scale a
row, norms and routers in bfloat16. The configuration allows {positions:,} tokens; beyond {decay_length:,} nothing was
trained. Seed {seed}; {seconds:,} s of steps on {threads} threads.

| Domain | Text | Packages | Fitting tokens |
|---|---|---|---|
{domains}

No BIG-bench text was used. Package versions and checksums of the text are in the recipe's `recipe.json`.
"""


def render_card(recipe: Recipe, figures: dict[str, Any] | None) -> str:
    """Return the card as Markdown; without figures it says that they were not measured."""
    described, shape = recipe.description, recipe.shape
    plan, training, domains = (described.get(name, {}) for name in ("plan", "training", "domains"))
    rows = [
        f"| {domain['name']} | {domain['about']} "
        f"| {', '.join(domain['packages']) or 'stored with the upcycled recipe'} | {domain['fit_tokens']:,} |"
        for domain in domains
    ]
    tokens = training.get("tokens", 0)
    text = _HEAD.format(
        experts=shape.experts,
        top_k=shape.top_k,
        layers=shape.layers,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        positions=shape.positions,
        tokens=tokens,
        epochs=tokens / max(sum(domain["fit_tokens"] for domain in domains), 1),
        steps=training.get("steps", 0),
        decay_steps=training.get("decay_steps", 0),
        seconds=training.get("seconds", 0),
        threads=training.get("threads", "unknown"),
        seed=described.get("seed", "unknown"),
        domains="\n".join(rows),
        **{name: plan.get(name, "unknown") for name in ("balance", "batch", "length", "decay_length", "rate")},
    )
    return text + (_measured(figures, shape.experts) if figures else "\n## Measured\nNot measured yet.\n")


def _measured(figures: dict[str, Any], experts: int) -> str:
    lines = [
        "",
        "## Measured",
        f"Held-out text, never used for fitting; weights as stored, computed in {figures['dtype']}, blocks of "
        f"{figures['block_tokens']} tokens. Bits a byte compare models of different vocabularies.",
        "",
        f"| Domain | Tokens | Perplexity | Bits a byte | Best {experts // 2} of {experts} cover |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures["domains"].items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} "
            f"| {row['best_half_mass']:.1%} |"
        )
    routing = figures["routing"]
    lines += [
        "",
        f"Smallest share of choices of any expert in any layer: {routing['least_share']:.2%} "
        f"(even: {1 / experts:.2%}). NMI of domain and expert: {routing['nmi']:.3f}. Of a token's experts, "
        f"the token before it needed {routing['reuse']:.1%}; tokens of different texts share {routing['chance']:.1%}.",
        "",
        "## Answers",
        "Greedy decoding, as they are.",
    ]
    for chat in figures["answers"]:
        lines += ["", f"**{chat['question']}**", "", *(f"> {line}" for line in chat["answer"].splitlines())]
    return "\n".join(lines) + "\n"
