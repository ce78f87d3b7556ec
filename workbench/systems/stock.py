"""Stock transformers with every expert resident: decoding given tokens with its own cache, or answering freely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from emoe_core.config import resolve_device
from emoe_core.errors import OptionError
from emoe_core.generation import load_tokenizer


def load_stock(checkpoint: str | Path, dtype: Any = "auto", experts: str = "eager", **options: Any) -> Any:
    """Return a model as stock transformers loads it, every expert resident, ready to run.

    Parameters
    ----------
    checkpoint : str or Path
    dtype : str or torch.dtype
        "auto" is the checkpoint's own.
    experts : str
        One of transformers' ways to compute experts: "eager" (the reference of exactness), "grouped_mm".
    **options
        Others of ``from_pretrained``.
    """
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, experts_implementation=experts, **options
    ).eval()


def required_tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside a checkpoint's weights; OptionError where there is none."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise OptionError(f"{checkpoint} has no tokenizer: save one beside the weights")
    return tokenizer


class TorchDecoder:
    """Decodes with a transformers model, batch 1; the base of the systems that are one.

    A likeliest token is returned when the device has computed it, so who holds a clock need not wait for the device.
    """

    model: Any

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._cache: Any = None

    def prefill(self, token_ids: Sequence[int]) -> int:
        self._cache = None
        return self._step(list(token_ids))

    def decode(self, token_id: int) -> int:
        return self._step([token_id])

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._cache = None
        self.model = None

    def _step(self, token_ids: list[int]) -> int:
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([token_ids], device=self.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


class StockDecoder(TorchDecoder):
    """Stock transformers; the option ``experts_implementation`` is one of its ways to compute experts."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(resolve_device(spec.get("device", "cpu")))
        self._experts = spec["options"]["experts_implementation"]
        self.model = load_stock(spec["checkpoint"], spec["dtype"], self._experts).to(self.device)

    def description(self) -> str:
        return f"transformers {version('transformers')}, all resident, experts {self._experts}"


def greedy_answers(
    model: Any,
    checkpoint: str | Path,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return a transformers model's greedy answers to prompts given as token ids, one at a time."""
    tokenizer = required_tokenizer(checkpoint)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        found = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
        texts.append(str(tokenizer.decode(found, skip_special_tokens=True)))
        if progress is not None:
            progress(len(texts), len(prompts))
    return texts
