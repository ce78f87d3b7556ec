"""A loader that moves nothing, for replaying recorded routing through the engine's control loop.

It keeps the residency table as `ExpertLoader.swap` does and counts the bytes that swaps would have moved. It knows
neither files nor tensors, and does not load on demand except into slots that are still free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.loader.eviction import lru
from emoe_core.loader.slots import Entry, SlotTable
from emoe_core.metrics import Counters


@dataclass(frozen=True)
class _Layer:
    num_experts: int


class CountingLoader:
    """A loader that moves nothing: the residency table of `ExpertLoader.swap`, and counters.

    Parameters
    ----------
    layers, experts, slots : int
        MoE layers, experts of each, and slots of each.
    expert_bytes : int
        Bytes that one load moves.
    """

    def __init__(self, layers: int, experts: int, slots: int, expert_bytes: int) -> None:
        if not 1 <= slots <= experts:
            raise OptionError(f"{slots} slots a layer: give 1 to {experts}, the layer's experts")
        self.layers = tuple(_Layer(experts) for _ in range(layers))
        self.table = SlotTable([slots] * layers, 0, lru)
        self.counters = Counters()
        self.expert_bytes = expert_bytes

    def swap(self, targets: Sequence[Sequence[int]]) -> int:
        """Make each layer hold its target; residents outside it leave only for room, the longest unused first."""
        loads = 0
        for layer, target in enumerate(targets):
            for expert in target:
                if self.table.get(layer, expert) is None:
                    if not self.table.room(layer):
                        self._make_room(layer, set(target))
                    self._load(layer, expert)
                    loads += 1
        self.counters.prefetches += loads
        self.counters.swaps += 1
        return loads

    def serve(self, counts: np.ndarray) -> np.ndarray:
        """Let a prompt use the residents, and fill free slots with the first it asks for; return bool [L, E]."""
        resident = np.zeros(counts.shape, dtype=bool)
        for layer, row in enumerate(counts):
            for expert in np.flatnonzero(row).tolist():
                entry = self.table.get(layer, expert)
                if entry is None and self.table.room(layer):
                    entry = self._load(layer, expert)
                    self.counters.loads += 1
                if entry is not None:
                    self.table.touch(entry)
            resident[layer, list(self.table.resident(layer))] = True
        return resident

    def close(self) -> None:
        """Count as wasted what is left unused."""
        for entry in self.table.entries():
            self._count_waste(entry.served)

    def _load(self, layer: int, expert: int) -> Entry:
        admitted = self.table.allocate(layer, expert, may_use_staging=False)
        assert admitted is not None, "there is room"
        entry = admitted[0]
        entry.ready, entry.pins = True, 0
        self.counters.bytes_loaded += self.expert_bytes
        return entry

    def _make_room(self, layer: int, wanted: set[int]) -> None:
        outside = [self.table.get(layer, expert) for expert in self.table.resident(layer) - wanted]
        oldest = min((entry for entry in outside if entry), key=lambda entry: entry.touched)
        self._count_waste(oldest.served)
        self.table.evict(oldest)
        self.counters.evictions += 1

    def _count_waste(self, served: bool) -> None:
        if not served:
            self.counters.wasted_bytes += self.expert_bytes
