"""The tokenizer that lies beside a checkpoint's weights. Code that comes with it is never run, nor is the hub asked."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emoe_core.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint's directory, or None where there is none.

    Raises
    ------
    CheckpointError
        When its files are damaged, or it exists only as code of its own.
    """
    # Asked for first: transformers would look for a missing one on the hub.
    if not any((Path(path) / name).exists() for name in FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files, and those that need code of their own, raise many unrelated types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"the tokenizer of {path} cannot be loaded ({reason}). emoe never runs code that comes with a checkpoint: "
            f"save the tokenizer as tokenizer.json, or fetch the files again."
        ) from error
    return tokenizer
