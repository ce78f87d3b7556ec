"""The tokenizer that lies beside a checkpoint's weights. Code that comes with it is never run, nor is the hub asked."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint's directory, or None where there is none."""
    # Asked for first: transformers would look for a missing one on the hub.
    if not any((Path(path) / name).exists() for name in FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer
