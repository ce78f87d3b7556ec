"""Measures the native model on held-out text: loss by domain, how its routers choose, and the other models beside.

The held-out text is that of the other kinds: the same documents of the same split, cut into tokens by the model's own
vocabulary. Perplexity a token does not compare across vocabularies, bits a byte do. Terms of routing are those of
`routing_readings`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from recipes import corpora
from recipes.held_out import answers, compute_type, counts, cut, losses
from recipes.routing_readings import readings
from workbench.models import reference
from workbench.models.reference import EMBEDDED, dense
from workbench.models.reference.native.build import ASSEMBLY, build
from workbench.models.reference.native.recipe import Recipe
from workbench.models.reference.recipe import FIGURES
from workbench.systems.stock import load_stock


def evaluate(
    path: Path | str | None = None,
    recipe: Path | str | None = None,
    dtype: str = "float32",
    block_tokens: int = 256,
    blocks: int = 24,
    beside: tuple[str, ...] = ("reference", "carved"),
    with_answers: bool = True,
) -> dict[str, Any]:
    """Measure a built checkpoint; write ``figures.json`` beside the recipe, and the card.

    Parameters
    ----------
    path : Path or str, optional
        Built folder; left out: the default one, built when missing.
    recipe : Path or str, optional
        Its recipe; left out: the committed one.
    dtype : str
        Compute type, ``float32`` or ``bfloat16``.
    block_tokens, blocks : int
        Tokens of a block, and blocks of each domain at most.
    beside : tuple of str
        Embedded models whose routing and bits a byte are measured too.
    with_answers : bool
        Also generate the five answers.
    """
    compute = compute_type(dtype)
    chosen = Recipe.open(recipe)
    folder = build(path, chosen.folder)
    parent = dense.DenseSource.open(dense.fetch_gguf()).tokenizer()
    texts = [
        corpora.split_texts(domain, parent, chosen.description["seed"])
        for domain in tqdm(corpora.DOMAINS, desc="text", unit="domain")
    ]
    domains, routing = measure(folder, chosen.tokenizer(), texts, compute, block_tokens, blocks)
    figures: dict[str, Any] = {
        "domains": domains,
        "routing": routing,
        "beside": {},
        "adapters_sha256": chosen.description["adapters_sha256"],
        "dtype": dtype,
        "block_tokens": block_tokens,
        "held_out_text_changed": [
            known["name"]
            for part, known in zip(texts, chosen.description["domains"], strict=True)
            if corpora.digest(part.held_out) != known["held_out_sha256"]
        ],
        "answers": answers(load_stock(folder, compute), folder) if with_answers else [],
    }
    for name in beside:
        built = reference.build(kind=EMBEDDED[name])
        domains, routing = measure(built, parent, texts, compute, block_tokens, blocks)
        figures["beside"][name] = {"bits_per_byte": {k: row["bits_per_byte"] for k, row in domains.items()}, **routing}
    (chosen.folder / FIGURES).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    ASSEMBLY.write_card(folder, chosen)
    return figures


def measure(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[corpora.Texts],
    compute: torch.dtype,
    block_tokens: int,
    blocks: int,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return a built model's loss by domain, and its `readings`."""
    model = load_stock(folder, compute)
    experts, top_k = _sizes(model.config)
    rows: dict[str, dict[str, float]] = {}
    picked: dict[str, Tensor] = {}
    for part in tqdm(texts, desc=folder.name, unit="domain"):
        ids = cut(corpora.joined(part.held_out, tokenizer, 2_000), block_tokens)[:blocks]
        loss, picked[part.domain] = losses(model, ids, top_k)
        used = np.sort(counts(picked[part.domain], experts), axis=-1)
        best = used[..., experts - experts // 2 :].sum(axis=-1) / used.sum(axis=-1)
        predicted = len(ids) * (block_tokens - 1)
        rows[part.domain] = {
            "tokens": predicted,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": loss * predicted / np.log(2) / byte_length(ids[:, 1:], tokenizer),
            "best_half_mass": float(best.mean()),
        }
    return rows, readings(picked, experts)


def byte_length(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many bytes of text byte-level tokens stand for; the end of a document stands for none."""
    lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    lengths[corpora.DOCUMENT_END] = 0
    return int(lengths[ids].sum())


def _sizes(config: Any) -> tuple[int, int]:
    return int(getattr(config, "num_experts", None) or config.num_local_experts), int(config.num_experts_per_tok)
