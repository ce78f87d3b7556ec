"""The expert pack: one file with every expert's record, contiguous, aligned, and with a checksum each.

Layout. A preamble of 64 bytes (magic, version, header length, header checksum, file size), a JSON header, zeros up to
a multiple of 4 KiB, then the records: layer by layer, expert by expert, each a multiple of 4 KiB. A record's place
is ``layer.offset_bytes + expert * layer.record_bytes``. Checksums are XXH3 (64 bits) over the whole record, padding
included. They notice damage, not malice.

A pack belongs to one checkpoint: the header holds the fingerprint of its weights. Where a checkpoint's files carry
newer modification times than the pack knows, `ensure_pack` compares every expert once and remembers the answer.

This module writes and checks packs; `emoe_core.storage` reads records fast.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from emoe_core.checkpoint import RECORD_ALIGN_BYTES, CheckpointIndex, MoeLayer, ParamSpec
from emoe_core.errors import PackError
from emoe_core.shards import byte_view

MAGIC = b"EMOEPACK"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQQQ24x")
Progress = Callable[[int, int], None]
"""Called with (records done, records in all)."""


@dataclass(frozen=True)
class PackedLayer:
    """A MoE layer of a pack: its record layout, where its first record starts, and a checksum per expert."""

    spec: MoeLayer
    offset_bytes: int
    checksums: tuple[int, ...]

    def record_offset(self, expert: int) -> int:
        """Return the byte at which an expert's record starts in the file."""
        return self.offset_bytes + expert * self.spec.record_bytes


@dataclass(frozen=True)
class Pack:
    """An opened pack: everything of its header. Records are read by `emoe_core.storage.PackedFile`."""

    path: Path
    model_type: str
    dtype: torch.dtype
    source_hash: str
    source_mtimes: dict[str, int]
    layers: tuple[PackedLayer, ...]
    file_bytes: int

    @staticmethod
    def open(path: str | Path, index: CheckpointIndex | None = None) -> Pack:
        """Read and check a pack's header, and that it belongs to ``index`` when given.

        Raises
        ------
        PackError
            When the file is missing, truncated, altered in its header, or made from another checkpoint.
        """
        file = Path(path)
        pack = _read_header(file)
        if index is not None:
            _check_belongs(pack, index)
        return pack

    def read_record(self, layer: int, expert: int) -> torch.Tensor:
        """Return one record (uint8 ``[record_bytes]``) through a plain read, its checksum verified."""
        packed = self.layers[layer]
        out = torch.empty(packed.spec.record_bytes, dtype=torch.uint8)
        view = byte_view(out)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(packed.record_offset(expert))
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise truncated(self.path, packed.spec, expert)
                done += got
        self.check_record(layer, expert, view)
        return out

    def check_record(self, layer: int, expert: int, record: memoryview) -> None:
        """Raise PackError unless the bytes have the checksum of this expert."""
        packed = self.layers[layer]
        if xxhash.xxh3_64_intdigest(record) != packed.checksums[expert]:
            raise PackError(
                f"{self.path}: expert {expert} of layer {layer} ({packed.spec.name}) does not have its checksum: the "
                f"pack was altered or the disk returned wrong bytes. Write it again: emoe pack CHECKPOINT --force"
            )

    def verify(self, progress: Progress | None = None) -> None:
        """Read every record and compare its checksum; raise PackError at the first that differs."""
        total = sum(packed.spec.num_experts for packed in self.layers)
        done = 0
        for layer, packed in enumerate(self.layers):
            for expert in range(packed.spec.num_experts):
                self.read_record(layer, expert)
                done += 1
                if progress is not None:
                    progress(done, total)


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
    target.parent.mkdir(parents=True, exist_ok=True)
    layers, file_bytes = _place(index)
    _check_space(target, file_bytes)
    with tempfile.TemporaryDirectory(prefix=".emoe-pack-", dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        try:
            pack = _write(index, partial, layers, file_bytes, progress)
        except OSError as error:
            raise PackError(
                f"cannot write the pack {target} ({error.strerror or error}); it needs {file_bytes:,} bytes. Nothing "
                f"was left behind. Free space or choose another directory."
            ) from error
        if verify:
            pack.verify()
        partial.replace(target)
    return target


def ensure_pack(index: CheckpointIndex, cache_dir: str | Path, progress: Progress | None = None) -> Pack:
    """Return the pack of a checkpoint from a cache directory, written first when missing or no longer true.

    A pack whose checkpoint files have other modification times than when it was made is compared with the checkpoint
    expert by expert; the answer is remembered beside the pack.
    """
    dtype = str(index.dtype).removeprefix("torch.")
    file = Path(cache_dir) / f"{index.model_type}-{dtype}-{index.source_hash[:16]}.emoe"
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
                    f"{pack.path} was made before {index.path} changed: expert {expert} of {layer.name} differs. "
                    f"Write it again: emoe pack CHECKPOINT --force"
                )
            done += 1
            if progress is not None:
                progress(done, total)


def truncated(path: Path, layer: MoeLayer, expert: int) -> PackError:
    """Return the error for a record that ends beyond the file's end."""
    return PackError(
        f"{path} ended while reading expert {expert} of layer {layer.index} ({layer.name}): the pack was truncated. "
        f"Write it again: emoe pack CHECKPOINT --force"
    )


def _place(index: CheckpointIndex) -> tuple[tuple[PackedLayer, ...], int]:
    """Lay out the file: the header's size does not depend on checksums, which are written with a fixed width."""
    blank = tuple(PackedLayer(spec=layer, offset_bytes=0, checksums=(0,) * layer.num_experts) for layer in index.layers)
    # Offsets have a varying number of digits; room for the longest possible one is set aside per layer.
    header_bytes = len(_header_json(index, blank)) + 20 * len(blank)
    offset = _round_up(PREAMBLE.size + header_bytes)
    placed = []
    for layer in blank:
        placed.append(replace(layer, offset_bytes=offset))
        offset += layer.spec.num_experts * layer.spec.record_bytes
    return tuple(placed), offset


def _header_json(index: CheckpointIndex, layers: tuple[PackedLayer, ...]) -> bytes:
    header = {
        "model_type": index.model_type,
        "dtype": _dtype_name(index.dtype),
        "source_hash": index.source_hash,
        "source_mtimes": index.source_mtimes(),
        "layers": [
            {
                "name": layer.spec.name,
                "num_experts": layer.spec.num_experts,
                "record_bytes": layer.spec.record_bytes,
                "offset_bytes": layer.offset_bytes,
                "params": [
                    {
                        "name": param.name,
                        "shape": list(param.shape),
                        "dtype": _dtype_name(param.dtype),
                        "offset_bytes": param.offset_bytes,
                        "nbytes": param.nbytes,
                    }
                    for param in layer.spec.params
                ],
                "checksums": [f"{checksum:016x}" for checksum in layer.checksums],
            }
            for layer in layers
        ],
    }
    return json.dumps(header, separators=(",", ":")).encode()


def _write(
    index: CheckpointIndex,
    partial: Path,
    layers: tuple[PackedLayer, ...],
    file_bytes: int,
    progress: Progress | None,
) -> Pack:
    total = sum(layer.num_experts for layer in index.layers)
    done = 0
    summed = []
    with partial.open("wb") as stream:
        for layer in layers:
            stream.seek(layer.offset_bytes)
            record = torch.empty(layer.spec.record_bytes, dtype=torch.uint8)
            view = byte_view(record)
            checksums = []
            for expert in range(layer.spec.num_experts):
                index.read_record(layer.spec.index, expert, record)
                checksums.append(xxhash.xxh3_64_intdigest(view))
                stream.write(view)
                done += 1
                if progress is not None:
                    progress(done, total)
            summed.append(replace(layer, checksums=tuple(checksums)))
        header = _header_json(index, tuple(summed))
        assert PREAMBLE.size + len(header) <= layers[0].offset_bytes
        stream.seek(0)
        checksum = xxhash.xxh3_64_intdigest(header)
        stream.write(PREAMBLE.pack(MAGIC, VERSION, 0, len(header), checksum, file_bytes))
        stream.write(header)
        stream.flush()
        os.fsync(stream.fileno())
    return _read_header(partial)


def _read_header(file: Path) -> Pack:
    fix = "Write it again: emoe pack CHECKPOINT --force"
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            preamble = stream.read(PREAMBLE.size)
            if len(preamble) < PREAMBLE.size or preamble[:8] != MAGIC:
                raise PackError(f"{file} is not an expert pack. {fix}")
            _, version, _, header_bytes, checksum, file_bytes = PREAMBLE.unpack(preamble)
            if version != VERSION:
                raise PackError(f"{file} has pack version {version}, this emoe reads version {VERSION}. {fix}")
            header = stream.read(min(header_bytes, size_bytes))
    except OSError as error:
        raise PackError(f"cannot open the pack {file} ({error.strerror}). {fix}") from error
    if size_bytes != file_bytes:
        raise PackError(f"{file} is truncated: it has {size_bytes:,} of {file_bytes:,} bytes. {fix}")
    if len(header) != header_bytes or xxhash.xxh3_64_intdigest(header) != checksum:
        raise PackError(f"{file} has a damaged header: its checksum differs. {fix}")
    return _parse(file, json.loads(header), file_bytes)


def _parse(file: Path, header: dict[str, Any], file_bytes: int) -> Pack:
    layers = tuple(
        PackedLayer(
            spec=MoeLayer(
                name=layer["name"],
                index=number,
                num_experts=layer["num_experts"],
                params=tuple(
                    ParamSpec(
                        name=param["name"],
                        shape=tuple(param["shape"]),
                        dtype=getattr(torch, param["dtype"]),
                        offset_bytes=param["offset_bytes"],
                        nbytes=param["nbytes"],
                    )
                    for param in layer["params"]
                ),
                record_bytes=layer["record_bytes"],
            ),
            offset_bytes=layer["offset_bytes"],
            checksums=tuple(int(checksum, 16) for checksum in layer["checksums"]),
        )
        for number, layer in enumerate(header["layers"])
    )
    return Pack(
        path=file,
        model_type=header["model_type"],
        dtype=getattr(torch, header["dtype"]),
        source_hash=header["source_hash"],
        source_mtimes=header["source_mtimes"],
        layers=layers,
        file_bytes=file_bytes,
    )


def _check_belongs(pack: Pack, index: CheckpointIndex) -> None:
    if pack.source_hash != index.source_hash:
        raise PackError(
            f"{pack.path} was made from another checkpoint than {index.path}. Write one for it: "
            f"emoe pack CHECKPOINT --force"
        )
    if tuple(layer.spec for layer in pack.layers) != index.layers:
        raise PackError(
            f"{pack.path} holds {_dtype_name(pack.dtype)} records in another layout than {index.path} has as "
            f"{_dtype_name(index.dtype)}. Write it again: emoe pack CHECKPOINT --force"
        )


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
        return json.loads(_seen_file(pack.path).read_text()) == current
    except (OSError, ValueError):
        return False


def _remember(pack: Pack, index: CheckpointIndex) -> None:
    _seen_file(pack.path).write_text(json.dumps(index.source_mtimes()))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _round_up(value: int) -> int:
    return -(-value // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES
