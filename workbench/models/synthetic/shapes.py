"""Published shapes of Mixture-of-Experts models, and smaller ones of the same proportions.

A *shape* is what decides memory and speed: widths, layers, experts, top-k, vocabulary. ``scale`` s multiplies the bytes
of the model by about s: hidden size, the experts' inner sizes and the vocabulary are multiplied by sqrt(s) and rounded,
heads follow, and layers, experts and top-k stay, so that routing has the published form. Numbers are those of each
model's published configuration file; ``bench`` is no published model but the 3.3 GB shape that this project's figures
are taken on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import PreTrainedConfig

from emoe_core.errors import OptionError, require_known

# Byte tokens and the marks of a chat: below this the tokenizer has no room.
LEAST_VOCABULARY = 259
_EXPERT_FIELD = {"Mixtral": "num_local_experts", "GptOss": "num_local_experts"}
_EXPERT_FIELD |= {"DeepseekV2": "n_routed_experts", "DeepseekV3": "n_routed_experts"}


@dataclass(frozen=True)
class Shape:
    """One model's sizes.

    Attributes
    ----------
    family : str
        Class of the configuration in transformers, without "Config".
    hidden, intermediate : int
        Width of the residual stream; inner width of one routed expert.
    layers, experts, top_k, vocab, heads, kv_heads : int
    head_dim : int or None
        None: hidden / heads.
    widths : dict
        Other inner widths, by field of the configuration; they scale.
    fields : dict
        Everything else, by field of the configuration.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int | None = None
    widths: dict[str, int] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "layers", "experts", "top_k", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        if self.top_k > self.experts:
            raise OptionError(f"top-k {self.top_k} is more than {self.experts} experts: give a smaller --top-k")
        if self.vocab < LEAST_VOCABULARY:
            raise OptionError(f"a vocabulary of {self.vocab} has no room for bytes: give --vocab {LEAST_VOCABULARY}")

    def config(self, dtype: str = "bfloat16") -> PreTrainedConfig:
        """Return the configuration that transformers makes the model from."""
        kind = getattr(transformers, f"{self.family}Config")
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "num_experts_per_tok": self.top_k,
            _EXPERT_FIELD.get(self.family, "num_experts"): self.experts,
            "moe_intermediate_size" if "intermediate_size" in self.widths else "intermediate_size": self.intermediate,
        }
        if self.head_dim is not None:
            sizes["head_dim"] = self.head_dim
        marks = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256, "tie_word_embeddings": False}
        config = kind(**{**self.fields, **self.widths, **sizes, **marks})
        config.dtype = dtype
        return config


def _qwen(family: str, hidden: int, intermediate: int, layers: int, experts: int, top_k: int, **more: Any) -> Shape:
    fields = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "mlp_only_layers": []}
    fields |= {"norm_topk_prob": family == "Qwen3Moe", "max_position_embeddings": 32768}
    return Shape(family, hidden, intermediate, layers, experts, top_k, 151936, fields=fields, **more)


_OLMOE = {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_MIXTRAL = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
SHAPES: dict[str, Shape] = {
    "bench": Shape("Olmoe", 1024, 1024, 8, 64, 8, 8192, 16, 16, fields=_OLMOE),
    "olmoe-1b-7b": Shape("Olmoe", 2048, 1024, 16, 64, 8, 50304, 16, 16, fields=_OLMOE),
    "mixtral-8x7b": Shape("Mixtral", 4096, 14336, 32, 8, 2, 32000, 32, 8, fields=_MIXTRAL),
    "mixtral-8x22b": Shape("Mixtral", 6144, 16384, 56, 8, 2, 32768, 48, 8, fields=_MIXTRAL),
    "qwen1.5-moe-a2.7b": _qwen(
        "Qwen2Moe", 2048, 1408, 24, 60, 4, heads=16, kv_heads=16,
        widths={"intermediate_size": 5632, "shared_expert_intermediate_size": 5632},
    ),
    "qwen2-57b-a14b": _qwen(
        "Qwen2Moe", 3584, 2560, 28, 64, 8, heads=28, kv_heads=4,
        widths={"intermediate_size": 18944, "shared_expert_intermediate_size": 20480},
    ),
    "qwen3-30b-a3b": _qwen(
        "Qwen3Moe", 2048, 768, 48, 128, 8, heads=32, kv_heads=4, head_dim=128, widths={"intermediate_size": 6144}
    ),
    "qwen3-235b-a22b": _qwen(
        "Qwen3Moe", 4096, 1536, 94, 128, 8, heads=64, kv_heads=4, head_dim=128, widths={"intermediate_size": 12288}
    ),
    "deepseek-v2-lite": Shape(
        "DeepseekV2", 2048, 1408, 27, 64, 6, 102400, 16, 16, widths={"intermediate_size": 10944},
        fields=_LATENT
        | {"n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
        | {"topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
    "deepseek-v3": Shape(
        "DeepseekV3", 7168, 2048, 61, 256, 8, 129280, 128, 128, widths={"intermediate_size": 18432},
        fields=_LATENT
        | {"n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "gpt-oss-20b": Shape("GptOss", 2880, 2880, 24, 32, 4, 201088, 64, 8, head_dim=64),
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """Return a shape by name; OptionError, naming the known ones, when there is none."""
    require_known(name, SHAPES, "shape")
    return SHAPES[name]


def scaled(shape: Shape, scale: float) -> Shape:
    """Return a shape with about ``scale`` times the bytes; see the module's text.

    Raises
    ------
    OptionError
        When the scale is not in (0, 1].
    """
    if not 0 < scale <= 1:
        raise OptionError(f"scale is {scale}: give a share of the published size, above 0 and at most 1")
    if scale == 1:
        return shape
    factor = math.sqrt(scale)
    return replace(
        _with_hidden(shape, _round(shape.hidden * factor, 64)),
        intermediate=_round(shape.intermediate * factor, 64),
        vocab=max(LEAST_VOCABULARY, _round(shape.vocab * factor, 64)),
        widths={name: _round(width * factor, 64) for name, width in shape.widths.items()},
    )


def overridden(shape: Shape, **sizes: int | None) -> Shape:
    """Return a shape with given sizes (fields of `Shape`; None keeps the shape's)."""
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        if size < 1:
            raise OptionError(f"--{name.replace('_', '-')} {size}: give at least 1")
    hidden = given.pop("hidden", None)
    fields: dict[str, Any] = dict(given)
    return replace(shape if hidden is None else _with_hidden(shape, hidden), **fields)


def _with_hidden(shape: Shape, hidden: int) -> Shape:
    """Return the shape at another width, with heads of the same width as far as that divides it."""
    share = hidden / shape.hidden
    if shape.head_dim is not None or "kv_lora_rank" in shape.fields:
        heads = max(1, round(shape.heads * share))
    else:
        width = min(hidden, shape.hidden // shape.heads)
        while hidden % width or width % 2:
            width -= 1
            if width < 2:
                raise OptionError(f"a hidden size of {hidden} cannot be cut into heads: give an even number")
        heads = hidden // width
    wanted = max(1, min(heads, round(shape.kv_heads * heads / shape.heads)))
    kv_heads = next(count for count in range(wanted, 0, -1) if heads % count == 0)
    return replace(shape, hidden=hidden, heads=heads, kv_heads=kv_heads)


def _round(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
