"""Build the stock model without its routed experts, exactly as ``from_pretrained`` would build the rest.

The loading itself (names, casts, tied weights, buffers that no checkpoint stores) is transformers' own: the same calls
as ``from_pretrained`` makes, given every tensor but the experts'. Expert parameters stay on the meta device, which
holds shapes and no memory. This module does not know how experts are stored or served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, patch_output_recorders
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from emoe_core.checkpoint.families import language_model_class
from emoe_core.checkpoint.safetensors_files import TensorRef
from emoe_core.errors import CheckpointError
from emoe_core.files import parse, read_text


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the language model of a configuration with every tensor on the meta device."""
    model_class = language_model_class(config)
    assert model_class is not None, config.model_type
    with ExitStack() as contexts:
        for context in model_class.get_init_context(dtype, False, False, None):
            contexts.enter_context(context)
        model: PreTrainedModel = model_class(config)
        patch_output_recorders(model)
    return model


def build_dense_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    folder: Path,
    tensors: dict[str, TensorRef],
    expert_params: frozenset[str],
    device: torch.device,
    attn_implementation: str | None,
    experts_implementation: str | None,
) -> PreTrainedModel:
    """Return the model with all weights but ``expert_params``; see `index.CheckpointIndex.build_model`.

    ``config`` becomes the model's own: pass a copy.
    """
    config.name_or_path = str(folder)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    if experts_implementation is not None:
        config._experts_implementation = experts_implementation
    model = meta_model(config, dtype)
    mapping: Any = get_model_conversion_mapping(model)
    plan = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    with _no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, plan, None)
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys, key=str)[0]
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(found)}, the configuration expects {tuple(expected)}. The "
            f"configuration and the weights belong to different models."
        )
    if info.conversion_errors:
        name, reason = sorted(info.conversion_errors.items())[0]
        raise CheckpointError(f"{folder}: {name} cannot be converted: {str(reason).strip().splitlines()[-1]}")
    # The experts are expected to be missing: without this, transformers would allocate and initialise them.
    info.missing_keys.difference_update(expert_params)
    for name in expert_params:
        model.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
    type(model)._finalize_model_loading(model, plan, info)
    if info.missing_keys:
        raise CheckpointError(
            f"{folder} lacks {len(info.missing_keys)} tensors of the model, the first is {min(info.missing_keys)}. "
            f"It is incomplete; fetch it again."
        )
    _check_materialised(model, expert_params)
    model.eval()
    model.set_use_kernels(False)
    _load_generation_config(model, folder)
    return model


def _check_materialised(model: PreTrainedModel, expert_params: frozenset[str]) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    left = [name for name, tensor in tensors if tensor.is_meta and name not in expert_params]
    if left:
        raise CheckpointError(f"{left[0]} (and {len(left) - 1} other tensors) got no value from the checkpoint.")


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    file = folder / GENERATION_CONFIG_NAME
    try:
        # Stock passes over a file that it cannot read, and over all that it would have asked for.
        if file.is_file() and not isinstance(parse(read_text(file)), dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): mend it, fetch it again, or remove it.") from error
    adjust: Any = getattr(model, "adjust_generation_fn", None)
    if model.can_generate() and adjust is not None:
        adjust(
            None,
            True,
            None,
            str(folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision="main",
            subfolder="",
            trust_remote_code=False,
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
