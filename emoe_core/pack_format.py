"""The pack file's format: one file with every expert's record, contiguous, aligned, and with a checksum each.

Layout. A preamble of 64 bytes (magic, version, header length, header checksum, file size), a JSON header, zeros up to
a multiple of 4 KiB, then the records: layer by layer, expert by expert, each a multiple of 4 KiB. A record's place
is ``layer.offset_bytes + expert * layer.record_bytes``. Checksums are XXH3 (64 bits) over the whole record, padding
included. They notice damage, not malice.

This module opens and checks packs; `emoe_core.pack` writes them and `emoe_core.storage` reads records fast.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from emoe_core.checkpoint import CheckpointIndex, MoeLayer, ParamSpec
from emoe_core.errors import PackError
from emoe_core.shards import byte_view

MAGIC = b"EMOEPACK"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQQQ24x")
FIX = "Write it again: emoe pack CHECKPOINT --force"
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
        pack = read_header(file)
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
                f"pack was altered or the disk returned wrong bytes. {FIX}"
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


def truncated(path: Path, layer: MoeLayer, expert: int) -> PackError:
    """Return the error for a record that ends beyond the file's end."""
    return PackError(
        f"{path} ended while reading expert {expert} of layer {layer.index} ({layer.name}): the pack was truncated. "
        f"{FIX}"
    )


def header_json(index: CheckpointIndex, layers: tuple[PackedLayer, ...]) -> bytes:
    """Return the JSON header of a pack; its length does not depend on the checksums' values."""
    header = {
        "model_type": index.model_type,
        "dtype": dtype_name(index.dtype),
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
                        "dtype": dtype_name(param.dtype),
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


def read_header(file: Path) -> Pack:
    """Read and check the header of a pack file."""
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            preamble = stream.read(PREAMBLE.size)
            if len(preamble) < PREAMBLE.size or preamble[:8] != MAGIC:
                raise PackError(f"{file} is not an expert pack. {FIX}")
            _, version, _, header_bytes, checksum, file_bytes = PREAMBLE.unpack(preamble)
            if version != VERSION:
                raise PackError(f"{file} has pack version {version}, this emoe reads version {VERSION}. {FIX}")
            header = stream.read(min(header_bytes, size_bytes))
    except OSError as error:
        raise PackError(f"cannot open the pack {file} ({error.strerror}). {FIX}") from error
    if size_bytes != file_bytes:
        raise PackError(f"{file} is truncated: it has {size_bytes:,} of {file_bytes:,} bytes. {FIX}")
    if len(header) != header_bytes or xxhash.xxh3_64_intdigest(header) != checksum:
        raise PackError(f"{file} has a damaged header: its checksum differs. {FIX}")
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


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _check_belongs(pack: Pack, index: CheckpointIndex) -> None:
    if pack.source_hash != index.source_hash:
        raise PackError(
            f"{pack.path} was made from another checkpoint than {index.path}. Write one for it: "
            f"emoe pack CHECKPOINT --force"
        )
    if tuple(layer.spec for layer in pack.layers) != index.layers:
        raise PackError(
            f"{pack.path} holds {dtype_name(pack.dtype)} records in another layout than {index.path} has as "
            f"{dtype_name(index.dtype)}. {FIX}"
        )
