"""A dense parent of a few kilobytes, from which both kinds of reference model can be grown in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from workbench.models.reference.tiny import tiny_tokenizer

HIDDEN, NEURONS, VOCAB = 32, 48, 64


def tiny_dense() -> LlamaForCausalLM:
    """Return the parent as a model, with values as they are stored, so that building loses nothing of them."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


class TinyParent:
    """The parent with the interface of `DenseSource` that the builders use; `path` stands for its released file."""

    def __init__(self, path: Path, content: bytes = b"the tiny parent") -> None:
        self.model, self.path = tiny_dense(), path
        self.config = self.model.config
        path.write_bytes(content)

    def tensor(self, name: str) -> torch.Tensor:
        return self.model.state_dict()[name].float()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tiny_tokenizer()
