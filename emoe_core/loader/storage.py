"""The tiers that experts rest in: a packed file on disk, or host memory. Both fill a given buffer with a record.

The packed file is read with O_DIRECT where the file system allows it: reads then cost what the disk costs and leave no
copy in the page cache, which would be memory that nobody budgeted. Where it is refused, plain reads serve, and
`PackedFile.fallback_reason` says why; such a run may measure the page cache. Reads release the interpreter lock and
may run in many threads at once.

Storage knows nothing of slots, residency or policies.
"""

from __future__ import annotations

import os
import threading
from io import FileIO
from typing import Literal, Protocol, get_args

import torch

from emoe_core.checkpoint.safetensors_files import byte_view
from emoe_core.device import Device, aligned_buffer
from emoe_core.errors import PackError, require_known
from emoe_core.loader.direct_io import PAGE_BYTES, open_direct
from emoe_core.loader.pack import Pack, Progress, truncated

Verify = Literal["first", "always", "never"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


class Storage(Protocol):
    """Where records come from."""

    @property
    def description(self) -> str:
        """One line for people: what the tier is and how it is read."""

    @property
    def bytes_read(self) -> int:
        """Bytes handed out since opening, padding included."""

    @property
    def rests_in_memory(self) -> bool:
        """Whether `in_place` hands out records."""

    def record_bytes(self, layer: int) -> int:
        """Return the size of a record of this MoE layer."""

    def read_into(self, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fill ``out`` (uint8, at least ``record_bytes(layer)`` long, page aligned, on the CPU) with a record."""

    def in_place(self, layer: int, expert: int) -> torch.Tensor | None:
        """Hand out a record where it rests (uint8), for copies straight to a device; None where it must be read."""

    def close(self) -> None:
        """Release files and memory; reading afterwards is an error."""


class _Checked:
    """Counts bytes and verifies records: on the first read of each expert, on every read, or never."""

    rests_in_memory = False

    def __init__(self, pack: Pack, verify: Verify) -> None:
        require_known(verify, VERIFY, "verify")
        self.pack = pack
        self.verify: Verify = verify
        self._lock = threading.Lock()
        self._verified: set[tuple[int, int]] = set()
        self._bytes_read = 0
        self._closed = False

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def record_bytes(self, layer: int) -> int:
        return self.pack.layers[layer].spec.record_bytes

    def in_place(self, layer: int, expert: int) -> torch.Tensor | None:
        return None

    def _target(self, layer: int, expert: int, out: torch.Tensor) -> memoryview:
        self._require_open()
        packed = self.pack.layers[layer]
        if not 0 <= expert < packed.spec.num_experts:
            raise IndexError(f"expert {expert} of layer {layer} with {packed.spec.num_experts} experts")
        if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError("a record is read into a contiguous one-dimensional uint8 tensor on the CPU")
        size = packed.spec.record_bytes
        if out.numel() < size:
            raise ValueError(f"a record of layer {layer} has {size} bytes, the buffer {out.numel()}")
        return byte_view(out)[:size]

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the storage is closed")

    def _account(self, layer: int, expert: int, record: memoryview) -> None:
        with self._lock:
            self._bytes_read += len(record)
            check = self.verify == "always" or (self.verify == "first" and (layer, expert) not in self._verified)
        if check:
            self.pack.check_record(layer, expert, record)
            with self._lock:
                self._verified.add((layer, expert))


class PackedFile(_Checked):
    """Records read from the pack on disk.

    Parameters
    ----------
    pack : Pack
    direct : bool
        Read past the page cache (O_DIRECT) where the file system allows it.
    verify : {"first", "always", "never"}
        When to compare a record's checksum; a mismatch raises PackError.

    Attributes
    ----------
    direct : bool
        Whether reads are in fact direct.
    fallback_reason : str or None
        Why they are not, although asked for.
    """

    def __init__(self, pack: Pack, direct: bool = True, verify: Verify = "first") -> None:
        super().__init__(pack, verify)
        self.direct = False
        self.fallback_reason: str | None = None
        # A file object, not its number: whatever cuts the opening short, the file closes with its owner.
        self._file: FileIO | None = None
        if direct:
            self._file, self.fallback_reason = open_direct(self.pack.path)
            self.direct = self._file is not None
        if self._file is None:
            self._file = self._open()

    @property
    def description(self) -> str:
        how = "direct reads" if self.direct else "buffered reads"
        why = f" ({self.fallback_reason})" if self.fallback_reason else ""
        return f"packed file {self.pack.path}, {how}{why}"

    def read_into(self, layer: int, expert: int, out: torch.Tensor) -> None:
        view = self._target(layer, expert, out)
        if self.direct and out.data_ptr() % PAGE_BYTES != 0:
            raise ValueError("direct reads need page-aligned memory: make the buffer with aligned_buffer()")
        packed = self.pack.layers[layer]
        offset = packed.record_offset(expert)
        assert self._file is not None
        descriptor = self._file.fileno()
        done = 0
        while done < len(view):
            # After a short direct read the rest may start off a page, which O_DIRECT refuses: step back to the page.
            done -= done % PAGE_BYTES if self.direct else 0
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if got == 0 or (self.direct and got < PAGE_BYTES and done + got < len(view)):
                raise truncated(self.pack.path, packed.spec, expert)
            done += got
        self._account(layer, expert, view)

    def close(self) -> None:
        self._closed = True
        if self._file is not None:
            self._file.close()

    def _open(self) -> FileIO:
        try:
            return FileIO(self.pack.path)
        except OSError as error:
            raise PackError(f"cannot open the pack {self.pack.path}: {error.strerror}") from error


class HostMemory(_Checked):
    """All records held in host memory, read once from the pack; pinned where a device copies from it.

    With everything in memory this tier is an upper bound for any disk.
    """

    rests_in_memory = True

    def __init__(
        self, pack: Pack, device: Device | None = None, verify: Verify = "first", progress: Progress | None = None
    ) -> None:
        super().__init__(pack, verify)
        self._device = device or Device()
        self.pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)
        sizes = [layer.spec.num_experts * layer.spec.record_bytes for layer in pack.layers]
        self._starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
        source = PackedFile(pack, verify="never" if verify == "never" else "first")
        total = sum(layer.spec.num_experts for layer in pack.layers)
        try:
            self._memory = aligned_buffer(sum(sizes))
            if self._device.copies:
                self._device.pin(self._memory)
                self.pinned = True
            done = 0
            for layer, packed in enumerate(pack.layers):
                for expert in range(packed.spec.num_experts):
                    source.read_into(layer, expert, self.record(layer, expert))
                    done += 1
                    if progress is not None:
                        progress(done, total)
        except BaseException:
            self.close()
            raise
        finally:
            source.close()
        if verify == "first":
            self._verified = {
                (layer, expert) for layer, packed in enumerate(pack.layers) for expert in range(packed.spec.num_experts)
            }

    @property
    def description(self) -> str:
        return f"host memory, {self._memory.numel():,} bytes{', pinned' if self.pinned else ''}"

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """Return a record in place (uint8 ``[record_bytes]``)."""
        size = self.record_bytes(layer)
        start = self._starts[layer] + expert * size
        return self._memory[start : start + size]

    def read_into(self, layer: int, expert: int, out: torch.Tensor) -> None:
        view = self._target(layer, expert, out)
        out[: len(view)].copy_(self.record(layer, expert))
        self._account(layer, expert, view)

    def in_place(self, layer: int, expert: int) -> torch.Tensor:
        self._require_open()
        record = self.record(layer, expert)
        self._account(layer, expert, byte_view(record))
        return record

    def close(self) -> None:
        if not self._closed and self.pinned:
            self._device.unpin(self._memory)
        self._closed = True
        self._memory = torch.empty(0, dtype=torch.uint8)
