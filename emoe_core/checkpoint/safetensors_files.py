"""The safetensors files of a checkpoint: where each tensor's bytes lie, and whether a file is whole.

A *shard* is one safetensors file: eight bytes with the header's length, a JSON header, then the tensors' bytes. Tensors
are read with plain reads into memory of their own, never through a mapping of the file: a mapped file would count
towards the process's resident memory, which this project measures. Which files of a directory count is the matter of
`emoe_core.checkpoint.weight_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from emoe_core.errors import CheckpointError
from emoe_core.files import parse

METADATA = "__metadata__"
LENGTH = struct.Struct("<Q")
"""How a file begins: the bytes of its header."""
SAMPLES_PER_SHARD = 64
SAMPLE_BYTES = 4096
# A cache line, and the widest vector of current processors.
ALIGNMENT = 64

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor of a checkpoint lies on disk; nothing is read until it is asked for.

    ``ref[...]`` reads the whole tensor, which is what transformers' own loader asks of a lazy tensor.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """Return the whole tensor, in its dtype on disk."""
        return self._read(self.offset_bytes, self.nbytes, self.shape)

    def read_row(self, row: int) -> torch.Tensor:
        """Return ``tensor[row : row + 1]``, shape ``[1, ...]``, reading only those bytes."""
        if not 0 <= row < self.shape[0]:
            raise IndexError(f"row {row} of {self.name} with {self.shape[0]} rows")
        row_bytes = self.nbytes // self.shape[0]
        return self._read(self.offset_bytes + row * row_bytes, row_bytes, (1, *self.shape[1:]))

    def __getitem__(self, key: EllipsisType) -> torch.Tensor:
        if key is not Ellipsis:
            raise TypeError("a TensorRef is read whole with [...] or by row with read_row()")
        return self.read()

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def _read(self, offset_bytes: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        out = empty_as_mapped(shape, self.dtype, offset_bytes)
        if nbytes == 0:
            return out
        view = byte_view(out)
        done = 0
        with self.file.open("rb", buffering=0) as stream:
            while done < nbytes:
                got = os.preadv(stream.fileno(), [view[done:]], offset_bytes + done)
                if got == 0:
                    raise CheckpointError(
                        f"{self.file} ended while reading {self.name}: the file was truncated. Fetch it again."
                    )
                done += got
        return out


def empty_as_mapped(shape: tuple[int, ...], dtype: torch.dtype, offset_bytes: int) -> torch.Tensor:
    """Return an empty CPU tensor that starts at the alignment which a mapping of the file would give it.

    Stock transformers computes with views of a mapped file where nothing needs a cast. Some math libraries round
    differently when an operand's address is aligned differently (MKL in float32 on processors without AVX-512: 8 bytes
    against 16), so bit-equality needs the same alignment, not only the same bytes.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    start = (offset_bytes - memory.data_ptr()) % ALIGNMENT
    # The format lets a tensor start anywhere; torch computes with whole elements only.
    start -= start % dtype.itemsize
    return memory[start : start + nbytes].view(dtype).view(shape)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor as writable memory, without a copy."""
    assert tensor.is_contiguous()
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True)
class Shard:
    """One safetensors file, with its tensors in the file's order; ``name`` is its path within the checkpoint."""

    name: str
    file: Path
    size_bytes: int
    mtime_ns: int
    data_offset_bytes: int
    header: bytes
    tensors: tuple[TensorRef, ...]


def file_head(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str], align_bytes: int = 8
) -> bytes:
    """Return how a safetensors file begins, up to its first tensor, for files too large to be made in memory.

    Parameters
    ----------
    tensors : mapping
        By name, in the order in which their bytes will follow: the format's name of the dtype, shape and bytes.
    metadata : mapping
    align_bytes : int
        Of what the head's length is a multiple; it is padded with spaces.
    """
    entries: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        start, end = end, end + nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    header = json.dumps(entries, separators=(",", ":")).encode()
    length = len(header) + -(LENGTH.size + len(header)) % align_bytes
    return LENGTH.pack(length) + header.ljust(length)


def read_header(file: Path) -> bytes:
    """Return the JSON header of a safetensors file that is whole and whose tensors neither overlap nor leave gaps.

    Raises
    ------
    OSError, SafetensorError
        When it cannot be read, or is no such file.
    """
    # Opened for its checks only: with this backend a slice costs reading the whole tensor, and the others map the file.
    with safe_open(file, framework="pt", backend="pread"), file.open("rb") as stream:
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        return stream.read(length)


def read_shard(file: Path, name: str | None = None) -> Shard:
    """Read and check one safetensors header; the tensors' bytes are not read. ``name``: see `Shard`.

    Raises
    ------
    CheckpointError
        When the file cannot be read, its header is malformed or its size is not what the header says.
    """
    try:
        stat = file.stat()
        header = read_header(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated, malformed or no safetensors file ({error!r:.200}). Fetch it again."
        ) from error
    data_offset = LENGTH.size + len(header)
    entries = parse(header)
    entries.pop(METADATA, None)
    tensors = tuple(_tensor(name, file, data_offset, entry) for name, entry in entries.items())
    return Shard(name or file.name, file, stat.st_size, stat.st_mtime_ns, data_offset, header, tensors)


def _tensor(name: str, file: Path, data_offset: int, entry: Mapping[str, Any]) -> TensorRef:
    """Return what a checked header says of one tensor."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {entry['dtype']}, a quantised format that emoe does not read "
            f"yet. Use the bfloat16 or float32 weights of this model."
        )
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if max(shape, default=0) >= 2**63:
        raise CheckpointError(f"{file} has a malformed tensor {name!r:.200} of shape {shape!s:.200}. Fetch it again.")
    return TensorRef(name, file, dtype, shape, data_offset + start, stop - start)


def tensors_by_name(shards: tuple[Shard, ...]) -> dict[str, TensorRef]:
    """Return every tensor once; where several shards hold one name the last counts, as in stock transformers."""
    return {ref.name: ref for shard in shards for ref in shard.tensors}


def fingerprint(shards: tuple[Shard, ...]) -> str:
    """Return a SHA-256 that names the weights: every shard's name, size, header, and samples of its bytes.

    The samples (64 pieces of 4 KiB a shard, evenly spread) tell two checkpoints of one architecture apart at the
    cost of a few reads. They do not notice every altered byte; the pack's checksums do, and modification times say
    when those must be compared again (see `emoe_core.loader.pack`).
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.size_bytes}\0{len(shard.header)}\0".encode())
        digest.update(shard.header)
        span = shard.size_bytes - shard.data_offset_bytes
        with shard.file.open("rb", buffering=0) as stream:
            for sample in range(SAMPLES_PER_SHARD):
                at = shard.data_offset_bytes + sample * max(span - SAMPLE_BYTES, 0) // (SAMPLES_PER_SHARD - 1)
                digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, at))
    return digest.hexdigest()
