"""GGUF files: the same weights under llama.cpp's names, refused where llama.cpp would compute something else."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import DataError, UnsupportedFamilyError
from workbench.models.reference.tiny import tiny_moe
from workbench.models.synthetic.shapes import SHAPES, overridden
from workbench.models.synthetic.writer import write_synthetic
from workbench.systems import gguf_export
from workbench.systems.gguf_export import export_gguf, neighbour_pairs
from workbench.systems.llama_cpp import is_installed

FAMILIES = {"bench": "olmoe", "qwen1.5-moe-a2.7b": "qwen2moe", "mixtral-8x7b": "llama"}
SIZES = {"layers": 2, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "vocab": 320}


def checkpoint(folder: Path, shape: str, dtype: str = "float32") -> Path:
    return write_synthetic(folder / "model", overridden(SHAPES[shape], **SIZES), shape, dtype=dtype)


@pytest.mark.parametrize("shape", FAMILIES)
def test_every_weight_is_in_the_file_under_llama_cpps_name(shape: str, tmp_path: Path) -> None:
    index = open_checkpoint(checkpoint(tmp_path, shape))
    reader = gguf.GGUFReader(export_gguf(index, tmp_path / "out.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == FAMILIES[shape]
    assert reader.fields[f"{FAMILIES[shape]}.expert_count"].contents() == 8
    model = AutoModelForCausalLM.from_pretrained(index.path, dtype="float32")
    values = sum(weight.numel() for weight in model.parameters())
    assert sum(tensor.n_elements for tensor in reader.tensors) == values
    stacked = tensors["blk.1.ffn_down_exps.weight"].data
    for expert in (0, 7):
        assert np.array_equal(stacked[expert], index.expert_tensors(1, expert)["down_proj"].numpy())
        gate, up = index.expert_tensors(0, expert)["gate_up_proj"].chunk(2)
        assert np.array_equal(tensors["blk.0.ffn_gate_exps.weight"].data[expert], gate.numpy())
        assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"].data[expert], up.numpy())
    assert np.array_equal(tensors["output.weight"].data, model.lm_head.weight.detach().numpy())


def test_bfloat16_weights_stay_bit_for_bit_and_routers_are_float32(tmp_path: Path) -> None:
    index = open_checkpoint(checkpoint(tmp_path, "bench", "bfloat16"))
    reader = gguf.GGUFReader(export_gguf(index, tmp_path / "out.gguf"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.0.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.BF16
    expected = index.expert_tensors(0, 3)["down_proj"].view(torch.uint8).numpy()
    assert np.array_equal(down.data[3].reshape(-1).view(np.uint8), expected.reshape(-1))
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_heads_are_interleaved_for_rotation_of_neighbours() -> None:
    rows = torch.arange(8.0)[:, None]
    assert neighbour_pairs(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen3_moe", "has no GGUF export"), ("olmoe", "otherwise with grouped query heads")],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=f"{message}.*leave"):
        export_gguf(open_checkpoint(tiny_moe(tmp_path / "model", family)), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_checkpoint(checkpoint(tmp_path, "bench"))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export.shutil, "disk_usage", lambda _: usage(10, 9, 1))
        with pytest.raises(DataError, match="needs"):
            export_gguf(index, tmp_path / "gguf" / "out.gguf")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "byte_view", full)
    with pytest.raises(DataError, match="No space left"):
        export_gguf(index, tmp_path / "gguf" / "out.gguf")
    assert list((tmp_path / "gguf").iterdir()) == []


@pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed (extra 'llama')")
@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_computes_stock_logits(shape: str, dtype: str, tmp_path: Path) -> None:
    from workbench.systems.llama_cpp import LlamaDecoder

    path = checkpoint(tmp_path, shape, dtype)
    file = export_gguf(open_checkpoint(path), tmp_path / "out.gguf")
    decoder = LlamaDecoder({"gguf": str(file), "options": {}, "threads": 1, "max_tokens": 32})
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", experts_implementation="eager").eval()
    prompt, more = [5, 17, 200, 3, 90], [11, 250, 7]
    for _ in range(2):  # a second sequence must not see the first
        decoder.prefill(prompt)
        for place in range(len(more) + 1):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([prompt + more[:place]])).logits[0, -1].numpy()
            error = np.abs(decoder.logits() - expected).max() / np.abs(expected).max()
            assert error < (1e-3 if dtype == "float32" else 3e-2), (place, error)
            if place < len(more):
                decoder.decode(more[place])
    decoder.close()
