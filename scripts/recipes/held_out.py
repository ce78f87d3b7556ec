"""Readings of a built mixture on held-out text, and of its dense parent beside it.

Terms: a block is a run of held-out tokens read as one prompt. The weights are those stored (bfloat16), the dense
parent's are rounded alike. Nothing is fitted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from emoe_core.errors import OptionError
from recipes import corpora
from workbench.models.reference import dense
from workbench.models.reference.recipe import Recipe

QUESTIONS = (
    "What is the capital of Italy?",
    "Give me three tips for a good night's sleep.",
    "Write a Python function that adds two numbers.",
    "Explain in two sentences why the sky is blue.",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
)


def compute_type(name: str) -> torch.dtype:
    """Return the type to compute in, ``float32`` or ``bfloat16``; raise `OptionError` for another."""
    if name not in ("float32", "bfloat16"):
        raise OptionError(f"evaluation computes in float32 or bfloat16, not {name}")
    return getattr(torch, name)


def held_out_blocks(recipe: Recipe, source: dense.DenseSource, length: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return the held-out blocks [blocks, length] by domain, and the domains whose text is not the recipe's."""
    tokenizer = source.tokenizer()
    splits = [corpora.split(domain, tokenizer, recipe.description["seed"]) for domain in corpora.DOMAINS]
    changed = [
        split.domain
        for split, known in zip(splits, recipe.description["domains"], strict=True)
        if split.held_out_sha256 != known["held_out_sha256"]
    ]
    return {split.domain: cut(split.held_out, length) for split in splits}, changed


def dense_losses(source: dense.DenseSource, blocks: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
    """Return the parent's mean loss, in nats a token, by domain."""
    parent = source.model(torch.bfloat16).to(dtype)  # type: ignore[arg-type]
    return np.array([losses(parent, part)[0] for part in tqdm(blocks.values(), desc="dense", unit="domain")])


def predicted_tokens(blocks: dict[str, Tensor]) -> np.ndarray:
    """Return how many tokens are predicted, by domain: all but the first of each block."""
    return np.array([part.shape[0] * (part.shape[1] - 1) for part in blocks.values()])


def cut(ids: Tensor, length: int) -> Tensor:
    """Cut token ids [tokens] into whole blocks [blocks, length]."""
    whole = len(ids) // length
    return ids[: whole * length].view(whole, length)


@torch.no_grad()
def losses(model: PreTrainedModel, blocks: Tensor, top_k: int = 0) -> tuple[float, Tensor]:
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


def counts(chosen: Tensor, experts: int) -> np.ndarray:
    """Return [blocks, layers, experts] from the chosen experts [blocks, layers, tokens, k]."""
    return torch.nn.functional.one_hot(chosen.flatten(2), experts).sum(dim=2).numpy()


@torch.no_grad()
def answers(model: PreTrainedModel, folder: Path, max_new_tokens: int = 80) -> list[dict[str, str]]:
    """Return the greedy answers to `QUESTIONS`."""
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
