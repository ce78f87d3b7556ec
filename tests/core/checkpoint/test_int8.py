"""Experts in 8 bits: rounded as stated, served exactly with respect to the rounded model, and half the size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exact_passes import FAMILIES, prefill_and_decode, prompt_ids, stock
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.checkpoint.quantization import LARGEST, dequantize, product, quantize
from emoe_core.errors import OptionError
from emoe_core.experts.compute import ExpertForm
from emoe_core.experts.layer import LayerHandle
from workbench.models.reference.tiny import tiny_moe


def rounded_stock(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The stock model with every matrix of its experts rounded to 8 bits and restored."""
    model = stock(path, dtype)
    for layer in open_checkpoint(path, dtype).layers:
        for spec in layer.params:
            stacked = model.get_parameter(f"{layer.name}.{spec.name}")
            if len(spec.shape) == 2:
                for expert in range(layer.num_experts):
                    stacked.data[expert] = dequantize(*quantize(stacked.data[expert]))
    return model


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_is_within_half_a_step(rows: int, columns: int, size: float, dtype: torch.dtype) -> None:
    weight = (size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).to(dtype)
    weight[0] = 0
    rounded, scale = quantize(weight)
    assert rounded.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (rows,)
    assert int(rounded.abs().max()) <= LARGEST
    # A scale of low precision may be too small for the largest value, by half of its own last bit.
    slack = 0.5 + LARGEST * torch.finfo(dtype).eps
    error = (rounded.float() * scale.float().unsqueeze(1) - weight.float()).abs()
    assert bool((error <= slack * scale.float().unsqueeze(1)).all())
    assert torch.equal(dequantize(rounded, scale)[0], torch.zeros(columns, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_integers_agree_with_restored_ones(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize(torch.randn(48, 80, generator=generator).to(dtype))
    states = torch.randn(rows, 80, generator=generator).to(dtype)
    expected = states.double() @ (weight.double() * scale.double().unsqueeze(1)).t()
    got = product(states, weight, scale)
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rounded_model_is_served_exactly(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / family, family=family, seed=3, dtype=torch.float32)
    reference = rounded_stock(path, torch.float32)
    ids = prompt_ids(reference.config.vocab_size)
    expected = prefill_and_decode(reference, ids)
    options = {"expert_dtype": "int8", "budget": "40%", "predictor": None, "pack_dir": tmp_path, "verify": "always"}
    with emoe_core.load(path, **options) as engine:
        mine = prefill_and_decode(engine.model, ids)
        assert engine.stats().counters.loads > 0
    assert all(torch.equal(got, want) for got, want in zip(mine, expected, strict=True))
    assert not torch.equal(expected[0], prefill_and_decode(stock(path, torch.float32), ids)[0]), "rounding must show"


def test_bfloat16_products_stay_near_the_rounded_model(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="qwen2_moe", seed=3, dtype=torch.bfloat16)
    reference = rounded_stock(path, torch.bfloat16)
    ids = prompt_ids(reference.config.vocab_size)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits.float().log_softmax(-1)
    with emoe_core.load(path, expert_dtype="int8", budget="40%", predictor=None, pack_dir=tmp_path) as engine:
        handles = [module.__dict__.get("_emoe_layer") for module in engine.model.modules()]
        assert all(isinstance(handle.form, ExpertForm) for handle in handles if isinstance(handle, LayerHandle))
        with torch.no_grad():
            mine = engine.model(input_ids=ids).logits.float().log_softmax(-1)
    kl = (expected.exp() * (expected - mine)).sum(-1)
    assert float(kl.abs().max()) < 0.01


def test_packs_of_both_kinds_live_side_by_side(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=3, dtype=torch.float32)
    ids = prompt_ids(stock(path, torch.float32).config.vocab_size)
    found = {}
    for kind in ("auto", "int8", "auto"):
        with emoe_core.load(path, expert_dtype=kind, budget="50%", pack_dir=tmp_path / "packs") as engine:
            found.setdefault(kind, []).append(prefill_and_decode(engine.model, ids)[0])
            sizes = found.setdefault(f"{kind} bytes", [])
            sizes.append(engine.stats().expert_bytes)
    assert torch.equal(found["auto"][0], found["auto"][1])
    assert len(list((tmp_path / "packs").glob("*.emoe"))) == 2
    assert found["int8 bytes"][0] < 0.35 * found["auto bytes"][0]


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", seed=3)
    with pytest.raises(OptionError, match="int8"):
        emoe_core.load(path, expert_dtype="int3")
    with pytest.raises(OptionError, match="int8"):
        open_checkpoint(path).with_expert_dtype("int3")
