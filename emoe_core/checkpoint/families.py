"""Which Mixture-of-Experts families the installed transformers has, read from its own source and registries.

Terms. A *family* is one ``model_type`` that a checkpoint's ``config.json`` can carry. Families are found, not listed:
every modeling file that decorates a class with ``use_experts_implementation`` counts, with each model type that
transformers' registries of whole models lead to it, so a newer transformers brings its families along. Nothing is
imported or built to find them.

Whether a family can be served is decided at load, by `emoe_core.checkpoint.index`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

DECORATOR = "@use_experts_implementation"
# Kinds of whole models that predict the next token from text, the first that knows a configuration is loaded.
_LANGUAGE_MODELS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_OTHER_MODELS = ("SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")

REFUSED: Mapping[str, str] = {
    "diffusion_gemma": "it denoises blocks of tokens and does not predict the next one",
    "doge": "its experts are single rows of embeddings, chosen by products of keys",
    "longcat_flash": "some of its experts are identities without weights, which slots do not hold",
    "nllb-moe": "it is an encoder and a decoder; emoe serves models that continue their prompt",
    "openai_privacy_filter": "it labels tokens and does not predict text",
    "switch_transformers": "it is an encoder and a decoder; emoe serves models that continue their prompt",
}
"""Families with routed experts that cannot be served, with the reason."""
# The modeling files that `emoe_core.checkpoint.adapters` has adapters for.
ADAPTED = ("dbrx", "jetmoe", "llama4", "step3p7")


@dataclass(frozen=True)
class Family:
    """A model type, the modeling file (folder) its code lies in, and the class of transformers that is loaded."""

    model_type: str
    module: str
    model_class: str


def decorated_modules() -> tuple[str, ...]:
    """Return the names of the folders of transformers' models that use the experts interface, sorted."""
    root = Path(transformers.__file__).parent / "models"
    return tuple(
        sorted(
            file.parent.name for file in root.glob("*/modeling_*.py") if DECORATOR in file.read_text(encoding="utf-8")
        )
    )


def families() -> tuple[Family, ...]:
    """Return every family whose modeling file uses the experts interface or is adapted, sorted by model type."""
    modules = {*decorated_modules(), *ADAPTED}
    found = []
    for model_type in CONFIG_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        model_class = class_name(model_type)
        if module in modules and model_class is not None:
            found.append(Family(model_type, module, model_class))
    return tuple(sorted(found, key=lambda family: family.model_type))


def language_model(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Any] | None:
    """Return what transformers needs to make a language model of a checkpoint's configuration, or None.

    Where there is a class for the text alone, that and the text's part of the configuration. Otherwise the class of the
    whole model, images and all. Where that only holds models that run one by one, the first of them that reads text.

    Returns
    -------
    tuple or None
        A configuration (the given one, or a part of it) and the class that takes it.
    """
    model_class = language_model_class(config)
    if model_class is None:
        return None
    if model_class.config_class == config.sub_configs.get("text_config"):
        return config.get_text_config(), model_class
    if _runs(model_class):
        return config, model_class
    parts = (getattr(config, name, None) for name in config.sub_configs)
    found = (language_model(part) for part in parts if isinstance(part, PreTrainedConfig))
    return next((part for part in found if part is not None), None)


def language_model_class(config: PreTrainedConfig) -> Any | None:
    """Return the class of transformers that predicts text from exactly this configuration, or None."""
    for kind in _LANGUAGE_MODELS:
        mapping: Any = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING")
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def _runs(model_class: Any) -> bool:
    return model_class.forward is not torch.nn.Module.forward


def class_name(model_type: str) -> str | None:
    """Return the name of the class of transformers for a model type's checkpoints, or None."""
    for kind in (*_LANGUAGE_MODELS, *_OTHER_MODELS):
        names: Mapping[str, str] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        if model_type in names:
            return names[model_type]
    return None
