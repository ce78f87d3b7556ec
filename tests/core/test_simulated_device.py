"""What holds on a device that copies beside the host: stock's bits, one wait a layer, events only where needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_watch import HiddenWaits, engine_on
from exact_passes import prefill_and_decode, prompt_ids, stock
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.machine.simulated_device import SimulatedDevice
from workbench.models.reference.tiny import LAYERS, tiny_moe


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_moe(tmp_path_factory.mktemp("simulated"), family="qwen3_moe", seed=3, dtype=torch.bfloat16)
    reference = stock(path, torch.bfloat16)
    ids = prompt_ids(reference.config.vocab_size)
    return path, ids, prefill_and_decode(reference, ids)


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1 << 16),
    early=st.sampled_from([0.0, 0.0, 0.3, 0.9]),
    budget=st.sampled_from(["1 slot", "2 slots", "50%", "100%"]),
    tier=st.sampled_from(["disk", "host"]),
    threads=st.sampled_from([1, 2]),
)
def test_answers_are_stock_s_bits_whenever_copies_happen(
    case: Any, tmp_path_factory: pytest.TempPathFactory, seed: int, early: float, budget: str, tier: str, threads: int
) -> None:
    path, ids, expected = case
    options = {"budget": budget, "tier": tier, "threads": threads, "predictor": None, "verify": "always"}
    device = SimulatedDevice(seed=seed, early=early)
    with engine_on(device, path, pack_dir=path.parent, **options) as engine:
        for _ in range(2):
            assert same(prefill_and_decode(engine.model, ids), expected)
        assert engine.stats().counters.loads > 0


def test_one_wait_a_layer(case: Any) -> None:
    path, ids, _ = case
    for options in (
        {"budget": "2 slots"},
        {"budget": "2 slots", "tolerance": 1.0},
        {"budget": "50%", "tolerance": 0.4},
    ):
        device = SimulatedDevice()
        with engine_on(device, path, pack_dir=path.parent, predictor=None, **options) as engine:
            prefill_and_decode(engine.model, ids)
            with HiddenWaits(device)() as waits:
                prefill_and_decode(engine.model, ids, steps=3)
            if "tolerance" in options:
                assert engine.stats().counters.reroutes > 0
        assert waits.told == [1] * (4 * LAYERS)
        assert waits.hidden == []
