"""Measures the native model on held-out text: loss by domain, how its routers choose, and the other models beside.

The held-out text is that of the other kinds: the same documents of the same split, cut into tokens by the model's own
vocabulary. Perplexity a token does not compare across vocabularies, bits a byte do. Terms of routing are those of
`routing_readings`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipes import corpora
from recipes.evaluation import Built
from recipes.held_out import counts, cut, losses
from recipes.routing_readings import readings
from workbench.models import reference
from workbench.models.reference import EMBEDDED, dense
from workbench.systems.stock import load_stock


def measured(built: Built, beside: tuple[str, ...] = ("reference", "carved")) -> dict[str, Any]:
    """Return the figures of the built model, with routing and bits a byte of other embedded models beside."""
    recipe, compute, tokens = built.recipe, built.compute, built.block_tokens
    parent = dense.DenseSource.open(dense.fetch_gguf()).tokenizer()
    texts = [
        corpora.split_texts(domain, parent, recipe.description["seed"])
        for domain in tqdm(corpora.DOMAINS, desc="text", unit="domain")
    ]
    domains, routing = measure(built.model, recipe.tokenizer(), texts, tokens)
    figures: dict[str, Any] = {"domains": domains, "routing": routing, "beside": {}}
    for name in beside:
        other = load_stock(reference.build(kind=EMBEDDED[name]), compute)
        domains, routing = measure(other, parent, texts, tokens)
        figures["beside"][name] = {"bits_per_byte": {k: row["bits_per_byte"] for k, row in domains.items()}, **routing}
    changed = [
        known["name"]
        for part, known in zip(texts, recipe.description["domains"], strict=True)
        if corpora.digest(part.held_out) != known["held_out_sha256"]
    ]
    return figures | {"held_out_text_changed": changed}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[corpora.Texts],
    block_tokens: int,
    blocks: int = 24,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return a model's loss by domain on at most some blocks of each, and its `readings`."""
    experts, top_k = _sizes(model.config)
    rows: dict[str, dict[str, float]] = {}
    picked: dict[str, Tensor] = {}
    for part in tqdm(texts, desc=model.config.model_type, unit="domain"):
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
