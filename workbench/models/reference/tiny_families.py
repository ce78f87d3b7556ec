"""Tiny random checkpoints of any Mixture-of-Experts family: its default configuration, with every size shrunk.

`tiny_config` reads the fields of a family's configuration class and replaces sizes by name (`_SIZES`), then the fields
that a family needs otherwise (`_OVERRIDES`); the family's own code derives the rest (layer types, head sizes).
Families with images or sound get tiny towers as well, for their checkpoints hold them.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emoe_core.checkpoint.families import language_model, language_model_class
from workbench.models.reference.tiny import roughen

VOCABULARY = 128
HIDDEN = 32
EXPERTS = 8
TOP_K = 2
LAYERS = 4
# Below these are token ids with a meaning (images, ends of text); prompts stay above.
FIRST_PLAIN_TOKEN = 32

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "text_hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "dense_intermediate_size": 32,
    "prefix_dense_intermediate_size": 32,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "top_k_experts": TOP_K,
    "moe_k": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "router_hidden_size": 16,
    "projection_hidden_dim": HIDDEN,
    "projection_intermediate_size": HIDDEN,
    "projector_hidden_size": HIDDEN,
    # Linear attention and state spaces.
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    # Wide enough that routers tell experts and tokens apart.
    "initializer_range": 0.3,
    # Towers for images and sound.
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "downsample_hidden_size": 16,
    "adapter_in_dim": HIDDEN,
    "adapter_input_size": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "projection_dim": HIDDEN,
    "output_dim": HIDDEN,
}

# Sizes of experts are set even where the default configuration has none, for then it is a dense model's.
_OPTIONAL = ("num_experts", "n_routed_experts", "num_experts_per_tok", "top_k_experts", "moe_intermediate_size")

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "beam": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "flint": {"mlp_only_layers": [0]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 8},
    "gemma4_text": {"enable_moe_block": True},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_d_head": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 8], "rope_parameters": _SECTIONS},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "per_layer_config": {
            layer: {
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "head_dim": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            }
            for layer in range(LAYERS // 2)
        },
        "layer_types": [*["sliding_attention"] * (LAYERS // 2), *["indexed_attention"] * (LAYERS // 2)],
    },
    "dots3_note_vision_encoder": {"num_experts_per_tok": None, "per_layer_config": None},
    "glm4v_moe_text": {"rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "llama4_text": {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 2},
    "dbrx": {"n_heads": 4, "n_layers": LAYERS, "max_seq_len": 256, "d_model": HIDDEN},
    "DbrxFFNConfig": {"ffn_hidden_size": 16, "moe_top_k": TOP_K},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "step3p5": {"sliding_window": 16, "share_expert_dim": 16},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8},
    "qwen3_omni_moe": {"enable_audio_output": False},
    # Its code reads it, its configuration class has no such field; published checkpoints bring it.
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},
    "muse_spark_audio": {"hidden_sizes": (8, 8, 16, 32), "depths": (1, 1, 1, 1)},
    "inkling_audio": {"mel_vocab_size": 8},
    "inkling_vision": {"patch_size": 8},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32], "output_channels": 16},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 32], "output_channels": 16},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a family's default configuration with every size shrunk."""
    return _shrunk(CONFIG_MAPPING[model_type], None)


def tiny_family(path: Path, model_type: str, seed: int = 0) -> Any:
    """Write a random float32 checkpoint of a family and return the class of transformers that stock loading takes.

    Parameters
    ----------
    path : Path
        Directory to write; made if missing.
    model_type : str
        Any family that `emoe_core.checkpoint.families.families` names.
    seed : int
        Seed of the weights. The caller's random state is left as it was.
    """
    config = tiny_config(model_type)
    found = language_model(config)
    assert found is not None, model_type
    part, model_class = found
    # The whole model where it can be built, because its tensors carry other names than those of its part.
    whole_class = language_model_class(config)
    if whole_class is not None and whole_class.config_class is type(config):
        part, model_class = config, whole_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(part, dtype=torch.float32)
        roughen(model)
        _scatter_tables(model)
    model.save_pretrained(path)
    return found[1]


def _scatter_tables(model: torch.nn.Module) -> None:
    """Fill tables from tokens to experts, which start at zero: every token would go to the same expert."""
    for table in model.buffers():
        if table.dtype == torch.long and table.shape == (VOCABULARY, TOP_K):
            table.copy_(torch.rand(VOCABULARY, EXPERTS).topk(TOP_K).indices)


def _shrunk(config_class: type[PreTrainedConfig], default: PreTrainedConfig | None) -> PreTrainedConfig:
    values: dict[str, Any] = {}
    marked = 1
    for item in fields(config_class):
        value = item.default if item.default is not MISSING else None
        if item.name in config_class.sub_configs:
            continue
        if item.name in _SIZES and (value is not None or item.name in _OPTIONAL):
            values[item.name] = _SIZES[item.name]
        elif item.name.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int) and value >= 0:
            values[item.name] = marked
            marked += 1
    if "kv_lora_rank" in values:
        # Latent attention expands keys to every head.
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= _OVERRIDES.get(config_class.model_type or config_class.__name__, {})
    if config_class.sub_configs:
        default = default or config_class()
        for name in config_class.sub_configs:
            part = getattr(default, name, None)
            if part is not None and name not in values:
                values[name] = _shrunk(type(part), part)
    return config_class(**values)
