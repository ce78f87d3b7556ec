"""What holds on a device that copies beside the host: stock's bits, one wait a layer, events only where needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from device_watch import HiddenWaits, engine_on
from exact_passes import FAMILIES, moved, prefill_and_decode, prompt_ids, stock
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.errors import BudgetError
from emoe_core.experts.compute import ExpertForm
from workbench.machine.simulated_device import SimulatedDevice
from workbench.models.reference.tiny import LAYERS, tiny_moe


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_moe(tmp_path_factory.mktemp(request.param), family=request.param, seed=3, dtype=torch.bfloat16)
    reference = moved(stock(path, torch.bfloat16))
    ids = prompt_ids(reference.config.vocab_size)
    return path, ids, prefill_and_decode(reference, ids)


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1 << 16),
    early=st.sampled_from([0.0, 0.3, 0.9]),
    budget=st.sampled_from(["1 slot", "2 slots", "50%", "100%"]),
    tier=st.sampled_from(["disk", "host"]),
    threads=st.sampled_from([1, 2]),
)
def test_answers_are_stock_s_bits_whenever_copies_happen(
    case: Any, seed: int, early: float, budget: str, tier: str, threads: int
) -> None:
    path, ids, expected = case
    options = {"budget": budget, "tier": tier, "threads": threads, "predictor": None, "verify": "always"}
    device = SimulatedDevice(seed=seed, early=early)
    with engine_on(device, path, pack_dir=path.parent, **options) as engine:
        for _ in range(2):
            assert same(prefill_and_decode(engine.model, ids), expected)
        assert engine.stats().counters.loads > 0
        assert engine.stats().compute.startswith("grouped by expert, each bit-equal")
    assert device.races == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_on_a_device_whose_copies_are_as_late_as_can_be(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=3, dtype=dtype)
    reference = moved(stock(path, dtype))
    ids = prompt_ids(reference.config.vocab_size)
    expected = prefill_and_decode(reference, ids)
    for tier in ("disk", "host"):
        device = SimulatedDevice()
        with engine_on(device, path, pack_dir=tmp_path, budget="30%", tier=tier, predictor=None) as engine:
            assert same(prefill_and_decode(engine.model, ids), expected)
        assert device.races == []


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "2 slots"},
        {"budget": "100%"},
        {"budget": "50%", "record": True},
        {"budget": "2 slots", "tolerance": 1.0},
        {"budget": "50%", "tolerance": 0.4, "tier": "host"},
    ],
    ids=str,
)
def test_a_layer_waits_for_the_device_once_in_prefill_and_decode(case: Any, options: dict[str, Any]) -> None:
    path, ids, _ = case
    device = SimulatedDevice()
    with engine_on(device, path, pack_dir=path.parent, predictor=None, **options) as engine:
        prefill_and_decode(engine.model, ids)
        with HiddenWaits(device)() as waits:
            prefill_and_decode(engine.model, ids.flip(1), steps=3)
        assert ("tolerance" in options) == (engine.stats().counters.reroutes > 0)
    assert waits.told == [1] * (4 * LAYERS)
    assert waits.hidden == []


def test_a_layer_of_a_padded_batch_waits_for_the_device_once(case: Any) -> None:
    path, ids, _ = case
    batch, device = torch.cat([ids, ids.flip(1)]), SimulatedDevice()
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    options = {"pack_dir": path.parent, "budget": "2 slots", "tolerance": 1.0}
    with engine_on(device, path, **options) as engine, HiddenWaits(device)() as waits, torch.no_grad():
        engine.model(input_ids=batch, attention_mask=mask)
    assert (waits.told, waits.hidden) == ([1] * LAYERS, [])


def test_a_wait_that_the_device_is_not_told_of_is_noticed(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids, _ = case
    layer, device = ExpertForm.layer, SimulatedDevice()
    monkeypatch.setattr(ExpertForm, "layer", lambda self, *args: layer(self, *args[:4]))
    with engine_on(device, path, pack_dir=path.parent, budget="2 slots") as engine, HiddenWaits(device)() as waits:
        prefill_and_decode(engine.model, ids, steps=1)
    assert waits.hidden.count("cpu") == 2 * LAYERS


def test_events_are_recorded_only_where_a_used_slot_is_given_away(case: Any) -> None:
    path, ids, _ = case
    device = SimulatedDevice()
    with engine_on(device, path, pack_dir=path.parent, budget="100%", predictor=None) as engine:
        engine.load_all()
        prefill_and_decode(engine.model, ids)
        before = device.events
        prefill_and_decode(engine.model, ids)
        assert device.events == before
    device = SimulatedDevice()
    with engine_on(device, path, pack_dir=path.parent, budget="3 slots", predictor=None) as engine:
        prefill_and_decode(engine.model, ids, steps=1)
        events, loads = device.events, engine.stats().counters.loads
        prefill_and_decode(engine.model, ids[:, :1], steps=5)
        # One a lease at most: each of these has slots for all that a token chooses.
        assert 0 < device.events - events <= 6 * LAYERS
        assert engine.stats().counters.loads > loads


@pytest.mark.parametrize(("tier", "threads"), [("disk", 1), ("disk", 2), ("host", 2)])
def test_pinned_memory_is_two_records_a_thread_or_the_host_tier_itself(case: Any, tier: str, threads: int) -> None:
    path, ids, _ = case
    device = SimulatedDevice()
    options = {"budget": "1 slot", "tier": tier, "threads": threads, "predictor": None}
    with engine_on(device, path, pack_dir=path.parent, **options) as engine:
        prefill_and_decode(engine.model, ids, steps=1)
        stride = engine.loader.memory.stride_bytes
        expected = {"disk": 2 * threads * stride, "host": engine.index.expert_bytes_total}[tier]
        assert device.pinned_bytes == expected
    assert device.pinned_bytes == 0


def test_parameters_start_where_allocations_do_on_a_device_and_as_in_the_file_on_the_cpu(case: Any) -> None:
    path, _, _ = case
    device = SimulatedDevice()
    with engine_on(device, path, pack_dir=path.parent, budget="2 slots") as engine:
        engine.loader.swap([[0, 1]] * LAYERS)
        engine.loader.settle()
        for entry in engine.loader.table.entries():
            expected = engine.index.expert_tensors(entry.layer, entry.expert)
            for name, tensor in engine.loader.tensors(entry).items():
                assert tensor.data_ptr() % 256 == 0
                assert torch.equal(tensor, expected[name])
        assert all(layer.aligned(None) is layer for layer in engine.index.layers)


def test_running_out_of_device_memory_says_what_is_free(case: Any) -> None:
    path, _, _ = case
    told = r"expert memory of .* where 10,000 are free: load with a smaller budget"
    small = engine_on(SimulatedDevice(memory_bytes=10_000), path, pack_dir=path.parent, budget="50%")
    with pytest.raises(BudgetError, match=told), small:
        pass
