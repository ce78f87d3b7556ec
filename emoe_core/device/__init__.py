"""The few things an engine asks of the device that it computes on, and the devices that do them: the CPU and CUDA.

`Device` is the contract, and what the CPU does: all is done when asked for, so there is nothing to wait for, and
storage reads straight into the slots. Where ``copies`` is set, slots are memory of another kind. They are filled by
copies on a stream of their own, beside the *compute stream* on which the thread that runs the model queues its work;
*events* order the two, and that thread waits for the device only in `to_host` and `synchronize`, which are counted.

What is copied, when, and after what is `loader/slot_memory.py`'s matter. No other module of this package asks torch for
CUDA. Another device (the tests' simulated one) joins by name in `KINDS`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from emoe_core.errors import BudgetError, OptionError, is_out_of_memory

# Of CUDA's host registration: memory that every device of the process may copy from.
_PORTABLE = 1
# A block of PyTorch's allocator starts at a multiple of 512 bytes, and an expert within stacked parameters of common
# sizes at one of this.
PARAM_ALIGN_BYTES = 256
Part = tuple[torch.Tensor, torch.Tensor]
"""Target and source of a copy: as many bytes each."""


class Device:
    """The contract; and the CPU.

    Attributes
    ----------
    kind : str
    torch_device : torch.device
        Where tensors of the model lie.
    copies : bool
        Whether slots are filled by copies on a stream, from pinned host memory.
    align_bytes : int or None
        Where the parameters of an expert start within a slot: at multiples of this, as the device's own allocations
        do. None: as the checkpoint's file has them, for stock computes from a mapping of it.
    host_waits : int
        How often the thread that runs the model has waited for the device.
    """

    kind = "cpu"
    copies = False
    align_bytes: int | None = None

    def __init__(self, torch_device: torch.device | None = None) -> None:
        self.torch_device = torch_device or torch.device("cpu")
        self.host_waits = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return memory for slots, uint8 [nbytes]."""
        return aligned_buffer(nbytes)

    def free_bytes(self) -> int | None:
        """Return how much memory is free, None where nobody knows."""
        return None

    def library_bytes(self) -> int:
        """Return what the device's libraries take beside all tensors: context, kernels, workspaces."""
        return 0

    def pin(self, buffer: torch.Tensor) -> None:
        """Let copies from a buffer of `aligned_buffer` run beside the host, until `unpin`."""

    def unpin(self, buffer: torch.Tensor) -> None:
        """Take `pin` back; no copy from the buffer may be on its way."""

    def copy(self, parts: Iterable[Part], after: Any | None) -> Any:
        """Queue copies from pinned memory on the copy stream, after an event; return the event of their end."""
        for target, source in parts:
            target.copy_(source)

    def record(self) -> Any:
        """Return the event of the end of all that was queued on the compute stream so far."""

    def wait(self, event: Any) -> None:
        """Let what is queued on the compute stream from now on wait for an event."""

    def finish(self, event: Any) -> None:
        """Wait for an event in a reading thread, without spinning."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return tensors on the host, with one wait for all of them."""
        return tensors

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host on the device, without a wait."""
        return tensor


class CudaDevice(Device):
    """One CUDA device, by index."""

    kind = "cuda"
    copies = True
    align_bytes = PARAM_ALIGN_BYTES

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        self._stream: torch.cuda.Stream | None = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._stream = self._stream or torch.cuda.Stream(self.torch_device)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def library_bytes(self) -> int:
        # Other processes' memory counts too: it is as little to be had.
        free, total = torch.cuda.mem_get_info(self.torch_device)
        beside_torch = total - free - torch.cuda.memory_reserved(self.torch_device)
        return max(0, beside_torch) + self._workspace_bytes()

    def pin(self, buffer: torch.Tensor) -> None:
        with torch.cuda.device(self.torch_device):
            code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE)
        if int(code) != 0:
            raise OptionError(
                f"CUDA cannot pin {buffer.nbytes:,} bytes of host memory (error {int(code)}). Raise the limit of "
                f"locked memory (ulimit -l) or load with a smaller budget."
            )

    def unpin(self, buffer: torch.Tensor) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())

    def copy(self, parts: Iterable[Part], after: torch.cuda.Event | None) -> torch.cuda.Event:
        assert self._stream is not None, "slots are allocated first"
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            for target, source in parts:
                target.copy_(source, non_blocking=True)
            return self._event(self._stream)

    def record(self) -> torch.cuda.Event:
        return self._event(torch.cuda.current_stream(self.torch_device))

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self.host_waits += 1
        torch.cuda.synchronize(self.torch_device)

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.host_waits += 1
        on_host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
        for target, tensor in zip(on_host, tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.torch_device).synchronize()
        return on_host

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    @staticmethod
    def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def _workspace_bytes(self) -> int:
        # What PyTorch gives cuBLAS for each stream unless CUBLAS_WORKSPACE_CONFIG says otherwise
        # (aten/src/ATen/cuda/CublasHandlePool.cpp): 32 MiB on Hopper, ":4096:2:16:8" elsewhere.
        return 4096 * 8 * 1024 if torch.cuda.get_device_capability(self.torch_device)[0] == 9 else 8320 * 1024


KINDS: dict[str, Callable[[torch.device], Device]] = {"cpu": Device, "cuda": CudaDevice}
"""What makes a device of each kind, given where tensors lie; `config.open_device` looks here."""


@contextlib.contextmanager
def short_of_memory(device: Device, what: str, nbytes: int) -> Iterator[None]:
    """Turn running out of memory into a BudgetError that says what is free."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error) and getattr(error, "errno", None) != errno.ENOMEM:
            raise
        free = device.free_bytes()
        told = "" if free is None else f", where {free:,} are free"
        raise BudgetError(
            f"{what} needs {nbytes:,} bytes on {device.torch_device}{told}: load with a smaller budget, or free memory "
            f"that other programs hold there."
        ) from error


def aligned_starts(sizes: Iterable[int], align_bytes: int = PARAM_ALIGN_BYTES) -> list[int]:
    """Return where parameters of these sizes (bytes) start, one after another, and at last where the last one ends."""
    starts, end = [], 0
    for size in sizes:
        starts.append(-(-end // align_bytes) * align_bytes)
        end = starts[-1] + size
    return [*starts, end]


def aligned_buffer(nbytes: int) -> torch.Tensor:
    """Return uint8 memory ``[nbytes]`` of the host that starts on a page: an anonymous mapping, zeros at first.

    Pages that are never touched cost no memory. The mapping lives as long as the tensor or a view of it.
    """
    if nbytes <= 0:
        raise ValueError(f"a buffer needs at least one byte, not {nbytes}")
    buffer = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    return buffer
