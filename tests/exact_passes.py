"""Passes of stock models that the engine's must equal bit for bit, and the families they are tried on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def stock(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.eval()


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model's experts allocations of their own, wherever its files had them, as a move to a device does."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    return model


def prompt_ids(vocabulary: int, tokens: int = 17, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(5, vocabulary, (batch, tokens), generator=generator)


def prefill_and_decode(model: PreTrainedModel, ids: torch.Tensor, steps: int = 4) -> list[torch.Tensor]:
    logits = []
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        logits.append(output.logits)
        for _ in range(steps):
            chosen = output.logits[:, -1:].argmax(dim=-1)
            output = model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    return logits
