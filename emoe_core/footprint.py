"""Every term of a served model's memory, computed before anything is loaded.

Terms: *dense* weights (all but routed experts), *slots* (the expert budget's plan), the *KV* cache at a sequence
length and batch size, *workspace* (activations of the largest step, an upper estimate of what is alive at once),
*logits*, and on CUDA *libraries* (its context, kernels and workspaces: what is taken there now beside tensors). Dense,
slots and KV follow from shapes and are exact; workspace is an estimate. Claims about memory are measured on the running
process, never taken from here.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from emoe_core.checkpoint.backbone import meta_model
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.device import Device
from emoe_core.errors import OptionError

if TYPE_CHECKING:
    from emoe_core.budget import SlotPlan

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of each term, for ``batch`` sequences of at most ``max_tokens`` tokens (prompt and answer together)."""

    max_tokens: int
    batch: int
    dense_bytes: int
    slot_bytes: int
    kv_bytes: int
    workspace_bytes: int
    logits_bytes: int
    library_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        tensors = self.dense_bytes + self.slot_bytes + self.kv_bytes + self.workspace_bytes + self.logits_bytes
        return tensors + self.library_bytes

    def rows(self) -> list[tuple[str, str]]:
        """Return (term, value) rows for people."""
        terms = [
            ("dense weights", self.dense_bytes),
            ("expert slots", self.slot_bytes),
            (f"KV cache ({self.batch} x {self.max_tokens} tokens)", self.kv_bytes),
            ("workspace (estimate)", self.workspace_bytes),
            ("logits", self.logits_bytes),
            *([("libraries (now)", self.library_bytes)] if self.library_bytes else []),
            ("total", self.total_bytes),
        ]
        return [(term, f"{count / 10**6:,.1f} MB") for term, count in terms]

    def to_dict(self) -> dict[str, int]:
        """Return each term in bytes, by name."""
        names = ("dense_bytes", "slot_bytes", "kv_bytes", "workspace_bytes", "logits_bytes", "library_bytes")
        return {name: getattr(self, name) for name in (*names, "total_bytes")}

    def __str__(self) -> str:
        return "\n".join(f"{term}: {value}" for term, value in self.rows())


def memory_breakdown(
    index: CheckpointIndex,
    plan: SlotPlan,
    max_tokens: int,
    batch: int = 1,
    logit_tokens: int = 1,
    device: Device | None = None,
) -> MemoryBreakdown:
    """Compute the terms for a checkpoint under a plan.

    Parameters
    ----------
    index : CheckpointIndex
    plan : SlotPlan
    max_tokens : int
        Longest sequence, prompt and answer together; the prompt may be all of it.
    batch : int
        Sequences at once.
    logit_tokens : int
        Positions a sequence whose logits are kept: 1 when generating, the sequence's length when scoring.
    device : Device or None
        The CPU if None.

    Raises
    ------
    OptionError
        When a size is below one.
    """
    for name, value in (("max_tokens", max_tokens), ("batch", batch), ("logit_tokens", logit_tokens)):
        if value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    # A model on the meta device knows which attention it will run; that costs milliseconds and no memory.
    config: Any = meta_model(deepcopy(index.config), index.dtype).config.get_text_config()
    item_bytes = index.dtype.itemsize
    device = device or Device()
    kv_layers = _kv_bytes_per_layer(config, max_tokens, batch, item_bytes)
    return MemoryBreakdown(
        max_tokens=max_tokens,
        batch=batch,
        dense_bytes=index.dense_bytes_total,
        slot_bytes=plan.slot_bytes,
        kv_bytes=sum(kv_layers),
        workspace_bytes=_workspace_bytes(index, config, max_tokens, batch, device) + max(kv_layers, default=0),
        # The model's logits, and the float32 copy that sampling and scoring make.
        logits_bytes=batch * logit_tokens * config.vocab_size * (item_bytes + FLOAT32_BYTES),
        library_bytes=device.library_bytes(),
    )


def _attention_sizes(config: Any) -> tuple[int, int, int]:
    """Return (KV heads, key width, value width) as attention computes with them."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width, width


def _cached_width(config: Any) -> int:
    """Return the values that a layer caches for one token, keys and values together."""
    if getattr(config, "kv_lora_rank", None):
        # Latent attention caches the compressed vector and the rotated key, shared by all heads.
        return config.kv_lora_rank + config.qk_rope_head_dim
    kv_heads, key_width, value_width = _attention_sizes(config)
    return kv_heads * (key_width + value_width)


def _kv_bytes_per_layer(config: Any, max_tokens: int, batch: int, item_bytes: int) -> list[int]:
    """Return the cache of each layer; kinds other than sliding windows count as full attention, an upper bound."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # A sliding layer keeps one token less than its window: the current one comes with the step.
    window = (getattr(config, "sliding_window", None) or max_tokens + 1) - 1
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        kinds = ["sliding_attention"] * config.num_hidden_layers
    lengths = [min(max_tokens, window) if kind == "sliding_attention" else max_tokens for kind in kinds]
    return [batch * length * _cached_width(config) * item_bytes for length in lengths]


def _workspace_bytes(index: CheckpointIndex, config: Any, max_tokens: int, batch: int, device: Device) -> int:
    """Return what the largest of these takes: attention or experts over all tokens, beside the residual; the head."""
    tokens = batch * max_tokens
    hidden, heads = config.hidden_size, config.num_attention_heads
    item_bytes = index.dtype.itemsize
    kv_heads, key_width, value_width = _attention_sizes(config)
    # Query, key and value before and after rotation, and the output.
    attention = tokens * item_bytes * (2 * heads * key_width + 2 * kv_heads * (key_width + value_width) + 2 * hidden)
    if config._attn_implementation == "eager":
        # Scores and their float32 softmax are materialised.
        attention += tokens * heads * max_tokens * (2 * item_bytes + FLOAT32_BYTES)
    # The mask, and in the worst case every token on one expert: its input, projections, activation and output.
    attention += batch * max_tokens * max_tokens * torch.bool.itemsize
    widest = max(param.nbytes // param.dtype.itemsize for layer in index.layers for param in layer.params)
    experts = tokens * item_bytes * (2 * max(widest // hidden, 1) + 3 * hidden)
    most_experts = max(layer.num_experts for layer in index.layers)
    router = 3 * tokens * most_experts * FLOAT32_BYTES
    residual = 3 * tokens * hidden * item_bytes + tokens * hidden * FLOAT32_BYTES
    # One token against a 16-bit output head: the CPU's math library copies the whole head into its own order.
    head = config.vocab_size * hidden * item_bytes if item_bytes == 2 and device.kind == "cpu" else 0
    return max(residual + max(attention, experts + router), head)
