"""The memory behind the slots: one buffer on the device, views of it as parameters, and records written into it.

On the CPU storage reads straight into a slot. Where the device copies, a record comes from where it rests in pinned
host memory, or through one of two staging buffers of the reading thread: one is read into while the other is copied.
Three orders are kept, and nobody spins for them:

* a copy begins after the last computation that read its slot (`last_use`, asked when the slot is given away);
* the compute stream goes on after the copies whose slots it is about to read (`tensors`);
* a staging buffer is read into after the copy from it.

`write` runs in reading threads, everything else in the thread that runs the model. Which expert may have which slot is
not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emoe_core.checkpoint.index import MoeLayer, ParamSpec
from emoe_core.device import Device, aligned_buffer, short_of_memory
from emoe_core.loader.slots import Entry
from emoe_core.loader.storage import Storage


@dataclass
class _Staging:
    """Pinned memory of one reading thread, and the event of the last copy from it."""

    memory: torch.Tensor
    copied: Any = None


class SlotMemory:
    """Slots of one length on one device.

    Parameters
    ----------
    layers : sequence of MoeLayer
        Record layout of each MoE layer.
    storage : Storage
        Where records are read from.
    slots : int
    device : Device

    Attributes
    ----------
    stride_bytes : int
        Length of a slot: the longest record.
    total_bytes : int
        What all slots take, padding included; freed by `close`.

    Raises
    ------
    BudgetError
        When the device has no memory for them.
    """

    def __init__(self, layers: Sequence[MoeLayer], storage: Storage, slots: int, device: Device) -> None:
        self._records = tuple(layers)
        # How records lie in slots: a record is long enough for either layout.
        self._layers = tuple(layer.aligned(device.align_bytes) for layer in layers)
        self._storage = storage
        self._device = device
        self.stride_bytes = max(layer.record_bytes for layer in layers)
        self.total_bytes = slots * self.stride_bytes
        with short_of_memory(device, f"expert memory of {slots} slots", self.total_bytes):
            self._memory = device.allocate(self.total_bytes)
        # Layers of one layout share the views of a slot, so that there are no more views than slots in most models.
        layouts = [layer.params for layer in self._layers]
        self._layout = [layouts.index(params) for params in layouts]
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._staging = threading.local()
        self._pinned: list[torch.Tensor] = []
        # By slot: the copy that the compute stream has not waited for, and the end of the last computation with it.
        self._arrived: dict[int, Any] = {}
        self._used: dict[int, Any] = {}
        self._used_since: set[int] = set()

    def tensors(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """Return the parameters of a resident expert as views of its slot, by name, to be computed with from now on."""
        arrived = self._arrived.pop(entry.slot, None)
        if arrived is not None:
            self._device.wait(arrived)
        key = (self._layout[entry.layer], entry.slot)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._layers[entry.layer].views(self.record(entry))
        return views

    def record(self, entry: Entry) -> torch.Tensor:
        """Return the raw bytes of an expert's slot (uint8, length ``record_bytes``)."""
        start = entry.slot * self.stride_bytes
        return self._memory[start : start + self._records[entry.layer].record_bytes]

    def samples(self, layer: int) -> list[dict[str, torch.Tensor]]:
        """Return the first two slots as parameters of a layer, to try arithmetic on before anything is loaded."""
        spec = self._layers[layer]
        slots = range(min(2, self.total_bytes // self.stride_bytes))
        if self._device.copies:
            self._used_since.update(slots)
        starts = [slot * self.stride_bytes for slot in slots]
        return [spec.views(self._memory[start : start + spec.record_bytes]) for start in starts]

    def last_use(self, entry: Entry) -> Any | None:
        """Return the event after which an expert may be written into its slot; None: at once."""
        if entry.slot in self._used_since:
            self._used |= dict.fromkeys(self._used_since, self._device.record())
            self._used_since.clear()
        # It stays: the write may fail before anything waits, and then the next one has to.
        return self._used.get(entry.slot)

    def write(self, entry: Entry, after: Any | None) -> None:
        """Read an expert's record into its slot, or queue its copy, after an event. Runs in a reading thread."""
        layer, expert = entry.layer, entry.expert
        if not self._device.copies:
            self._storage.read_into(layer, expert, self.record(entry))
            return
        source = self._storage.in_place(layer, expert)
        if source is not None:
            self._arrived[entry.slot] = self._copy(entry, source, after)
            return
        staging = self._next_staging()
        source = staging.memory[: self._records[layer].record_bytes]
        self._storage.read_into(layer, expert, source)
        staging.copied = self._arrived[entry.slot] = self._copy(entry, source, after)

    def released(self, entry: Entry) -> None:
        """Note that an expert was computed with: its slot may be overwritten after what is queued by now."""
        if self._device.copies:
            self._used_since.add(entry.slot)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        self._device.synchronize()
        self._used_since.clear()
        self._used.clear()

    def close(self) -> None:
        """Free the slots and the staging memory; no thread may still write. Idempotent."""
        self._device.synchronize()
        while self._pinned:
            self._device.unpin(self._pinned.pop())
        self._views.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _copy(self, entry: Entry, record: torch.Tensor, after: Any | None) -> Any:
        """Queue the copies of a record's parameters, one where both layouts are the same; return their end's event."""
        there, here = self._layers[entry.layer], self._records[entry.layer]
        slot = self.record(entry)
        if there.params == here.params:
            return self._device.copy([(slot, record)], after)
        parts = zip(there.params, here.params, strict=True)
        pieces = [(_piece(slot, target), _piece(record, source)) for target, source in parts]
        return self._device.copy(pieces, after)

    def _next_staging(self) -> _Staging:
        """Return the calling thread's staging buffer whose turn it is, no longer copied from."""
        turns: list[_Staging] | None = getattr(self._staging, "turns", None)
        if turns is None:
            turns = self._staging.turns = []
        if len(turns) < 2:
            memory = aligned_buffer(self.stride_bytes)
            self._device.pin(memory)
            self._pinned.append(memory)
            turns.insert(0, _Staging(memory))
        staging = turns.pop(0)
        turns.append(staging)
        if staging.copied is not None:
            self._device.finish(staging.copied)
        return staging


def _piece(record: torch.Tensor, spec: ParamSpec) -> torch.Tensor:
    return record[spec.offset_bytes : spec.offset_bytes + spec.nbytes]
