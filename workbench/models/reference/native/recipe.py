"""The native kind's recipe: its own weights in 8 bits, and its tokenizer.

A matrix is stored as ``NAME`` (int8) and ``NAME.step`` (bfloat16, one for each row of the last dimension), so that
``weight = NAME * step``; what is no matrix (norms) and the routers are stored as they are, in bfloat16. A router
decides by small differences, and all routers together have less than a percent of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import OlmoeConfig, PreTrainedTokenizerFast

from emoe_core.errors import CheckpointError
from workbench.fetch import sha256_file
from workbench.models.reference import recipe

TOKENIZER = "tokenizer.json"
STEP = ".step"
LARGEST_CODE = 127
# <|endoftext|> separates documents; the two others stand around a turn of a chat.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; ``width`` is an expert's."""

    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    experts: int = 16
    top_k: int = 2
    width: int = 96
    positions: int = 4096

    def config(self) -> OlmoeConfig:
        """Return the stock configuration."""
        config = OlmoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=False,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
        config.architectures = ["OlmoeForCausalLM"]
        return config


class Recipe(recipe.Recipe):
    """A checked recipe of a model trained from scratch."""

    kind: ClassVar[str] = "native"
    limit_bytes: ClassVar[int] = 13_500_000

    @classmethod
    def open(cls, folder: Path | str | None = None) -> Self:
        """Read a recipe, and check its tokenizer too; see the base."""
        found = super().open(folder)
        path = found.folder / TOKENIZER
        if not path.exists() or sha256_file(path) != found.base_sha256:
            raise CheckpointError(
                f"{path} is missing or not the one that the weights were trained with: the recipe was altered. "
                f"Restore the folder from version control."
            )
        return found

    @property
    def base_sha256(self) -> str:
        """Checksum of the tokenizer: there is no parent."""
        return str(self.description.get("tokenizer_sha256"))

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return Shape(**self.description["shape"])

    def layer(self, index: int) -> dict[str, Tensor]:
        """Return the weights of one layer in bfloat16, by their names in it; experts are stacked."""
        return restored(self.parts(f"model.layers.{index}."))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer with its chat template."""
        end, _, turn = SPECIAL
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(self.folder / TOKENIZER)),
            bos_token=end,
            eos_token=turn,
            pad_token=end,
            additional_special_tokens=[SPECIAL[1]],
            padding_side="left",
            model_max_length=self.shape.positions,
            clean_up_tokenization_spaces=False,
            chat_template=CHAT_TEMPLATE,
        )


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in 8 bits, as a recipe has them."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or is_router(name):
            parts[name] = tensor.to(torch.bfloat16)
            continue
        step = (tensor.float().abs().amax(dim=-1, keepdim=True) / LARGEST_CODE).to(torch.bfloat16)
        safe = step.float().clamp_min(torch.finfo(torch.float32).tiny)
        parts[name] = (tensor.float() / safe).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
        parts[name + STEP] = step
    return parts


def restored(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that stored ones stand for, in bfloat16, by one product each: the same bits everywhere."""
    return {
        name: (tensor.float() * parts[name + STEP].float()).to(torch.bfloat16)
        if name + STEP in parts
        else tensor.to(torch.bfloat16)
        for name, tensor in parts.items()
        if not name.endswith(STEP)
    }


def is_router(name: str) -> bool:
    """Return whether a parameter is a router's."""
    return name.endswith("mlp.gate.weight")
