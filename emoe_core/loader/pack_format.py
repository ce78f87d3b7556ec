"""The pack file's format: a safetensors file whose tensors are the experts' records, aligned and with a checksum each.

A MoE layer is one tensor of bytes ``[experts, record_bytes]`` under the layer's name. The header is padded with spaces
to a multiple of 4 KiB, as records are, so that every record lies where direct reads can fetch it. Its metadata says in
JSON what records hold and which checkpoint they are of. Checksums are XXH3 (64 bits), one over that JSON and one over
each whole record, padding included. They notice damage, not malice.

This module opens and checks packs; `emoe_core.loader.pack` writes them and `emoe_core.loader.storage` reads records
fast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError

from emoe_core.checkpoint.index import RECORD_ALIGN_BYTES, CheckpointIndex, MoeLayer, ParamSpec
from emoe_core.checkpoint.safetensors_files import LENGTH, METADATA, byte_view, file_head, read_header
from emoe_core.errors import PackError
from emoe_core.files import parse, typed

VERSION = 2
_VERSION, _DESCRIPTION, _CHECKSUM = "pack_version", "pack", "pack_checksum"
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
    """An opened pack: everything of its header. Records are read by `emoe_core.loader.storage.PackedFile`.

    ``expert_format`` is how records hold experts: the index's ``expert_dtype``.
    """

    path: Path
    model_type: str
    dtype: torch.dtype
    expert_format: str
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
        pack = _read(file)
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
class _ParamDescription:
    """A parameter of a record, as the header says it; the dtype by its name in torch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True)
class _LayerDescription:
    """A layer, as the header says it; checksums as 16 hexadecimal digits."""

    params: tuple[_ParamDescription, ...]
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class _Description:
    """What the metadata says of the records; layers by name, in their order."""

    model_type: str
    dtype: str
    expert_format: str
    source_hash: str
    source_mtimes: dict[str, int]
    layers: dict[str, _LayerDescription]


def pack_head(index: CheckpointIndex, checksums: Sequence[Sequence[int]]) -> bytes:
    """Return how a pack begins, up to its first record; the length does not depend on the checksums' values.

    Parameters
    ----------
    index : CheckpointIndex
    checksums : sequence of sequence of int
        Of each layer's records.
    """
    description = _Description(
        model_type=index.model_type,
        dtype=dtype_name(index.dtype),
        expert_format=index.expert_dtype,
        source_hash=index.source_hash,
        source_mtimes=index.source_mtimes(),
        layers={
            layer.name: _LayerDescription(
                params=tuple(
                    _ParamDescription(
                        param.name, param.shape, dtype_name(param.dtype), param.offset_bytes, param.nbytes
                    )
                    for param in layer.params
                ),
                checksums=tuple(f"{checksum:016x}" for checksum in summed),
            )
            for layer, summed in zip(index.layers, checksums, strict=True)
        },
    )
    shapes = {layer.name: (layer.num_experts, layer.record_bytes) for layer in index.layers}
    return described(json.dumps(asdict(description), separators=(",", ":")), shapes)


def described(description: str, shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the head of a pack from what its metadata says, and by layer (experts, record_bytes)."""
    checksum = xxhash.xxh3_64_hexdigest(description.encode())
    metadata = {_VERSION: str(VERSION), _DESCRIPTION: description, _CHECKSUM: checksum}
    tensors = {name: ("U8", shape, math.prod(shape)) for name, shape in shapes.items()}
    return file_head(tensors, metadata, RECORD_ALIGN_BYTES)


def _read(file: Path) -> Pack:
    """Read and check the head of a pack file."""
    try:
        file_bytes = file.stat().st_size
        header = read_header(file)
    except OSError as error:
        raise PackError(f"cannot open the pack {file} ({error.strerror or error}). {FIX}") from error
    except SafetensorError as error:
        raise PackError(f"{file} is truncated, damaged or not an expert pack ({error!r:.200}). {FIX}") from error
    tensors = parse(header)
    metadata = tensors.pop(METADATA, None) or {}
    if _VERSION not in metadata:
        raise PackError(f"{file} is not an expert pack. {FIX}")
    if metadata[_VERSION] != str(VERSION):
        raise PackError(f"{file} has pack version {metadata[_VERSION]!r:.20}, this emoe reads version {VERSION}. {FIX}")
    description = metadata.get(_DESCRIPTION, "")
    if xxhash.xxh3_64_hexdigest(description.encode()) != metadata.get(_CHECKSUM):
        raise PackError(f"{file} has a damaged header: its checksum differs. {FIX}")
    try:
        return _parse(file, typed(_Description, parse(description)), tensors, LENGTH.size + len(header), file_bytes)
    except ValueError as error:
        raise PackError(f"{file} has a header that describes no pack ({error}). {FIX}") from error


def _parse(
    file: Path, description: _Description, tensors: Mapping[str, Any], data_offset: int, file_bytes: int
) -> Pack:
    """Return the pack; ValueError when the description contradicts itself or the file's tensors."""
    _require(len(description.layers) > 0, "it names no layer")
    _require(description.layers.keys() == tensors.keys(), "it names other layers than it has tensors")
    return Pack(
        path=file,
        model_type=description.model_type,
        dtype=_dtype(description.dtype),
        expert_format=description.expert_format,
        source_hash=description.source_hash,
        source_mtimes=description.source_mtimes,
        layers=tuple(
            _layer(number, name, layer, tensors[name], data_offset)
            for number, (name, layer) in enumerate(description.layers.items())
        ),
        file_bytes=file_bytes,
    )


def _layer(
    number: int, name: str, description: _LayerDescription, tensor: Mapping[str, Any], data_offset: int
) -> PackedLayer:
    _require(tensor["dtype"] == "U8" and len(tensor["shape"]) == 2, f"layer {number} is no table of bytes")
    num_experts, record_bytes = tensor["shape"]
    offset_bytes = data_offset + tensor["data_offsets"][0]
    whole_blocks = record_bytes % RECORD_ALIGN_BYTES == 0 and offset_bytes % RECORD_ALIGN_BYTES == 0
    _require(num_experts > 0 and record_bytes > 0 and whole_blocks, f"layer {number} has no whole records")
    _require(len(description.checksums) == num_experts, f"layer {number} has another number of checksums than experts")
    params = tuple(_param(param, record_bytes) for param in description.params)
    spec = MoeLayer(name, number, num_experts, params, record_bytes)
    return PackedLayer(spec, offset_bytes, tuple(int(checksum, 16) for checksum in description.checksums))


def _param(param: _ParamDescription, record_bytes: int) -> ParamSpec:
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
    if pack.expert_format != index.expert_dtype or tuple(layer.spec for layer in pack.layers) != index.layers:
        raise PackError(
            f"{pack.path} holds {dtype_name(pack.dtype)} records in another layout than {index.path} has as "
            f"{dtype_name(index.dtype)}. {FIX}"
        )
