"""Promises of the loader over a real pack: the right bytes in every slot, whatever happened before."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.budget import plan_slots
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.device import Device
from emoe_core.errors import PackError
from emoe_core.loader.eviction import POLICY_NAMES, lru, make_table
from emoe_core.loader.loader import ExpertLoader
from emoe_core.loader.pack import Pack, write_pack
from emoe_core.loader.slots import Policy, SlotTable
from emoe_core.loader.storage import PackedFile
from workbench.models.reference.tiny import EXPERTS, LAYERS, tiny_moe
from workbench.systems.eviction_rules import RULES

POLICIES = [*POLICY_NAMES, *RULES.values()]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("loader")
    index = open_checkpoint(tiny_moe(folder / "model", seed=4))
    return Pack.open(write_pack(index, folder / "experts.emoe"), index)


class Flaky(PackedFile):
    """A real packed file whose reads of chosen experts fail, after half of the bytes were written."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack, verify="always")
        self.broken: set[tuple[int, int]] = set()
        self.before_read: Callable[[], object] = lambda: None

    def read_into(self, layer: int, expert: int, out: torch.Tensor) -> None:
        self.before_read()
        if (layer, expert) in self.broken:
            out[: len(out) // 2] = 255
            raise PackError(f"expert {expert} of layer {layer} cannot be read. Write the pack again.")
        super().read_into(layer, expert, out)


def make(
    pack: Pack, capacity: int = 3, staging: int = 1, policy: str | Policy = "lru", threads: int = 2
) -> ExpertLoader:
    table = make_table([capacity] * LAYERS, staging, policy, EXPERTS)
    layers = [packed.spec for packed in pack.layers]
    return ExpertLoader(layers, Flaky(pack), table, Device(), threads)


def is_intact(pack: Pack, loader: ExpertLoader, layer: int, expert: int) -> bool:
    entry = loader.table.get(layer, expert)
    assert entry is not None
    checksum = xxhash.xxh3_64_intdigest(memoryview(loader.memory.record(entry).numpy()))
    return checksum == pack.layers[layer].checksums[expert]


def check_all(pack: Pack, loader: ExpertLoader) -> None:
    """Check the table, every resident's bytes, that nothing is pinned or lent, and the identities."""
    loader.settle()
    loader.table.check()
    for entry in loader.table.entries():
        assert entry.ready and entry.pins == 0
        assert is_intact(pack, loader, entry.layer, entry.expert)
    assert all(len(loader.table.resident(layer)) <= size for layer, size in enumerate(loader.table.capacity))
    counters = loader.counters
    counters.check()
    record_bytes = loader.layers[0].record_bytes
    assert counters.bytes_loaded == (counters.loads + counters.prefetches) * record_bytes


def borrow(pack: Pack, loader: ExpertLoader, layer: int, experts: list[int]) -> None:
    """Go through a lease as a forward pass does, comparing every expert's bytes while it is held."""
    loader.table.begin(layer, [int(expert in experts) for expert in range(EXPERTS)])
    with loader.lease(layer, experts) as lease:
        for expert in experts:
            tensors = lease[expert]
            assert tensors is lease[expert]
            entry = loader.table.get(layer, expert)
            assert entry is not None and entry.pins > 0, "an expert in use must be pinned"
            assert is_intact(pack, loader, layer, expert)


def take(pack: Pack, loader: ExpertLoader, layer: int, experts: list[int]) -> None:
    """Go through a lease as experts arrive, comparing every expert's bytes while it is held."""
    loader.table.begin(layer, [int(expert in experts) for expert in range(EXPERTS)])
    seen: list[int] = []
    with loader.lease(layer, experts) as lease:
        # Every third time the lowest one that is left.
        while (taken := lease.take(lowest=len(seen) % 3 == 1)) is not None:
            expert, tensors = taken
            assert len(seen) % 3 != 1 or expert == min(set(experts) - set(seen))
            seen.append(expert)
            entry = loader.table.get(layer, expert)
            assert entry is not None and entry.pins > 0, "an expert in use must be pinned"
            assert tensors is loader.tensors(entry)
            assert is_intact(pack, loader, layer, expert)
    assert sorted(seen) == experts


EVENTS = st.one_of(
    st.tuples(
        st.sampled_from(["borrow", "take"]),
        st.integers(0, LAYERS - 1),
        st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(sorted),
    ),
    st.tuples(st.just("swap"), st.just(0), st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=4)),
    st.tuples(st.just("break"), st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)),
    st.tuples(st.just("mend"), st.just(0), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
)


@settings(max_examples=60)
@given(
    st.lists(EVENTS, max_size=12),
    st.integers(1, 4),
    st.sampled_from(POLICIES),
)
def test_bytes_are_right_after_any_leases_swaps_and_failures(
    pack: Pack, events, capacity: int, policy: str | Policy
) -> None:
    loader = make(pack, capacity, policy=policy)
    broken: set[tuple[int, int]] = loader.storage.broken
    try:
        for what, layer, which in events:
            if what in ("borrow", "take"):
                failing = {(layer, expert) for expert in which} & broken
                try:
                    (borrow if what == "borrow" else take)(pack, loader, layer, which)
                except PackError:
                    assert failing
            elif what == "swap":
                loader.swap([which] * LAYERS)
            elif what == "break":
                broken.add((layer, which))
            elif what == "mend":
                broken.clear()
            else:
                loader.settle()
                loader.reset_counters()
            loader.table.check()
        check_all(pack, loader)
        broken.clear()
        for layer in range(LAYERS):
            borrow(pack, loader, layer, list(range(EXPERTS)))
        check_all(pack, loader)
    finally:
        loader.close()
    loader.counters.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_slot_streams_all_experts_in_order(pack: Pack, policy: str | Policy) -> None:
    loader = make(pack, capacity=1, policy=policy)
    for _ in range(2):
        borrow(pack, loader, 1, list(range(EXPERTS)))
    check_all(pack, loader)
    assert loader.counters.loads in range(2 * EXPERTS - 1, 2 * EXPERTS + 1)
    loader.close()


def test_a_resident_needed_last_is_not_evicted_by_what_comes_before(pack: Pack) -> None:
    loader = make(pack, capacity=1)
    borrow(pack, loader, 0, [7])
    borrow(pack, loader, 0, list(range(EXPERTS)))
    assert loader.counters.loads == 1 + EXPERTS - 1
    loader.close()


def test_a_failed_read_is_reported_and_leaves_the_loader_usable(pack: Pack) -> None:
    loader = make(pack, capacity=2)
    loader.storage.broken.add((0, 3))
    with pytest.raises(PackError, match="expert 3 of layer 0"):
        borrow(pack, loader, 0, [1, 2, 3, 4, 5])
    check_all(pack, loader)
    assert 3 not in loader.table.resident(0)
    borrow(pack, loader, 0, [1, 2, 4])
    loader.storage.broken.clear()
    borrow(pack, loader, 0, [3])
    check_all(pack, loader)
    loader.close()


def test_a_failed_prefetch_is_dropped_and_counted_as_waste(pack: Pack) -> None:
    loader = make(pack, capacity=2)
    loader.storage.broken.add((1, 5))
    assert loader.swap([[], [5, 6], []]) == 2
    loader.settle()
    assert loader.table.resident(1) == {6}
    assert loader.counters.wasted_bytes == loader.layers[1].record_bytes
    loader.storage.broken.clear()
    borrow(pack, loader, 1, [5, 6])
    check_all(pack, loader)
    loader.close()


def test_a_swap_brings_in_what_is_missing_only_and_keeps_to_the_capacity(pack: Pack) -> None:
    loader = make(pack, capacity=3)
    borrow(pack, loader, 0, [0, 1, 2])
    assert loader.swap([[2, 3, 4], [7], []]) == 3
    check_all(pack, loader)
    assert loader.table.resident(0) == {2, 3, 4}
    assert loader.table.resident(1) == {7}
    assert loader.swap([[4, 3, 2], [7], []]) == 0
    assert (loader.counters.prefetches, loader.counters.swaps, loader.counters.loads) == (3, 2, 3)
    loader.close()


def test_an_abandoned_lease_releases_everything(pack: Pack) -> None:
    loader = make(pack, capacity=2)
    with pytest.raises(ZeroDivisionError), loader.lease(0, [0, 1, 2, 3]) as lease:
        lease[0]
        raise ZeroDivisionError
    check_all(pack, loader)
    borrow(pack, loader, 0, list(range(EXPERTS)))
    borrow(pack, loader, 1, list(range(EXPERTS)))
    check_all(pack, loader)
    loader.close()


def test_recover_mends_a_table_that_an_interrupt_left_behind(pack: Pack) -> None:
    loader = make(pack, capacity=1)
    lease = loader.lease(0, [0, 1, 2])
    lease[0]
    del lease  # Never closed: two entries stay pinned, one of them in the staging slot.
    loader.recover()
    check_all(pack, loader)
    borrow(pack, loader, 1, list(range(EXPERTS)))
    check_all(pack, loader)
    loader.close()


def test_an_expert_outside_the_lease_gets_a_held_one(pack: Pack) -> None:
    loader = make(pack, capacity=2)
    with loader.lease(0, [2, 4]) as lease:
        first = lease[0]
        assert first is lease[2]
        assert lease[3] is lease[2]
        assert lease[4] is not first
        assert lease[6] is lease[4]
    check_all(pack, loader)
    assert loader.counters.loads == 2
    loader.close()


def test_waste_counts_what_left_without_having_served(pack: Pack) -> None:
    loader = make(pack, capacity=1)
    size = loader.layers[0].record_bytes
    loader.swap([[1], [2], [3]])
    loader.settle()
    assert loader.counters.wasted_bytes == 0
    borrow(pack, loader, 0, [5])
    assert loader.counters.wasted_bytes == size
    borrow(pack, loader, 1, [2])
    loader.close()
    assert loader.counters.wasted_bytes == 2 * size, "expert 1 was evicted unused, expert 3 never asked for"


def test_a_reset_does_not_blame_later_evictions_on_earlier_loads(pack: Pack) -> None:
    loader = make(pack, capacity=2)
    loader.swap([[0, 1], [0, 1], [0, 1]])
    loader.settle()
    loader.reset_counters()
    borrow(pack, loader, 0, [4, 5])
    assert loader.counters.wasted_bytes == 0
    loader.close()
    loader.counters.check()


def test_resident_experts_cause_no_stall_and_no_reads(pack: Pack) -> None:
    loader = make(pack, capacity=3)
    borrow(pack, loader, 0, [0, 1, 2])
    loader.reset_counters()
    read = loader.storage.bytes_read
    borrow(pack, loader, 0, [0, 1, 2])
    assert loader.counters.stall_s == 0.0
    assert loader.counters.loads == 0
    assert loader.storage.bytes_read == read
    loader.close()


def test_closing_frees_the_slots_and_is_idempotent(pack: Pack) -> None:
    loader = make(pack)
    loader.swap([list(range(3))] * LAYERS)
    slot_bytes = loader.slot_bytes
    loader.close()
    loader.close()
    assert loader.slot_bytes == slot_bytes == loader.table.slots * loader.memory.stride_bytes
    assert loader.memory._memory.numel() == 0
    with pytest.raises(ValueError, match="closed"):
        loader.storage.read_into(0, 0, torch.empty(loader.memory.stride_bytes, dtype=torch.uint8))


def test_many_threads_give_the_same_bytes(pack: Pack) -> None:
    loader = make(pack, capacity=2, threads=8)
    chance = random.Random(0)
    for _ in range(60):
        borrow(pack, loader, chance.randrange(LAYERS), sorted(chance.sample(range(EXPERTS), chance.randint(1, 8))))
    check_all(pack, loader)
    loader.close()


def test_slots_of_the_largest_record_stay_within_the_budget(tmp_path: Path) -> None:

    index = open_checkpoint(tiny_moe(tmp_path / "model"))
    size = index.layers[0].record_bytes
    uneven = replace(
        index, layers=tuple(replace(layer, record_bytes=size * (1 + layer.index)) for layer in index.layers)
    )
    for budget in ("1 slot", "40%", 20 * size, 45 * size, "100%"):
        plan = plan_slots(uneven, budget)
        table = SlotTable(plan.slots_per_layer, plan.staging_slots, lru)
        stride = max(layer.record_bytes for layer in uneven.layers)
        assert table.slots * stride == plan.slot_bytes <= plan.budget_bytes


def test_reads_on_their_way_are_not_gone_through_for_every_expert(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading everything asks a few things per read, however many others have not arrived."""
    asked = 0

    class Counted(dict):
        def items(self) -> Any:
            nonlocal asked
            asked += len(self)
            return super().items()

    loader, arrive = make(pack, EXPERTS), threading.Event()
    loader.storage.before_read = arrive.wait
    monkeypatch.setattr(loader, "_loading", Counted())
    try:
        loads = loader.swap([range(EXPERTS)] * LAYERS)
    finally:
        arrive.set()
    assert loads == EXPERTS * LAYERS and asked <= loads
    check_all(pack, loader)
    # The same where everybody has to make room for another.
    asked = 0
    arrive.clear()
    small = make(pack, EXPERTS // 2)
    monkeypatch.setattr(small, "_loading", Counted())
    small.swap([range(EXPERTS // 2)] * LAYERS)
    loads += small.swap([range(EXPERTS // 2, EXPERTS)] * LAYERS)
    assert asked <= loads
    arrive.set()
    check_all(pack, small)
    loader.close()
    small.close()
