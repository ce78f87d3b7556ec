"""Find a model's directory and read its configuration, refusing what emoe cannot serve before any weight is read.

A model is a local directory that ``save_pretrained()`` or a hub download wrote, or the id of a model on the Hugging
Face hub. Code that comes with a checkpoint is never run. This module looks at ``config.json`` only; whether the weights
are there and whole is the matter of `emoe_core.checkpoint.safetensors_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from emoe_core.checkpoint.families import REFUSED, language_model
from emoe_core.checkpoint.hub import HUB_ID, download
from emoe_core.errors import CheckpointError, UnsupportedFamilyError
from emoe_core.files import parse, read_text

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "top_k")
_IMPLEMENTATIONS = tuple(f"{private}{kind}_implementation" for private in ("", "_") for kind in ("attn", "experts"))
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
MAX_LAYERS = 4096


def find_model(path: str | Path) -> Path:
    """Return the model's directory; a hub id is downloaded, or taken from the hub's own cache.

    Raises
    ------
    CheckpointError
        When there is no model under this name.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is not a model: it has no config.json. Give the directory that save_pretrained() or a hub "
                f"download wrote."
            )
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the directory of a Hugging Face checkpoint.")
    if isinstance(path, str) and HUB_ID.fullmatch(path):
        return download(path)
    raise CheckpointError(f"{folder} does not exist; give the directory of a Hugging Face checkpoint.")


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of the causal language model in a directory.

    Raises
    ------
    CheckpointError
        When the configuration cannot be read, or the weights are quantised.
    UnsupportedFamilyError
        When transformers has no causal language model for it.
    """
    try:
        raw = parse(read_text(folder / "config.json"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is no model configuration ({error!r}).") from error
    _refuse_kernels(raw, folder)
    _refuse_endless(raw, folder)
    for quantisation in _values(raw, ("quantization_config",)):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{folder} ({model_type}) is quantised ({method}). emoe serves float32, bfloat16 and float16 experts; use "
            f"the unquantised weights of this model, or dequantise them with transformers and save them again."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # an unknown family and an invalid value raise several types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedFamilyError(
            f"model type {model_type!r} at {folder} is not part of this transformers, or its configuration is invalid "
            f"({reason}). emoe never runs code that comes with a checkpoint."
        ) from error
    if model_type in REFUSED:
        raise UnsupportedFamilyError(f"model type {model_type!r} at {folder} cannot be served: {REFUSED[model_type]}.")
    found = language_model(config)
    if found is None:
        raise UnsupportedFamilyError(
            f"model type {model_type!r} at {folder} is not a causal language model of transformers."
        )
    return found[0]


def _refuse_kernels(raw: Any, folder: Path) -> None:
    """Refuse a configuration that names other implementations than transformers' own.

    transformers takes the name of a repository there for a kernel, downloads it and runs it; "flash_attention_2" too,
    where the package ``kernels`` is installed. A user may ask for one (``attn_implementation`` of `load`).
    """
    for named in _values(raw, _IMPLEMENTATIONS):
        for name in named.values() if isinstance(named, dict) else (named,):
            if name not in (None, *_BUILT_IN):
                raise CheckpointError(
                    f"{folder / 'config.json'} asks for the implementation {name!r}, which may be code from elsewhere; "
                    f"emoe lets a checkpoint choose among {', '.join(_BUILT_IN)} only. Remove the entry from the file; "
                    f"to have another for attention, pass attn_implementation yourself."
                )


def _refuse_endless(raw: Any, folder: Path) -> None:
    """Refuse a number of layers that no model has: building it would not end."""
    for count in _values(raw, _LAYER_COUNTS):
        if not isinstance(count, int | list) or (isinstance(count, int) and count > MAX_LAYERS):
            raise CheckpointError(
                f"{folder / 'config.json'} speaks of {count!r:.50} layers, more than the {MAX_LAYERS} that emoe "
                f"builds. It is damaged; fetch the model again."
            )


def expert_count(config: PreTrainedConfig) -> int:
    """Return the number of experts a configuration speaks of anywhere, 0 for a dense model."""
    counts = [value for value in _values(config.to_dict(), _EXPERT_COUNTS) if isinstance(value, int)]
    return max(counts, default=0)


def top_k(config: PreTrainedConfig) -> int:
    """Return how many experts a token is routed to."""
    text: Any = config.get_text_config()
    for name in _TOP_K:
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for value in _values(text.to_dict(), _TOP_K):
        if isinstance(value, int):
            return value
    raise UnsupportedFamilyError(
        f"model type {config.model_type!r}: the configuration does not say how many experts a token uses "
        f"(looked for {', '.join(_TOP_K)})."
    )


def _values(node: Any, keys: tuple[str, ...]) -> Iterator[Any]:
    """Yield every value that is not empty under one of the keys, at any depth, outer ones first."""
    left = [node]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key in keys and value)
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        left.extend(reversed(list(inner)))
