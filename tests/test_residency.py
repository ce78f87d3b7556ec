"""Slots and loader: what is promised of resident bytes, whatever the order of events."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.checkpoint import open_checkpoint
from emoe_core.errors import PackError
from emoe_core.loader import ExpertLoader
from emoe_core.pack import Pack, ensure_pack
from emoe_core.shards import byte_view
from emoe_core.slots import POLICIES, SlotTable
from emoe_core.storage import PackedFile
from workbench.reference_model.tiny import tiny_moe

LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("residency")
    path = tiny_moe(folder / "model", family="mixtral", seed=1, dtype=torch.float32)
    return ensure_pack(open_checkpoint(path), folder / "packs")


def make_loader(pack: Pack, capacity: int, policy: str) -> ExpertLoader:
    table = SlotTable([capacity] * LAYERS, 1, policy)
    layers = [layer.spec for layer in pack.layers]
    return ExpertLoader(layers, PackedFile(pack, verify="never"), table, torch.device("cpu"))


@pytest.fixture()
def loader(pack: Pack) -> Iterator[ExpertLoader]:
    made = make_loader(pack, 2, "lru")
    yield made
    made.close()


def assert_every_resident_has_its_checksum(loader: ExpertLoader, pack: Pack) -> None:
    loader.settle()
    loader.table.check()
    for entry in loader.table.entries():
        found = xxhash.xxh3_64_intdigest(byte_view(loader.record(entry)))
        assert found == pack.layers[entry.layer].checksums[entry.expert]


events = st.one_of(
    st.tuples(st.just("lease"), st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1)),
    st.tuples(st.just("swap"), st.just(0), st.sets(st.integers(0, EXPERTS - 1))),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(events, min_size=1, max_size=12), st.integers(1, 4), st.sampled_from(sorted(POLICIES)))
def test_slots_always_hold_the_bytes_of_their_expert(pack: Pack, history: list, capacity: int, policy: str) -> None:
    loader = make_loader(pack, capacity, policy)
    try:
        for kind, layer, experts in history:
            loader.table.forward += 1
            if kind == "swap":
                loader.swap([sorted(experts)] * LAYERS)
                continue
            order = sorted(experts)
            with loader.lease(layer, order) as lease:
                for expert in order:
                    lease[expert]
                    entry = loader.table.get(layer, expert)
                    assert entry is not None and entry.pins > 0, "an expert in use must be pinned"
                    found = xxhash.xxh3_64_intdigest(byte_view(loader.record(entry)))
                    assert found == pack.layers[layer].checksums[expert]
            assert all(len(loader.table.resident(place)) <= capacity for place in range(LAYERS))
        assert_every_resident_has_its_checksum(loader, pack)
        assert not any(entry.pins for entry in loader.table.entries())
    finally:
        loader.close()


def test_table_refuses_to_evict_pinned_and_loading_experts() -> None:
    table = SlotTable([1], 0)
    admitted = table.admit(0, 3)
    assert admitted is not None
    entry = admitted[0]
    with pytest.raises(AssertionError, match="still arriving"):
        table.evict(entry)
    entry.ready = True
    with pytest.raises(AssertionError, match="pinned"):
        table.evict(entry)
    assert table.admit(0, 4) is None, "a full layer of pinned experts has no room"
    entry.pins = 0
    assert table.admit(0, 4) is not None


def test_failed_read_is_reported_and_the_loader_goes_on(loader: ExpertLoader, pack: Pack) -> None:
    real, broken = loader.storage.read_into, {5}

    def read(layer: int, expert: int, out: torch.Tensor) -> None:
        if expert in broken:
            raise PackError("the disk failed")
        real(layer, expert, out)

    loader.storage.read_into = read  # type: ignore[method-assign]
    with pytest.raises(PackError, match="the disk failed"), loader.lease(0, [1, 5, 6]) as lease:
        for expert in (1, 5, 6):
            lease[expert]
    assert 5 not in loader.table.resident(0)
    broken.clear()
    with loader.lease(0, [1, 5, 6]) as lease:
        for expert in (1, 5, 6):
            lease[expert]
    assert_every_resident_has_its_checksum(loader, pack)


def test_prefetched_but_unused_experts_count_as_waste(loader: ExpertLoader) -> None:
    loader.swap([[0, 1], [], []])
    loader.settle()
    with loader.lease(0, [0]) as lease:
        lease[0]
    loader.close()
    assert loader.counters.prefetches == 2
    assert loader.counters.wasted_bytes == loader.stride_bytes
    assert loader.counters.bytes_loaded == 2 * loader.stride_bytes
