"""Write a checkpoint as a GGUF file for llama.cpp: OLMoE, Qwen2-MoE and Mixtral, 16-bit or 32-bit, piece by piece.

The file holds the same weights in the same dtype (norms, biases and routers in float32, as llama.cpp's own converter
has it). It holds no tokenizer: it is for measuring and for comparing logits, with token ids from outside. Mixtral uses
llama's architecture there, whose rotary embedding pairs neighbouring values, so rows of its query and key projections
are permuted; the other two pair halves, as transformers does.

A configuration that llama.cpp would compute differently is refused by name. One expert matrix is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from emoe_core.checkpoint.index import CheckpointIndex, MoeLayer
from emoe_core.checkpoint.safetensors_files import TensorRef, byte_view, tensors_by_name
from emoe_core.errors import DataError, UnsupportedFamilyError
from emoe_core.files import whole_file
from emoe_core.loader.cache_folder import cache_dir

ARCHITECTURES = {"olmoe": "olmoe", "qwen2_moe": "qwen2moe", "mixtral": "llama"}
_KINDS = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_FULL_PRECISION = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file; ``pieces`` yields its values in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def ensure_gguf(index: CheckpointIndex, progress: Progress | None = None) -> Path:
    """Return a checkpoint's GGUF file from the cache, written first when missing."""
    kind = str(index.dtype).removeprefix("torch.")
    path = cache_dir() / "gguf" / f"{index.model_type}-{kind}-{index.source_hash[:16]}.gguf"
    return path if path.exists() else export_gguf(index, path, progress)


def export_gguf(index: CheckpointIndex, dest: str | Path, progress: Progress | None = None) -> Path:
    """Write the file and return its path; it appears under its name when it is complete.

    Parameters
    ----------
    index : CheckpointIndex
        Its dtype is the file's.
    dest : str or Path
    progress : callable, optional
        Called with (bytes written, bytes in all).

    Raises
    ------
    UnsupportedFamilyError
        Another family, or settings that llama.cpp would compute differently.
    DataError
        The disk has too little space.
    """
    architecture = _require_supported(index)
    target = Path(dest)
    entries = [*_dense_entries(index), *_expert_entries(index)]
    total = sum(entry.nbytes for entry in entries)
    try:
        with whole_file(target) as scratch:
            _check_space(target, total)
            _write(scratch, index, architecture, entries, progress)
    except OSError as error:
        raise DataError(f"cannot write {target} ({error.strerror or error}); it needs {total:,} bytes") from error
    return target


def _check_space(target: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes + 10**8:
        raise DataError(
            f"the GGUF file needs {needed_bytes:,} bytes, {target.parent} has {free_bytes:,} free. Free space, or "
            f"leave llama.cpp out of --system."
        )


def _write(
    path: Path, index: CheckpointIndex, architecture: str, entries: list[_Entry], progress: Progress | None
) -> None:
    total = sum(entry.nbytes for entry in entries)
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        _write_metadata(writer, index, architecture)
        for entry in entries:
            # A 16-bit numpy type stands for either 16-bit format; the raw type names it.
            kind = np.dtype(np.float32 if entry.dtype == torch.float32 else np.float16)
            writer.add_tensor_info(entry.name, entry.shape, kind, entry.nbytes, _KINDS[entry.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        stream = writer.fout[0]
        done = 0
        for entry in entries:
            writer.write_padding(stream, stream.tell())
            for piece in entry.pieces():
                stream.write(byte_view(piece.to(entry.dtype).contiguous()))
                done += piece.numel() * entry.dtype.itemsize
                if progress is not None:
                    progress(done, total)
        writer.write_padding(stream, stream.tell())
        stream.flush()
        os.fsync(stream.fileno())


def _require_supported(index: CheckpointIndex) -> str:
    config: Any = index.config
    if index.model_type not in ARCHITECTURES:
        raise UnsupportedFamilyError(
            f"model type {index.model_type!r} has no GGUF export here (there is one for {', '.join(ARCHITECTURES)}): "
            f"leave llama.cpp out of --system"
        )
    architecture = ARCHITECTURES[index.model_type]
    differing = []
    if architecture != "llama" and getattr(config, "norm_topk_prob", False):
        differing.append("norm_topk_prob=True")
    if architecture == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        differing.append("grouped query heads")
    if getattr(config, "clip_qkv", None) is not None:
        differing.append("clip_qkv")
    if len(index.layers) != config.num_hidden_layers:
        differing.append("layers without experts")
    if architecture != "llama" and config.tie_word_embeddings:
        differing.append("tied embeddings")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        differing.append("scaled rotary embeddings")
    if differing:
        raise UnsupportedFamilyError(
            f"llama.cpp computes {index.model_type} otherwise with {', '.join(differing)}: leave it out of --system"
        )
    return architecture


def _write_metadata(writer: gguf.GGUFWriter, index: CheckpointIndex, architecture: str) -> None:
    config: Any = index.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(index.path.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(index.layers[0].num_experts)
    writer.add_expert_used_count(index.top_k)
    if architecture == "qwen2moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    kinds = {torch.bfloat16: "MOSTLY_BF16", torch.float16: "MOSTLY_F16", torch.float32: "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds[index.dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _dense_entries(index: CheckpointIndex) -> Iterator[_Entry]:
    for tensor in tensors_by_name(index.shards).values():
        if ".experts." in tensor.name:
            continue
        module, _, kind = tensor.name.rpartition(".")
        name = f"{_gguf_name(module, index)}.{kind}"
        shape = tuple(tensor.shape)
        full = len(shape) == 1 or name.endswith(_FULL_PRECISION)
        yield _Entry(
            name,
            shape,
            torch.float32 if full else index.dtype,
            partial(_dense_piece, index, tensor, module),
        )


def _gguf_name(module: str, index: CheckpointIndex) -> str:
    if module in _TOP_NAMES:
        return _TOP_NAMES[module]
    parts = module.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in _LAYER_NAMES:
        return f"blk.{parts[2]}.{_LAYER_NAMES[parts[3]]}"
    raise UnsupportedFamilyError(f"{index.path}: the GGUF export does not know the tensor of {module}")


def _dense_piece(index: CheckpointIndex, source: TensorRef, module: str) -> Iterator[torch.Tensor]:
    tensor = source.read()
    if index.model_type == "mixtral" and module.endswith(("q_proj", "k_proj")):
        config: Any = index.config
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        tensor = neighbour_pairs(tensor, heads)
    yield tensor


def neighbour_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return projection rows [heads * width, ...] with the halves of each head interleaved, as llama.cpp rotates."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _expert_entries(index: CheckpointIndex) -> Iterator[_Entry]:
    for layer in index.layers:
        shapes = {param.name: param.shape for param in layer.params}
        inner, hidden = shapes["gate_up_proj"][0] // 2, shapes["gate_up_proj"][1]
        parts = {
            "ffn_gate_exps": ("gate_up_proj", slice(0, inner), (inner, hidden)),
            "ffn_up_exps": ("gate_up_proj", slice(inner, 2 * inner), (inner, hidden)),
            "ffn_down_exps": ("down_proj", slice(0, hidden), (hidden, inner)),
        }
        for name, (param, rows, shape) in parts.items():
            yield _Entry(
                f"blk.{layer.index}.{name}.weight",
                (layer.num_experts, *shape),
                index.dtype,
                partial(_expert_pieces, index, layer, param, rows),
            )


def _expert_pieces(index: CheckpointIndex, layer: MoeLayer, param: str, rows: slice) -> Iterator[torch.Tensor]:
    for expert in range(layer.num_experts):
        yield index.expert_tensors(layer.index, expert)[param][rows]
