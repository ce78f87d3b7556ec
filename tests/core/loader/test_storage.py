"""Every tier hands out exactly an expert's record, says how it reads, and notices damaged bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.device import CudaDevice, aligned_buffer
from emoe_core.errors import OptionError, PackError
from emoe_core.loader.pack import Pack, write_pack
from emoe_core.loader.storage import HostMemory, PackedFile, Storage
from workbench.models.reference.tiny import tiny_moe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    return write_pack(open_checkpoint(tiny_moe(folder / "model", dtype=torch.bfloat16)), folder / "experts.emoe")


@pytest.fixture
def pack(made: Path, tmp_path: Path) -> Pack:
    """A pack of one's own, free to damage."""
    copy = tmp_path / "experts.emoe"
    copy.write_bytes(made.read_bytes())
    return Pack.open(copy)


TIERS: dict[str, Callable[[Pack], Storage]] = {
    "direct": lambda pack: PackedFile(pack),
    "buffered": lambda pack: PackedFile(pack, direct=False),
    "host memory": lambda pack: HostMemory(pack),
}


def damage(pack: Pack, layer: int, expert: int) -> None:
    with pack.path.open("r+b") as stream:
        stream.seek(pack.layers[layer].record_offset(expert) + 100)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
        stream.flush()
        os.fsync(stream.fileno())


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_hands_out_each_record_and_counts_its_bytes(pack: Pack, tier: str) -> None:
    storage = TIERS[tier](pack)
    buffer = aligned_buffer(storage.record_bytes(0))
    handed_out = 0
    for layer, packed in enumerate(pack.layers):
        for expert in range(packed.spec.num_experts):
            storage.read_into(layer, expert, buffer)
            assert xxhash.xxh3_64_intdigest(buffer.numpy()) == packed.checksums[expert]
            handed_out += storage.record_bytes(layer)
            assert storage.bytes_read == handed_out
    storage.close()


@pytest.mark.parametrize("tier", TIERS)
def test_reads_from_many_threads_do_not_mix(pack: Pack, tier: str) -> None:
    storage = TIERS[tier](pack)
    wanted = [(layer, expert) for layer in range(len(pack.layers)) for expert in range(8)] * 8

    def read(place: tuple[int, int]) -> bool:
        buffer = aligned_buffer(storage.record_bytes(place[0]))
        storage.read_into(*place, buffer)
        return xxhash.xxh3_64_intdigest(buffer.numpy()) == pack.layers[place[0]].checksums[place[1]]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, wanted))
    assert storage.bytes_read == sum(storage.record_bytes(layer) for layer, _ in wanted)
    storage.close()


def test_a_buffer_may_be_larger_than_the_record_and_its_rest_is_left_alone(pack: Pack) -> None:
    size = pack.layers[0].spec.record_bytes
    for make in TIERS.values():
        buffer = aligned_buffer(size + 4096)
        buffer[size:] = 7
        storage = make(pack)
        storage.read_into(0, 3, buffer)
        assert bool((buffer[size:] == 7).all())
        storage.close()


def test_reads_are_direct_or_the_reason_is_stated(pack: Pack) -> None:
    storage = PackedFile(pack)
    if storage.direct:
        assert storage.fallback_reason is None
        assert "direct reads" in storage.description
    else:
        assert storage.fallback_reason
        assert storage.fallback_reason in storage.description
    storage.close()


def test_a_refused_direct_open_falls_back_and_says_why(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    # O_DIRECT with O_DIRECTORY is refused by every file system; the fallback must come up by itself.
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECT | os.O_DIRECTORY)
    storage = PackedFile(pack)
    assert not storage.direct
    assert storage.fallback_reason is not None
    assert "refuses O_DIRECT" in storage.fallback_reason
    buffer = aligned_buffer(storage.record_bytes(0))
    storage.read_into(0, 0, buffer)
    assert xxhash.xxh3_64_intdigest(buffer.numpy()) == pack.layers[0].checksums[0]
    storage.close()


def test_a_system_without_direct_reads_falls_back(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    storage = PackedFile(pack)
    assert "no O_DIRECT" in storage.description
    storage.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_pack_truncated_while_open_names_layer_and_expert(pack: Pack, direct: bool) -> None:
    storage = PackedFile(pack, direct=direct)
    os.truncate(pack.path, pack.layers[2].record_offset(6) + 1000)
    buffer = aligned_buffer(storage.record_bytes(2))
    storage.read_into(2, 5, buffer)
    for expert in (6, 7):
        with pytest.raises(PackError, match=f"expert {expert} of layer 2"):
            storage.read_into(2, expert, buffer)
    storage.close()


def test_the_first_read_of_a_damaged_record_is_refused(pack: Pack) -> None:
    damage(pack, 1, 2)
    storage = PackedFile(pack)
    buffer = aligned_buffer(storage.record_bytes(1))
    for _ in range(2):
        with pytest.raises(PackError, match="expert 2 of layer 1"):
            storage.read_into(1, 2, buffer)
    storage.read_into(1, 3, buffer)
    storage.close()
    with pytest.raises(PackError, match="expert 2 of layer 1"):
        HostMemory(pack)


def test_always_verifying_catches_later_damage_and_never_verifying_does_not(pack: Pack) -> None:
    always, never = PackedFile(pack, verify="always"), PackedFile(pack, verify="never")
    buffer = aligned_buffer(always.record_bytes(0))
    always.read_into(0, 0, buffer)
    damage(pack, 0, 0)
    with pytest.raises(PackError, match="expert 0 of layer 0"):
        always.read_into(0, 0, buffer)
    never.read_into(0, 0, buffer)
    assert xxhash.xxh3_64_intdigest(buffer.numpy()) != pack.layers[0].checksums[0]
    always.close()
    never.close()


def test_host_memory_needs_no_file_once_loaded(pack: Pack) -> None:
    storage = HostMemory(pack)
    pack.path.unlink()
    buffer = aligned_buffer(storage.record_bytes(0))
    storage.read_into(0, 7, buffer)
    assert xxhash.xxh3_64_intdigest(buffer.numpy()) == pack.layers[0].checksums[7]
    storage.close()


@pytest.mark.parametrize("tier", TIERS)
def test_misuse_is_refused(pack: Pack, tier: str) -> None:
    storage = TIERS[tier](pack)
    size = storage.record_bytes(0)
    with pytest.raises(ValueError, match="buffer"):
        storage.read_into(0, 0, aligned_buffer(size - 1))
    with pytest.raises(ValueError, match="uint8"):
        storage.read_into(0, 0, torch.zeros(size))
    with pytest.raises(IndexError):
        storage.read_into(0, 8, aligned_buffer(size))
    storage.close()
    storage.close()
    with pytest.raises(ValueError, match="closed"):
        storage.read_into(0, 0, aligned_buffer(size))


def test_direct_reads_refuse_unaligned_memory(pack: Pack) -> None:
    storage = PackedFile(pack)
    if not storage.direct:
        pytest.skip(f"no direct reads here: {storage.fallback_reason}")
    size = storage.record_bytes(0)
    with pytest.raises(ValueError, match="page-aligned"):
        storage.read_into(0, 0, aligned_buffer(size + 64)[64:])
    storage.close()


def test_closing_returns_the_file(pack: Pack) -> None:
    def held() -> list[str]:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [str(link.readlink()) for link in links if link.exists() and link.samefile(pack.path)]

    storage = PackedFile(pack)
    assert len(held()) == 1
    storage.close()
    assert held() == []
    HostMemory(pack).close()
    assert held() == []


def test_an_unknown_verify_mode_is_refused(pack: Pack) -> None:
    with pytest.raises(OptionError, match="sometimes"):
        PackedFile(pack, verify="sometimes")  # type: ignore[arg-type]


@pytest.mark.parametrize("nbytes", [1, 4096, 100_001])
def test_buffers_start_on_a_page_zeroed_and_live_as_long_as_a_view(nbytes: int) -> None:
    buffer = aligned_buffer(nbytes)
    assert buffer.data_ptr() % 4096 == 0
    assert buffer.numel() == nbytes
    assert not bool(buffer.any())
    view = buffer[-1:]
    del buffer
    view.fill_(9)
    assert view.item() == 9


@pytest.mark.cuda
def test_pinned_buffers_are_pinned_and_released(pack: Pack) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    storage = HostMemory(pack, CudaDevice(torch.device("cuda", 0)))
    assert storage.record(0, 0).is_pinned()
    on_device = storage.record(0, 0).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(on_device.cpu(), storage.record(0, 0))
    storage.close()
