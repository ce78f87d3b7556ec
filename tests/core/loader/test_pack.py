"""The pack holds every expert's record, notices damage and other checkpoints, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.checkpoint.safetensors_files import SAMPLE_BYTES, SAMPLES_PER_SHARD
from emoe_core.errors import PackError
from emoe_core.loader.pack import Pack, compare_with_checkpoint, ensure_pack, write_pack
from workbench.models.reference.tiny import FAMILIES, tiny_moe


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    return open_checkpoint(tiny_moe(tmp_path / "model"))


def flip(file: Path, offset: int) -> None:
    """Change one byte of a file in place."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_record_is_the_experts_bytes_aligned_and_summed(tmp_path: Path, family: str) -> None:
    index = open_checkpoint(tiny_moe(tmp_path / "model", family, dtype=torch.bfloat16))
    pack = Pack.open(write_pack(index, tmp_path / "experts.emoe", verify=True), index)
    content = pack.path.read_bytes()
    assert len(content) == pack.file_bytes
    for layer in pack.layers:
        for expert in range(layer.spec.num_experts):
            offset = layer.record_offset(expert)
            assert offset % 4096 == 0
            raw = bytearray(content[offset : offset + layer.spec.record_bytes])
            assert xxhash.xxh3_64_intdigest(raw) == layer.checksums[expert]
            views = layer.spec.views(torch.frombuffer(raw, dtype=torch.uint8))
            for name, tensor in index.expert_tensors(layer.spec.index, expert).items():
                assert torch.equal(views[name], tensor)


def test_an_opened_pack_describes_the_checkpoint(index: CheckpointIndex, tmp_path: Path) -> None:
    pack = Pack.open(write_pack(index, tmp_path / "experts.emoe"))
    assert (pack.model_type, pack.dtype, pack.source_hash) == (index.model_type, index.dtype, index.source_hash)
    assert tuple(layer.spec for layer in pack.layers) == index.layers


def test_progress_counts_every_expert(index: CheckpointIndex, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack = Pack.open(write_pack(index, tmp_path / "experts.emoe", lambda done, total: seen.append((done, total))))
    assert seen == [(done, 24) for done in range(1, 25)]
    seen.clear()
    pack.verify(lambda done, total: seen.append((done, total)))
    assert seen == [(done, 24) for done in range(1, 25)]


def test_the_checkpoint_is_left_as_it_was(index: CheckpointIndex, tmp_path: Path) -> None:
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in index.path.iterdir()}
    write_pack(index, tmp_path / "experts.emoe")
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in index.path.iterdir()} == before


@pytest.mark.parametrize("lost_bytes", [1, 4096, 500_000])
def test_a_truncated_pack_is_refused_with_the_fix(index: CheckpointIndex, tmp_path: Path, lost_bytes: int) -> None:
    file = write_pack(index, tmp_path / "experts.emoe")
    os.truncate(file, file.stat().st_size - lost_bytes)
    with pytest.raises(PackError, match=r"truncated.*emoe model pack .*--force"):
        Pack.open(file)


@pytest.mark.parametrize("size_bytes", [0, 10, 64, 200])
def test_a_stump_of_a_pack_is_refused(index: CheckpointIndex, tmp_path: Path, size_bytes: int) -> None:
    file = write_pack(index, tmp_path / "experts.emoe")
    os.truncate(file, size_bytes)
    with pytest.raises(PackError, match="--force"):
        Pack.open(file)


def test_a_missing_pack_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="cannot open"):
        Pack.open(tmp_path / "none.emoe")
    (tmp_path / "text.emoe").write_text("not a pack" * 100)
    save_file({"x": torch.zeros(4)}, tmp_path / "other.emoe", metadata={"format": "pt"})
    for name in ("text.emoe", "other.emoe"):
        with pytest.raises(PackError, match="not an expert pack"):
            Pack.open(tmp_path / name)


def test_no_altered_byte_of_the_header_is_believed(index: CheckpointIndex, tmp_path: Path) -> None:
    file = write_pack(index, tmp_path / "experts.emoe")
    for offset in [*range(16), *range(16, Pack.open(file).layers[0].offset_bytes, 7)]:
        flip(file, offset)
        with pytest.raises(PackError, match="--force"):
            Pack.open(file)
        flip(file, offset)


def test_the_pack_of_another_version_is_refused(index: CheckpointIndex, tmp_path: Path) -> None:
    file = write_pack(index, tmp_path / "experts.emoe")
    file.write_bytes(file.read_bytes().replace(b'"pack_version":"2"', b'"pack_version":"3"'))
    with pytest.raises(PackError, match="has pack version '3', this emoe reads version 2"):
        Pack.open(file)


def test_one_altered_bit_is_found_and_placed(index: CheckpointIndex, tmp_path: Path) -> None:
    pack = Pack.open(write_pack(index, tmp_path / "experts.emoe"), index)
    pack.verify()
    flip(pack.path, pack.layers[1].record_offset(5) + 77)
    with pytest.raises(PackError, match=r"expert 5 of layer 1 .*--force"):
        pack.verify()
    pack.read_record(1, 4)


def test_the_pack_of_another_checkpoint_or_dtype_is_refused(index: CheckpointIndex, tmp_path: Path) -> None:
    file = write_pack(index, tmp_path / "experts.emoe")
    other = open_checkpoint(tiny_moe(tmp_path / "other", seed=1))
    with pytest.raises(PackError, match="another checkpoint"):
        Pack.open(file, other)
    with pytest.raises(PackError, match="float32 records"):
        Pack.open(file, open_checkpoint(index.path, "bfloat16"))


def test_a_pack_is_written_once_and_used_again(index: CheckpointIndex, tmp_path: Path) -> None:
    first = ensure_pack(index, tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    again = ensure_pack(open_checkpoint(index.path), tmp_path / "cache")
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == written


def test_a_damaged_pack_in_the_cache_is_written_again(index: CheckpointIndex, tmp_path: Path) -> None:
    file = ensure_pack(index, tmp_path / "cache").path
    os.truncate(file, 100)
    ensure_pack(index, tmp_path / "cache").verify()


def test_a_pack_of_the_first_version_is_written_again(index: CheckpointIndex, tmp_path: Path) -> None:
    file = ensure_pack(index, tmp_path / "cache").path
    content = file.read_bytes()
    file.write_bytes(struct.pack("<8sIIQQQ24x", b"EMOEPACK", 1, 0, 2, 0, len(content)) + b"{}" + content[66:])
    ensure_pack(index, tmp_path / "cache").verify()


def test_a_copied_checkpoint_is_compared_once_and_keeps_its_pack(index: CheckpointIndex, tmp_path: Path) -> None:
    file = ensure_pack(index, tmp_path / "cache").path
    written = file.stat().st_mtime_ns
    shutil.copytree(index.path, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = open_checkpoint(tmp_path / "copy")
    assert copied.source_mtimes() != index.source_mtimes()
    compared: list[int] = []
    ensure_pack(copied, tmp_path / "cache", lambda done, total: compared.append(done))
    assert compared == list(range(1, 25))
    assert file.stat().st_mtime_ns == written
    compared.clear()
    ensure_pack(copied, tmp_path / "cache", lambda done, total: compared.append(done))
    assert compared == []


def test_a_pack_serves_though_nothing_can_be_remembered_beside_it(index: CheckpointIndex, tmp_path: Path) -> None:
    file = ensure_pack(index, tmp_path / "cache").path
    file.with_suffix(".seen.json").mkdir()
    (shard,) = index.shards
    os.utime(shard.file, ns=(shard.mtime_ns + 1, shard.mtime_ns + 1))
    for _ in range(2):
        assert ensure_pack(open_checkpoint(index.path), tmp_path / "cache").path == file


def test_an_expert_altered_in_place_is_noticed_though_the_fingerprint_misses_it(
    index: CheckpointIndex, tmp_path: Path
) -> None:
    pack = ensure_pack(index, tmp_path / "cache")
    (shard,) = index.shards
    ref = next(ref for ref in shard.tensors if ".experts.2.w1" in ref.name)
    span = shard.size_bytes - shard.data_offset_bytes
    starts = [
        shard.data_offset_bytes + sample * (span - SAMPLE_BYTES) // (SAMPLES_PER_SHARD - 1)
        for sample in range(SAMPLES_PER_SHARD)
    ]
    unsampled = next(
        at
        for at in range(ref.offset_bytes, ref.offset_bytes + ref.nbytes)
        if not any(start <= at < start + SAMPLE_BYTES for start in starts)
    )
    flip(shard.file, unsampled)
    os.utime(shard.file, ns=(shard.mtime_ns + 1, shard.mtime_ns + 1))
    altered = open_checkpoint(index.path)
    assert altered.source_hash == index.source_hash
    with pytest.raises(PackError, match="expert 2 of"):
        compare_with_checkpoint(pack, altered)
    renewed = ensure_pack(altered, tmp_path / "cache")
    compare_with_checkpoint(renewed, altered)
    assert renewed.layers[0].checksums != pack.layers[0].checksums or renewed.layers != pack.layers


def test_too_little_space_is_named_before_anything_is_written(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total - 1000, 1000))
    with pytest.raises(PackError, match=r"1,000 free: .* short"):
        write_pack(index, tmp_path / "out" / "experts.emoe")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failing_write_leaves_nothing_behind(index: CheckpointIndex, tmp_path: Path) -> None:
    # A limit on file size makes the kernel refuse a write in the middle, as a full disk does.
    program = (
        "import resource, sys\n"
        "from emoe_core.checkpoint.index import open_checkpoint\n"
        "from emoe_core.loader.pack import write_pack\n"
        "from emoe_core.errors import PackError\n"
        "index = open_checkpoint(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n    write_pack(index, sys.argv[2])\n"
        "except PackError as error:\n    print(error)\n"
    )
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", program, str(index.path), str(tmp_path / "out" / "experts.emoe")],
        capture_output=True,
        text=True,
    )
    assert "cannot write the pack" in result.stdout, result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_write_keeps_the_old_pack(index: CheckpointIndex, tmp_path: Path) -> None:
    file = write_pack(index, tmp_path / "out" / "experts.emoe")
    before = file.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(index, file, interrupt)
    assert [entry.name for entry in file.parent.iterdir()] == ["experts.emoe"]
    assert file.read_bytes() == before


def test_a_directory_that_cannot_be_written_is_named(index: CheckpointIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot write the pack"):
        write_pack(index, tmp_path / "file" / "experts.emoe")


def status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_packing_never_holds_more_than_a_few_experts(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=256,
        moe_intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=64,
        num_experts_per_tok=2,
        mlp_only_layers=[],
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    index = open_checkpoint(tmp_path / "model")
    assert index.expert_bytes_total > 64 * 1.5e6
    index.expert_tensors(0, 0)
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = status_bytes("VmRSS")
    write_pack(index, tmp_path / "experts.emoe")
    assert status_bytes("VmHWM") - before_bytes < 12 * index.layers[0].record_bytes


def test_safetensors_opens_a_pack_and_finds_the_records(index: CheckpointIndex, tmp_path: Path) -> None:
    pack = Pack.open(write_pack(index, tmp_path / "experts.emoe"))
    with safe_open(pack.path, framework="pt") as opened:
        assert set(opened.keys()) == {layer.name for layer in index.layers}
        assert json.loads(opened.metadata()["pack"])["expert_format"] == pack.expert_format == "auto"
        for layer in index.layers:
            records = opened.get_tensor(layer.name)
            assert torch.equal(records[3], pack.read_record(layer.index, 3))
