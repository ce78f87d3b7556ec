"""Device memory for experts: fixed slots, who is in them, who may be evicted.

A *slot* is a page-aligned piece of one buffer, as long as the longest expert record. Each MoE layer may hold as many
experts as its *capacity*; ``staging`` slots belong to no layer and carry experts that are streamed through when every
resident of a layer is pinned. Slots are not bound to layers: capacities are counts, so an incoming expert is written
to a free slot and the table alone decides whose it is.

States of an entry: *loading* (bytes on their way), *ready*. A *pinned* entry is in use by a forward pass and is never
evicted. An entry remembers whether it ever served a request, so that waste can be counted.

This module moves no bytes and starts no threads; `loader.py` does. It is not thread-safe: only the thread that runs
the model changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Entry:
    """One resident expert. Clock values are ticks of the table, one per touch; ``forward`` numbers forward passes.

    ``staged`` tells that it came into a staging slot, its layer being full.
    """

    layer: int
    expert: int
    slot: int
    ready: bool = False
    pins: int = 0
    arrived: int = 0
    touched: int = 0
    uses: int = 0
    forward: int = -1
    staged: bool = False

    @property
    def served(self) -> bool:
        """Whether the expert has served a request since it was loaded."""
        return self.uses > 0


Policy = Callable[[Sequence[Entry], int], Entry | None]


class SlotTable:
    """The residency table: at most ``capacity[layer]`` experts a layer, plus ``staging`` streamed ones in all.

    Parameters
    ----------
    capacity : sequence of int
        Slots of each MoE layer, >= 1 each.
    staging : int
        Slots beyond the capacities, shared by all layers, used only while a forward pass has a layer pinned full.
    policy : callable
        Chooses who leaves a layer, given its entries that may and the number of the forward pass; None for nobody.
    """

    def __init__(self, capacity: Sequence[int], staging: int, policy: Policy) -> None:
        self.capacity = tuple(capacity)
        self.staging = staging
        self.policy = policy
        self.forward = 0
        self._clock = 0
        self._free = list(range(sum(self.capacity) + staging))[::-1]
        self._layers: list[dict[int, Entry]] = [{} for _ in self.capacity]

    @property
    def slots(self) -> int:
        """All slots, staging ones included."""
        return sum(self.capacity) + self.staging

    @property
    def clock(self) -> int:
        """The latest tick: whatever arrived later has a higher ``arrived``."""
        return self._clock

    def begin(self, layer: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Hear what a layer's pass needs: tokens that chose each expert, [E]. The policies here do not ask."""

    def resident(self, layer: int) -> set[int]:
        """Experts of a layer that are in a slot or on their way into one."""
        return set(self._layers[layer])

    def entries(self) -> Iterable[Entry]:
        """All entries, layer by layer."""
        for layer in self._layers:
            yield from layer.values()

    def get(self, layer: int, expert: int) -> Entry | None:
        """Return the expert's entry, or None when it is absent."""
        return self._layers[layer].get(expert)

    def room(self, layer: int) -> int:
        """Slots of the layer's own capacity that hold nothing."""
        return max(0, self.capacity[layer] - len(self._layers[layer]))

    def touch(self, entry: Entry) -> None:
        """Mark an expert as used now by the current forward pass."""
        self._clock += 1
        entry.touched = self._clock
        entry.uses += 1
        entry.forward = self.forward

    def victim(self, layer: int) -> Entry | None:
        """Return the entry to evict from a layer next, among ready and unpinned ones, or None.

        The policy chooses. Where it refuses and the layer is over its capacity, what came into a staging slot goes.
        """
        candidates = [entry for entry in self._layers[layer].values() if entry.ready and not entry.pins]
        if not candidates:
            return None
        chosen = self.policy(candidates, self.forward)
        if chosen is None and len(self._layers[layer]) > self.capacity[layer]:
            chosen = next((entry for entry in candidates if entry.staged), None)
        return chosen

    def allocate(self, layer: int, expert: int, *, may_use_staging: bool = True) -> tuple[Entry, Entry | None] | None:
        """Give an absent expert a slot, pinned and *loading*; evict by the policy when the layer is full.

        Returns
        -------
        (entry, evicted) or None
            None when nothing can be evicted and no staging slot is free: the caller must release something first.
        """
        assert expert not in self._layers[layer], (layer, expert)
        evicted, staged = None, False
        if not self.room(layer):
            evicted = self.victim(layer)
            if evicted is not None:
                staged = evicted.staged
                self.evict(evicted)
            elif may_use_staging and self._staged() < self.staging:
                staged = True
            else:
                return None
        self._clock += 1
        now = self._clock
        entry = Entry(layer, expert, self._free.pop(), pins=1, arrived=now, touched=now, forward=self.forward)
        entry.staged = staged
        self._layers[layer][expert] = entry
        return entry, evicted

    def evict(self, entry: Entry) -> None:
        """Remove an unpinned, ready expert and free its slot."""
        assert entry.ready, f"evicting an expert whose bytes are still arriving: {entry}"
        assert entry.pins == 0, f"evicting a pinned expert: {entry}"
        del self._layers[entry.layer][entry.expert]
        self._free.append(entry.slot)

    def discard(self, entry: Entry) -> None:
        """Remove an expert whose load failed, whatever its state, so that nobody can read the slot."""
        if self._layers[entry.layer].get(entry.expert) is entry:
            del self._layers[entry.layer][entry.expert]
            self._free.append(entry.slot)

    def beyond_capacity(self, layer: int) -> Entry | None:
        """Return the next entry that a layer must give back to return the staging slot, or None."""
        return self.victim(layer) if len(self._layers[layer]) > self.capacity[layer] else None

    def check(self) -> None:
        """Raise AssertionError when the table contradicts itself."""
        used = [entry.slot for entry in self.entries()]
        assert len(used) == len(set(used)), "two experts in one slot"
        assert len(used) + len(self._free) == self.slots, "a slot was lost"
        assert self._staged() <= self.staging, "more experts than slots"

    def _staged(self) -> int:
        return sum(max(0, len(layer) - self.capacity[index]) for index, layer in enumerate(self._layers))
