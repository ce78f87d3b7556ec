"""Copies into slots are ordered with what computes, whatever fails or is cut short; planted races are found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from device_watch import engine_on
from exact_passes import prefill_and_decode
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.errors import PackError
from emoe_core.loader.eviction import lru
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.pack import Pack, write_pack
from emoe_core.loader.slot_memory import SlotMemory
from emoe_core.loader.slots import SlotTable
from emoe_core.loader.storage import HostMemory, PackedFile
from workbench.machine.simulated_device import Race, SimulatedDevice
from workbench.models.reference.tiny import EXPERTS, LAYERS, tiny_moe


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(tiny_moe(tmp_path_factory.mktemp("copies") / "model", seed=4))


@pytest.fixture(scope="module")
def pack(index: CheckpointIndex, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return Pack.open(write_pack(index, tmp_path_factory.mktemp("pack") / "experts.emoe"), index)


class Interrupted(Exception):
    """What cuts a pass short in these tests."""


class Bench:
    """A loader on a simulated device, whose computations are comparisons with what the checkpoint holds."""

    def __init__(self, index: CheckpointIndex, pack: Pack, device: SimulatedDevice, capacity: int = 2, **options: Any):
        self.index, self.device = index, device
        self.broken: set[tuple[int, int]] = set()
        storage = self._storage(pack, options.get("tier", "disk"))
        table = SlotTable([capacity] * LAYERS, 1, lru)
        self.loader = ExpertLoader(index.layers, storage, table, device, options.get("threads", 2))

    def compute(self, layer: int, experts: list[int], stop: int | None = None, closes: bool = True) -> None:
        """Compute with experts; cut short after ``stop`` of them, in a way that closes the lease or does not."""
        lease = self.loader.lease(layer, experts)
        try:
            done = 0
            while (taken := lease.take()) is not None:
                self._use(layer, *taken)
                done += 1
                if done == stop:
                    raise Interrupted
        finally:
            if closes:
                lease.close()

    def _use(self, layer: int, expert: int, tensors: Any) -> None:
        expected = self.index.expert_tensors(layer, expert)
        for name, tensor in tensors.items():
            self.device.used(tensor)
            assert torch.equal(tensor, expected[name]), (layer, expert, name)

    def _storage(self, pack: Pack, tier: str) -> PackedFile | HostMemory:
        storage = PackedFile(pack) if tier == "disk" else HostMemory(pack, self.device, verify="always")
        account = storage._account

        def failing(layer: int, expert: int, record: memoryview) -> None:
            if (layer, expert) in self.broken:
                raise PackError("it cannot be read")
            account(layer, expert, record)

        storage._account = failing  # type: ignore[method-assign]
        return storage


SETS = st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted)
EVENTS = st.one_of(
    st.tuples(st.just("compute"), st.integers(0, LAYERS - 1), SETS),
    st.tuples(st.sampled_from(["cut short", "vanish"]), st.integers(0, LAYERS - 1), SETS),
    st.tuples(st.just("swap"), st.just(0), SETS),
    st.tuples(st.sampled_from(["break", "mend", "host"]), st.integers(0, LAYERS - 1), SETS),
)


@settings(max_examples=80)
@given(
    events=st.lists(EVENTS, max_size=10),
    seed=st.integers(0, 1 << 16),
    early=st.sampled_from([0.0, 0.3]),
    capacity=st.integers(1, 3),
    tier=st.sampled_from(["disk", "host"]),
    threads=st.sampled_from([1, 2]),
)
def test_nothing_races_whatever_fails_or_is_cut_short(
    index: CheckpointIndex, pack: Pack, events: Any, seed: int, early: float, capacity: int, tier: str, threads: int
) -> None:
    device = SimulatedDevice(seed=seed, early=early)
    bench = Bench(index, pack, device, capacity, tier=tier, threads=threads)
    for what, layer, experts in events:
        if what in ("compute", "cut short"):
            with suppress(PackError, Interrupted):
                bench.compute(layer, experts, stop=2 if what == "cut short" else None)
        elif what == "vanish":
            # As an interrupt from the keyboard does, which torch's hooks do not hear of.
            with suppress(PackError, Interrupted):
                bench.compute(layer, experts, stop=2, closes=False)
            bench.loader.recover()
        elif what == "swap":
            bench.loader.swap([experts] * LAYERS)
        elif what == "host":
            device.to_host(torch.zeros(1))
        else:
            bench.broken = {(layer, expert) for expert in experts} if what == "break" else set()
    bench.loader.close()
    assert device.races == []


def compute_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedDevice, "wait", lambda self, event: None)


def copies_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    write = SlotMemory.write
    patch.setattr(SlotMemory, "write", lambda self, entry, after: write(self, entry, None))


def staging_is_reused_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimulatedDevice, "finish", lambda self, event: None)


def uses_end_where_they_begin(patch: pytest.MonkeyPatch) -> None:
    tensors = SlotMemory.tensors

    def early(self: Any, entry: Any) -> Any:
        self._used[entry.slot] = self._device.record()
        return tensors(self, entry)

    patch.setattr(SlotMemory, "tensors", early)
    patch.setattr(SlotMemory, "released", lambda self, entry: None)


def copies_end_where_they_begin(patch: pytest.MonkeyPatch) -> None:
    copy = SimulatedDevice.copy

    def early(self: Any, parts: Any, after: Any) -> Any:
        event = self._copy
        copy(self, parts, after)
        return event

    patch.setattr(SimulatedDevice, "copy", early)


@pytest.mark.parametrize("budget", ["1 slot", "2 slots"])
@pytest.mark.parametrize(
    "plant",
    [
        compute_does_not_wait,
        copies_do_not_wait,
        staging_is_reused_at_once,
        uses_end_where_they_begin,
        copies_end_where_they_begin,
    ],
)
def test_a_planted_race_is_found_in_a_pass(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None], budget: str
) -> None:
    ids = torch.arange(5, 22)[None]
    device = SimulatedDevice()
    options = {"pack_dir": tmp_path, "budget": budget, "threads": 1, "predictor": None}
    with suppress(Race), engine_on(device, index.path, **options) as engine:
        prefill_and_decode(engine.model, ids)
        assert device.races == []
        plant(monkeypatch)
        prefill_and_decode(engine.model, ids)
    assert device.races


def failed_writes_forget_the_last_use(patch: pytest.MonkeyPatch, bench: Bench) -> None:
    last_use = SlotMemory.last_use

    def forgetting(self: Any, entry: Any) -> Any:
        event = last_use(self, entry)
        self._used.pop(entry.slot, None)
        return event

    patch.setattr(SlotMemory, "last_use", forgetting)
    bench.compute(0, [0, 1])
    bench.broken = {(0, 4)}
    bench.loader.swap([[1, 4]])
    bench.loader.settle()
    bench.broken = set()
    bench.loader.swap([[1, 5]])


def recovery_does_not_wait(patch: pytest.MonkeyPatch, bench: Bench) -> None:
    patch.setattr(SlotMemory, "synchronize", lambda self: None)
    with suppress(Interrupted):
        bench.compute(0, [0, 1], stop=2, closes=False)
    bench.loader.recover()
    bench.loader.swap([[0, 4]])


def memory_is_unpinned_at_once(patch: pytest.MonkeyPatch, bench: Bench) -> None:
    patch.setattr(SimulatedDevice, "synchronize", lambda self: None)
    bench.loader.swap([[4, 5]])


@pytest.mark.parametrize(
    "plant", [failed_writes_forget_the_last_use, recovery_does_not_wait, memory_is_unpinned_at_once]
)
def test_a_planted_race_is_found_after_a_failure(
    index: CheckpointIndex, pack: Pack, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    device = SimulatedDevice()
    bench = Bench(index, pack, device)
    plant(monkeypatch, bench)
    bench.loader.settle()
    with suppress(Race):
        bench.loader.close()
    assert device.races
