"""The pack file's format: one file with every expert's record, contiguous, aligned, and with a checksum each.

Layout. A preamble of 64 bytes (magic, version, header length, header checksum, file size), a JSON header, zeros up to
a multiple of 4 KiB, then the records: layer by layer, expert by expert, each a multiple of 4 KiB. A record's place
is ``layer.offset_bytes + expert * layer.record_bytes``. Checksums are XXH3 (64 bits) over the whole record, padding
included. They notice damage, not malice.

This module opens and checks packs; `emoe_core.loader.pack` writes them and `emoe_core.loader.storage` reads records
fast.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import xxhash

from emoe_core.checkpoint.index import RECORD_ALIGN_BYTES, CheckpointIndex, MoeLayer, ParamSpec
from emoe_core.checkpoint.safetensors_files import byte_view
from emoe_core.errors import PackError
from emoe_core.json_file import parse, typed

MAGIC = b"EMOEPACK"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQQQ24x")
FIX = "Write it again: emoe model pack CHECKPOINT --force"
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
    """An opened pack: everything of its header. Records are read by `emoe_core.loader.storage.PackedFile`."""

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


@dataclass(frozen=True)
class _ParamHeader:
    """A parameter of a record, as the header says it; the dtype by its name in torch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class _LayerHeader:
    """A layer, as the header says it; checksums as 16 hexadecimal digits."""

    name: str
    num_experts: int
    record_bytes: int
    offset_bytes: int
    params: tuple[_ParamHeader, ...]
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    """What the JSON header holds."""

    model_type: str
    dtype: str
    source_hash: str
    source_mtimes: dict[str, int]
    layers: tuple[_LayerHeader, ...]


def header_json(index: CheckpointIndex, layers: tuple[PackedLayer, ...]) -> bytes:
    """Return the JSON header of a pack; its length does not depend on the checksums' values."""
    header = _Header(
        model_type=index.model_type,
        dtype=dtype_name(index.dtype),
        source_hash=index.source_hash,
        source_mtimes=index.source_mtimes(),
        layers=tuple(
            _LayerHeader(
                name=layer.spec.name,
                num_experts=layer.spec.num_experts,
                record_bytes=layer.spec.record_bytes,
                offset_bytes=layer.offset_bytes,
                params=tuple(
                    _ParamHeader(param.name, param.shape, dtype_name(param.dtype), param.offset_bytes, param.nbytes)
                    for param in layer.spec.params
                ),
                checksums=tuple(f"{checksum:016x}" for checksum in layer.checksums),
            )
            for layer in layers
        ),
    )
    return json.dumps(asdict(header), separators=(",", ":")).encode()


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
    try:
        return _parse(file, typed(_Header, parse(header)), file_bytes)
    except ValueError as error:
        raise PackError(f"{file} has a header that describes no pack ({error}). {FIX}") from error


def _parse(file: Path, header: _Header, file_bytes: int) -> Pack:
    """Return the pack; ValueError when the header contradicts itself or the file's size."""
    _require(len(header.layers) > 0, "it names no layer")
    return Pack(
        path=file,
        model_type=header.model_type,
        dtype=_dtype(header.dtype),
        source_hash=header.source_hash,
        source_mtimes=header.source_mtimes,
        layers=tuple(_layer(number, layer, file_bytes) for number, layer in enumerate(header.layers)),
        file_bytes=file_bytes,
    )


def _layer(number: int, layer: _LayerHeader, file_bytes: int) -> PackedLayer:
    end_bytes = layer.offset_bytes + layer.num_experts * layer.record_bytes
    whole_blocks = layer.record_bytes % RECORD_ALIGN_BYTES == 0 and layer.offset_bytes % RECORD_ALIGN_BYTES == 0
    _require(layer.num_experts > 0 and layer.record_bytes > 0 and whole_blocks, f"layer {number} has no whole records")
    _require(0 < layer.offset_bytes < end_bytes <= file_bytes, f"layer {number} lies outside the file")
    _require(len(layer.checksums) == layer.num_experts, f"layer {number} has another number of checksums than experts")
    spec = MoeLayer(
        name=layer.name,
        index=number,
        num_experts=layer.num_experts,
        params=tuple(_param(param, layer.record_bytes) for param in layer.params),
        record_bytes=layer.record_bytes,
    )
    return PackedLayer(spec, layer.offset_bytes, tuple(int(checksum, 16) for checksum in layer.checksums))


def _param(param: _ParamHeader, record_bytes: int) -> ParamSpec:
    dtype = _dtype(param.dtype)
    _require(all(size > 0 for size in param.shape), f"parameter {param.name!r} has an empty shape")
    _require(param.nbytes == math.prod(param.shape) * dtype.itemsize, f"parameter {param.name!r} has another size")
    fits = 0 <= param.offset_bytes <= record_bytes - param.nbytes and param.offset_bytes % dtype.itemsize == 0
    _require(fits, f"parameter {param.name!r} lies outside its record")
    return ParamSpec(param.name, param.shape, dtype, param.offset_bytes, param.nbytes)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    _require(isinstance(found, torch.dtype), f"{name!r} is no dtype")
    return cast(torch.dtype, found)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _check_belongs(pack: Pack, index: CheckpointIndex) -> None:
    if pack.source_hash != index.source_hash:
        raise PackError(
            f"{pack.path} was made from another checkpoint than {index.path}. Write one for it: "
            f"emoe model pack CHECKPOINT --force"
        )
    if tuple(layer.spec for layer in pack.layers) != index.layers:
        raise PackError(
            f"{pack.path} holds {dtype_name(pack.dtype)} records in another layout than {index.path} has as "
            f"{dtype_name(index.dtype)}. {FIX}"
        )
