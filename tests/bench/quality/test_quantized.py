"""Quantised experts lose what their format loses, and nothing else in the model changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import OptionError
from workbench.models.reference.tiny import tiny_moe
from workbench.quality.quantized import quantized_model, round_trip


@pytest.mark.parametrize(("name", "worst"), [("q8_0", 0.5 / 127), ("q4_0", 1.0 / 8)])
def test_an_error_is_at_most_its_formats_step(name: str, worst: float) -> None:
    matrix = torch.randn(16, 80, generator=torch.Generator().manual_seed(0))
    rounded = round_trip(matrix, name)
    assert rounded.shape == matrix.shape and rounded.dtype == matrix.dtype
    blocks = torch.nn.functional.pad(matrix, (0, 16)).view(16, 3, 32).abs().amax(-1, keepdim=True)
    # A step, and the rounding of the scale itself to 16 bits.
    limit = (blocks * (worst + 2**-11)).expand(16, 3, 32).reshape(16, 96)[:, :80]
    assert bool(((rounded - matrix).abs() <= limit + 1e-6).all())
    assert not torch.equal(rounded, matrix)


def test_only_expert_matrices_change(tmp_path: Path) -> None:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rounded = quantized_model(checkpoint, "q4_0")
    experts = {layer.name for layer in open_checkpoint(checkpoint).layers}
    for name, weight in stock.state_dict().items():
        is_expert = name.rsplit(".", 1)[0] in experts
        assert torch.equal(weight, rounded.state_dict()[name]) != is_expert, name


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(OptionError, match="q8_0"):
        round_trip(torch.zeros(2, 32), "q3_k")
