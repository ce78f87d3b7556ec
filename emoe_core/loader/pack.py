"""Write a checkpoint's experts to a pack, and keep one pack per checkpoint in a cache directory.

A pack belongs to one checkpoint: its header holds the fingerprint of the weights. Where the checkpoint's files carry
other modification times than the pack knows, `ensure_pack` compares every expert once and remembers the answer.

The file's format is `emoe_core.loader.pack_format`; writing never needs more memory than a few experts.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.checkpoint.safetensors_files import byte_view
from emoe_core.errors import PackError
from emoe_core.files import parse, read_text, whole_file
from emoe_core.loader.pack_format import FIX, Pack, PackedLayer, Progress, dtype_name, pack_head, truncated

__all__ = ["Pack", "PackedLayer", "Progress", "compare_with_checkpoint", "ensure_pack", "truncated", "write_pack"]


def write_pack(
    index: CheckpointIndex, dest: str | Path, progress: Progress | None = None, verify: bool = False
) -> Path:
    """Write all experts of a checkpoint to one pack and return its path.

    Holds one expert in memory at a time. The file appears under its name only when it is complete.

    Parameters
    ----------
    index : CheckpointIndex
    dest : str or Path
        File to write; an existing one is replaced.
    progress : callable, optional
        Called with (records done, records in all).
    verify : bool
        Read every record back from the file and compare its checksum.

    Raises
    ------
    PackError
        When the disk has too little space, or a written record does not read back.
    """
    target = Path(dest)
    file_bytes = len(_blank_head(index)) + index.expert_bytes_total
    try:
        with whole_file(target) as partial:
            _check_space(target, file_bytes)
            pack = _write(index, partial, progress)
            if verify:
                pack.verify()
    except OSError as error:
        raise PackError(
            f"cannot write the pack {target} ({error.strerror or error}); it needs {file_bytes:,} bytes. Nothing was "
            f"left behind. Free space or choose another directory."
        ) from error
    return target


def ensure_pack(index: CheckpointIndex, cache_dir: str | Path, progress: Progress | None = None) -> Pack:
    """Return the pack of a checkpoint from a cache directory, written first when missing or no longer true.

    A pack whose checkpoint files have other modification times than when it was made is compared with the checkpoint
    expert by expert; the answer is remembered beside the pack.
    """
    kind = dtype_name(index.dtype) + ("" if index.expert_dtype == "auto" else f"-{index.expert_dtype}")
    file = Path(cache_dir) / f"{index.model_type}-{kind}-{index.source_hash[:16]}.emoe"
    try:
        pack = Pack.open(file, index)
        if not _same_files(pack, index):
            compare_with_checkpoint(pack, index, progress)
            _remember(pack, index)
        return pack
    except PackError:
        write_pack(index, file, progress)
        _seen_file(file).unlink(missing_ok=True)
        return Pack.open(file, index)


def compare_with_checkpoint(pack: Pack, index: CheckpointIndex, progress: Progress | None = None) -> None:
    """Raise PackError unless every expert of the checkpoint still has the checksum that the pack recorded."""
    total = sum(layer.num_experts for layer in index.layers)
    done = 0
    for layer in index.layers:
        record = torch.empty(layer.record_bytes, dtype=torch.uint8)
        for expert in range(layer.num_experts):
            index.read_record(layer.index, expert, record)
            if xxhash.xxh3_64_intdigest(byte_view(record)) != pack.layers[layer.index].checksums[expert]:
                raise PackError(
                    f"{pack.path} was made before {index.path} changed: expert {expert} of {layer.name} differs. {FIX}"
                )
            done += 1
            if progress is not None:
                progress(done, total)


def _write(index: CheckpointIndex, partial: Path, progress: Progress | None) -> Pack:
    total = sum(layer.num_experts for layer in index.layers)
    done = 0
    checksums: list[list[int]] = []
    with partial.open("wb") as stream:
        stream.seek(len(_blank_head(index)))
        for layer in index.layers:
            record = torch.empty(layer.record_bytes, dtype=torch.uint8)
            view = byte_view(record)
            checksums.append([])
            for expert in range(layer.num_experts):
                index.read_record(layer.index, expert, record)
                checksums[-1].append(xxhash.xxh3_64_intdigest(view))
                stream.write(view)
                done += 1
                if progress is not None:
                    progress(done, total)
        stream.seek(0)
        stream.write(pack_head(index, checksums))
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            # Records are read past the page cache: a copy of the pack there would only be charged to this process.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Pack.open(partial)


def _blank_head(index: CheckpointIndex) -> bytes:
    """Return the head of a pack whose checksums are not known yet; it is as long as the head with them."""
    return pack_head(index, [[0] * layer.num_experts for layer in index.layers])


def _check_space(target: Path, file_bytes: int) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < file_bytes:
        raise PackError(
            f"the pack needs {file_bytes:,} bytes, {target.parent} has {free_bytes:,} free: "
            f"{file_bytes - free_bytes:,} short. Free space or choose another directory."
        )


def _seen_file(file: Path) -> Path:
    return file.with_suffix(".seen.json")


def _same_files(pack: Pack, index: CheckpointIndex) -> bool:
    current = index.source_mtimes()
    if pack.source_mtimes == current:
        return True
    try:
        return bool(parse(read_text(_seen_file(pack.path))) == current)
    except (OSError, ValueError):
        return False


def _remember(pack: Pack, index: CheckpointIndex) -> None:
    # Where that cannot be written, the next load compares again.
    with suppress(OSError):
        _seen_file(pack.path).write_text(json.dumps(index.source_mtimes()))
