"""Tiny random Mixture-of-Experts checkpoints for tests: real files of real families, below 2 MB.

Each checkpoint is written by transformers itself (``save_pretrained``), so its file layout (per-expert or
fused tensors, one file or shards) is the family's own. Weights are random: these models exercise shapes, routing rules
and files, they do not know any language. The tokenizer works on UTF-8 bytes and carries a small chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from emoe_core.errors import OptionError, require_known
from emoe_core.files import whole_folder
from emoe_core.loader.cache_folder import cache_dir

HIDDEN = 64
INTERMEDIATE = 64
LAYERS = 3
EXPERTS = 8
TOP_K = 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough that router probabilities and logits differ clearly between experts and tokens.
    "initializer_range": 0.12,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}


def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(
        **_SHARED, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )


def _qwen2_moe() -> PreTrainedConfig:
    return transformers.Qwen2MoeConfig(
        **_SHARED,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _qwen3_moe() -> PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **(_SHARED | {"head_dim": 16}),
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _olmoe() -> PreTrainedConfig:
    return transformers.OlmoeConfig(
        **_SHARED,
        intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
    )


def _deepseek_v3() -> PreTrainedConfig:
    shared = _SHARED | {"num_key_value_heads": 4}
    return transformers.DeepseekV3Config(
        **shared,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )


def _gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(
        **_SHARED,
        intermediate_size=INTERMEDIATE,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
FAMILIES = tuple(_CONFIGS)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: ids 0 to 255 are the bytes, then the special tokens of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    vocabulary |= {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_moe(
    path: Path | str,
    family: str = "mixtral",
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a random checkpoint of one family and return its directory.

    Parameters
    ----------
    path : Path or str
        Directory to write; made if missing.
    family : str
        One of `FAMILIES`.
    seed : int
        Seed of the weights. The caller's random state is left as it was.
    dtype : torch.dtype or str
        ``torch.float32`` or ``torch.bfloat16`` (or their names).
    max_shard_size : int or str, optional
        Passed to ``save_pretrained``: "300KB" gives a sharded checkpoint. Left out: one file.

    Raises
    ------
    OptionError
        When the family or the dtype is unknown.
    """
    require_known(family, FAMILIES, "tiny family")
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16):
        raise OptionError(f"a tiny model is float32 or bfloat16, not {dtype}")
    config = _CONFIGS[family]()
    config.dtype = chosen
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=chosen)
        roughen(model)
    model.generation_config.do_sample = False
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(target, **options)
    tiny_tokenizer().save_pretrained(target)
    return target


def cached_tiny_moe() -> Path:
    """Return a tiny Mixtral that is kept in the cache, made if missing."""
    path = cache_dir() / "tiny-control"
    # Several processes may ask at once, and one of them may be killed: a folder that is there is whole.
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with whole_folder(path) as scratch:
                tiny_moe(scratch, family="mixtral", seed=0)
    return path


def roughen(model: torch.nn.Module) -> None:
    """Replace parameters and router corrections that start constant, so that tests notice a lost one."""
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if tensor.numel() < 2 or not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn_like(tensor) * 0.05)
