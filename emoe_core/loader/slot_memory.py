"""The memory behind the slots: one buffer on the device, views of it as parameters, and records written into it.

On the CPU storage reads straight into a slot. On CUDA it reads into pinned staging memory of the reading thread, and a
stream of its own copies; the copy waits for the event that the compute stream recorded when the slot was last
released, and the thread, never the device, waits for the copy.

`write` runs in reading threads, everything else in the thread that runs the model. Which expert may have which slot is
not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from emoe_core.checkpoint.index import MoeLayer
from emoe_core.loader.slots import Entry
from emoe_core.loader.storage import Storage, aligned_buffer, unpin


class SlotMemory:
    """Slots of one length on one device.

    Parameters
    ----------
    layers : sequence of MoeLayer
        Record layout of each MoE layer.
    storage : Storage
        Where records are read from.
    slots : int
    device : torch.device

    Attributes
    ----------
    stride_bytes : int
        Length of a slot: the longest record.
    total_bytes : int
        What all slots take, padding included; freed by `close`.
    """

    def __init__(self, layers: Sequence[MoeLayer], storage: Storage, slots: int, device: torch.device) -> None:
        self._layers = tuple(layers)
        self._storage = storage
        self._device = device
        self.stride_bytes = max(layer.record_bytes for layer in layers)
        self.total_bytes = slots * self.stride_bytes
        self._memory = (
            aligned_buffer(self.total_bytes)
            if device.type == "cpu"
            else torch.empty(self.total_bytes, dtype=torch.uint8, device=device)
        )
        # Layers of one layout share the views of a slot, so that there are no more views than slots in most models.
        layouts = [layer.params for layer in self._layers]
        self._layout = [layouts.index(params) for params in layouts]
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._staging = threading.local()
        self._pinned: list[torch.Tensor] = []
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._released: dict[int, torch.cuda.Event] = {}

    def tensors(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """Return the parameters of a resident expert as views of its slot, by name."""
        key = (self._layout[entry.layer], entry.slot)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._layers[entry.layer].views(self.record(entry))
        return views

    def record(self, entry: Entry) -> torch.Tensor:
        """Return the raw bytes of an expert's slot (uint8, length ``record_bytes``)."""
        start = entry.slot * self.stride_bytes
        return self._memory[start : start + self._layers[entry.layer].record_bytes]

    def samples(self, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the first two slots as parameters of a layer, to try arithmetic on before anything is loaded."""
        spec = self._layers[layer]
        starts = [slot * self.stride_bytes for slot in range(min(2, self.total_bytes // self.stride_bytes))]
        return [spec.views(self._memory[start : start + spec.record_bytes]) for start in starts]

    def write(self, entry: Entry) -> None:
        """Read an expert's record into its slot; return when it is there. Runs in a reading thread."""
        target = self.record(entry)
        if self._copy_stream is None:
            self._storage.read_into(entry.layer, entry.expert, target)
            return
        staging = getattr(self._staging, "record", None)
        if staging is None:
            staging = self._staging.record = aligned_buffer(self.stride_bytes, pin=True)
            self._pinned.append(staging)
        staged = staging[: target.numel()]
        self._storage.read_into(entry.layer, entry.expert, staged)
        with torch.cuda.stream(self._copy_stream):
            released = self._released.get(entry.slot)
            if released is not None:
                self._copy_stream.wait_event(released)
            target.copy_(staged, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._copy_stream)
        arrived.synchronize()

    def released(self, entry: Entry) -> None:
        """Note, on CUDA, the point of the compute stream after which the slot may be overwritten."""
        if self._copy_stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._released[entry.slot] = event

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self._copy_stream is not None:
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Free the slots and the staging memory; no thread may still write. Idempotent."""
        while self._pinned:
            unpin(self._pinned.pop())
        self._views.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)
