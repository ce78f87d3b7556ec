"""A sentence encoder of a few kilobytes, in place of MiniLM, whose package tests do not fetch."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from workbench.models.reference.tiny import tiny_tokenizer
from workbench.quality.similarity import SentenceEncoder


def tiny_encoder() -> SentenceEncoder:
    """Return a random encoder that reads bytes: equal texts are alike, others more or less."""
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SentenceEncoder(BertModel(config), tokenizer, max_tokens=128)
