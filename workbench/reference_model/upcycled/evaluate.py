"""Measures a built mixture on held-out text: perplexity beside the dense parent, routing, and five answers.

Terms: a block is a run of held-out tokens read as one prompt; the share of an expert is its part of all top-k choices
of a layer over equally long text of every domain; NMI is the mutual information of domain and chosen expert over the
mean of their entropies. The weights are those stored (bfloat16), the dense parent's are rounded alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from emoe_core.errors import OptionError
from workbench.reference_model import dense
from workbench.reference_model.upcycled import corpora
from workbench.reference_model.upcycled.build import CARD, build
from workbench.reference_model.upcycled.card import write_card
from workbench.reference_model.upcycled.recipe import FIGURES, Recipe

HEATMAP = "routing.png"
QUESTIONS = (
    "What is the capital of Italy?",
    "Give me three tips for a good night's sleep.",
    "Write a Python function that adds two numbers.",
    "Explain in two sentences why the sky is blue.",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
)


def evaluate(
    path: Path | str | None = None,
    recipe: Path | str | None = None,
    dtype: str = "float32",
    block_tokens: int = 256,
    answers: bool = True,
) -> dict[str, Any]:
    """Measure a built checkpoint; write ``figures.json`` and the heatmap beside the recipe, and the card.

    Parameters
    ----------
    path : Path or str, optional
        Built folder; left out: the default one, built when missing.
    recipe : Path or str, optional
        Its recipe; left out: the committed one.
    dtype : str
        Compute type, ``float32`` or ``bfloat16``.
    block_tokens : int
        Tokens of a block.
    answers : bool
        Also generate the five answers.
    """
    if dtype not in ("float32", "bfloat16"):
        raise OptionError(f"evaluation computes in float32 or bfloat16, not {dtype}")
    chosen = Recipe.open(recipe)
    folder = build(path, chosen.folder)
    compute = getattr(torch, dtype)
    source = dense.DenseSource.open(dense.fetch_gguf())
    tokenizer = source.tokenizer()
    seed = chosen.description["seed"]
    splits = [corpora.split(domain, tokenizer, seed) for domain in corpora.DOMAINS]
    changed = [
        split.domain
        for split, known in zip(splits, chosen.description["domains"], strict=True)
        if split.held_out_sha256 != known["held_out_sha256"]
    ]
    blocks = [_blocks(split.held_out, block_tokens) for split in splits]
    parent = source.model(torch.bfloat16).to(compute)
    base = [_losses(parent, part)[0] for part in tqdm(blocks, desc="dense", unit="domain")]
    del parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, experts_implementation="eager").eval()
    mixed = [_losses(model, part, chosen.shape.top_k) for part in tqdm(blocks, desc="mixture", unit="domain")]
    counts = np.stack([_counts(found, chosen.shape.experts) for _, found in mixed])
    figures = summarise(
        [split.domain for split in splits],
        np.array([part.shape[0] * (part.shape[1] - 1) for part in blocks]),
        np.array(base),
        np.array([loss for loss, _ in mixed]),
        counts,
    )
    figures |= {
        "adapters_sha256": chosen.description["adapters_sha256"],
        "dtype": dtype,
        "block_tokens": block_tokens,
        "held_out_text_changed": changed,
        "answers": _answers(model, folder) if answers else [],
    }
    (chosen.folder / FIGURES).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    draw_heatmap(figures, chosen.folder / HEATMAP)
    write_card(folder / CARD, chosen)
    return figures


def summarise(names: list[str], tokens: np.ndarray, base: np.ndarray, mixed: np.ndarray, counts: np.ndarray) -> dict:
    """Turn losses and choice counts into the figures.

    Parameters
    ----------
    names : list of str
        Domains.
    tokens, base, mixed : numpy.ndarray, shape [domains]
        Predicted tokens, and mean negative log-likelihood (nats a token) of the parent and of the mixture.
    counts : numpy.ndarray, shape [domains, blocks, layers, experts]
        How often each expert was chosen in each block.
    """
    ratio = np.exp(mixed - base)
    by_domain = counts.sum(axis=1).astype(float)
    shares = by_domain / by_domain.sum(axis=2, keepdims=True)
    overall = shares.mean(axis=0)
    experts = counts.shape[-1]
    ordered = np.sort(counts, axis=-1)[..., ::-1]
    best = ordered[..., : experts // 2].sum(axis=-1) / counts.sum(axis=-1)
    return {
        "domains": {
            name: {
                "tokens": int(tokens[i]),
                "dense_perplexity": float(np.exp(base[i])),
                "perplexity": float(np.exp(mixed[i])),
                "ratio": float(ratio[i]),
                "best_half_mass": float(best[i].mean()),
            }
            for i, name in enumerate(names)
        },
        "domains_below_dense": int((ratio < 1).sum()),
        "worst_ratio": float(ratio.max()),
        "best_half_mass": float(best.mean()),
        "layers": {
            "min_share": [float(value) for value in overall.min(axis=1)],
            "nmi": [normalised_mutual_information(shares[:, layer]) for layer in range(shares.shape[1])],
        },
        "shares": np.round(shares, 5).tolist(),
    }


def normalised_mutual_information(shares: np.ndarray) -> float:
    """Return the NMI of domain and expert for one layer.

    Parameters
    ----------
    shares : numpy.ndarray, shape [domains, experts]
        Share of each expert within each domain; domains weigh the same.

    Returns
    -------
    float
        0 when experts say nothing about the domain, 1 when one decides the other.
    """
    joint = shares / shares.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    filled = joint > 0
    information = (joint[filled] * np.log((joint / np.outer(rows, columns))[filled])).sum()
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (rows, columns)]
    return float(information / np.mean(entropies)) if min(entropies) > 0 else 0.0


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


def _blocks(ids: Tensor, length: int) -> Tensor:
    whole = len(ids) // length
    return ids[: whole * length].view(whole, length)


@torch.no_grad()
def _losses(model: PreTrainedModel, blocks: Tensor, top_k: int = 0) -> tuple[float, Tensor]:
    """Return the mean loss, and with `top_k` the chosen experts [blocks, layers, tokens, k]."""
    total = 0.0
    chosen = []
    for ids in blocks.split(4):
        options = {"output_router_logits": True} if top_k else {}
        output = model(input_ids=ids, use_cache=False, **options)
        logits = output.logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        if top_k:
            routed = torch.stack([layer.topk(top_k, dim=-1).indices for layer in output.router_logits])
            chosen.append(routed.view(len(routed), len(ids), -1, top_k).transpose(0, 1))
    predicted = blocks.shape[0] * (blocks.shape[1] - 1)
    return total / predicted, torch.cat(chosen) if chosen else torch.empty(0)


def _counts(chosen: Tensor, experts: int) -> np.ndarray:
    """Return [blocks, layers, experts] from the chosen experts [blocks, layers, tokens, k]."""
    return torch.nn.functional.one_hot(chosen.flatten(2), experts).sum(dim=2).numpy()


@torch.no_grad()
def _answers(model: PreTrainedModel, folder: Path, max_new_tokens: int = 80) -> list[dict[str, str]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator: Any = model
    found = []
    for question in tqdm(QUESTIONS, desc="answers"):
        inputs: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = generator.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        found.append({"question": question, "answer": text.strip()})
    return found
