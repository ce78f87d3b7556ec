"""Loading experts into slots in the background, on demand or ahead of need.

`ExpertLoader` owns the residency table, the slot memory and a few reading threads. A forward pass of one layer takes a
`Lease` (`lease.py`) on the experts it will compute; a plan swaps residents between passes. How bytes get into a slot
is `slot_memory.py`'s; this module decides when, and counts.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch

from emoe_core.checkpoint.index import MoeLayer
from emoe_core.device import Device
from emoe_core.loader.lease import Lease
from emoe_core.loader.slot_memory import SlotMemory
from emoe_core.loader.slots import Entry, SlotTable
from emoe_core.loader.storage import Storage
from emoe_core.metrics import Counters
from emoe_core.timeline import Timeline

logger = logging.getLogger(__name__)


class ExpertLoader:
    """Slots, the threads that fill them, and the counters of both.

    Parameters
    ----------
    layers : sequence of MoeLayer
        Record layout of each MoE layer.
    storage : Storage
        Where records are read from.
    table : SlotTable
        Residency table; the loader is the only one that changes it.
    device : Device
        Where the slots live.
    threads : int
        Reading threads.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        storage: Storage,
        table: SlotTable,
        device: Device,
        threads: int = 2,
    ) -> None:
        self.layers = tuple(layers)
        self.storage = storage
        self.device = device
        self.table = table
        self.counters = Counters()
        self.timeline: Timeline | None = None
        self.memory = SlotMemory(self.layers, storage, table.slots, device)
        # Where nothing has to be read, queueing a copy costs less than handing it to a thread.
        at_once = device.copies and storage.rests_in_memory
        self._pool = _AtOnce() if at_once else ThreadPoolExecutor(threads, thread_name_prefix="emoe-load")
        self._loading: dict[tuple[int, int], Future[None]] = {}
        # Reads that ended and have not been looked at: the reading threads append, so that nobody has to ask them all.
        self._ended: deque[tuple[tuple[int, int], Future[None]]] = deque()
        self._counted_from = 0
        self._closed = False

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """Borrow experts (ascending, distinct) of one layer for one forward pass; use as a context manager."""
        return Lease(self, layer, experts)

    @property
    def slot_bytes(self) -> int:
        """Bytes of device memory that the slots take, padding included; freed by `close`."""
        return self.memory.total_bytes

    def tensors(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """Return the parameters of a resident expert as views of its slot, by name."""
        return self.memory.tensors(entry)

    def fetch(self, layer: int, expert: int, *, may_use_staging: bool = True) -> Entry | None:
        """Start loading an absent expert; the entry comes back pinned. None when no slot can be had now.

        The caller counts it as a load or a prefetch.
        """
        self.reap()
        admitted = self.table.allocate(layer, expert, may_use_staging=may_use_staging)
        if admitted is None:
            return None
        entry, evicted = admitted
        if evicted is not None:
            self._count_eviction(evicted)
        self.counters.bytes_loaded += self.layers[layer].record_bytes
        write = self.memory.write if self.timeline is None else self._recorded_write(self.timeline)
        key = (layer, expert)
        self._loading[key] = self._pool.submit(write, entry, self.memory.last_use(entry))
        self._loading[key].add_done_callback(lambda future: self._ended.append((key, future)))
        return entry

    def wait(self, entry: Entry) -> None:
        """Block until an expert's bytes have arrived; the time counts as stall. Raises what the read raised."""
        future = self._loading.get((entry.layer, entry.expert))
        if future is None:
            return
        if not future.done():
            started = time.perf_counter()
            try:
                # An interrupt leaves from here with the entry still loading: a thread is writing to its slot.
                wait_for([future])
            finally:
                self.counters.stall_s += time.perf_counter() - started
                if self.timeline is not None:
                    self.timeline.add("stall", started, layer=entry.layer, expert=entry.expert)
        error = self._arrived(entry, future)
        if error is not None:
            raise error

    def release(self, entry: Entry) -> None:
        """Unpin an expert once; it may be overwritten after what was queued with it by now."""
        assert entry.pins > 0, entry
        entry.pins -= 1
        self.memory.released(entry)

    def serve(self, entry: Entry) -> None:
        """Note that an expert serves a request now."""
        self.table.touch(entry)

    def evict(self, entry: Entry) -> None:
        """Remove a ready, unpinned expert and count it."""
        self.table.evict(entry)
        self._count_eviction(entry)

    def swap(self, targets: Sequence[Sequence[int]]) -> int:
        """Make each layer hold its target experts (a plan), between forward passes; return the loads started.

        Only what is missing is loaded, in the background: a forward pass that needs it first waits for it. Residents
        outside the target leave only when their slot is needed, oldest first.
        """
        started = time.perf_counter()
        self.reap()
        loads = 0
        for layer, target in enumerate(targets):
            wanted = target[: self.table.capacity[layer]]
            missing = [expert for expert in wanted if self.table.get(layer, expert) is None]
            leaving = self._leaving(layer, wanted) if missing else deque()
            for expert in missing:
                while not self.table.room(layer):
                    self._remove(leaving.popleft())
                entry = self.fetch(layer, expert, may_use_staging=False)
                assert entry is not None, "a plan never asks for more than the capacity"
                entry.pins -= 1
                self.counters.prefetches += 1
                loads += 1
        self.counters.swaps += 1
        self.counters.swap_s += time.perf_counter() - started
        return loads

    def settle(self) -> None:
        """Wait until nothing is on its way, without counting a stall; prefetches that failed are dropped."""
        wait_for(list(self._loading.values()))
        self._ended.clear()
        for key, future in list(self._loading.items()):
            self._look_at(key, future)

    def reap(self) -> None:
        """Mark arrived experts as ready. A prefetch that failed is dropped: the request that needs it will report."""
        while self._ended:
            key, future = self._ended.popleft()
            # Whoever waited for it has looked at it already.
            if self._loading.get(key) is future:
                self._look_at(key, future)

    def recover(self) -> None:
        """Put the table in order after a forward pass that was interrupted anywhere: no pins, no staging slot lent."""
        self.memory.synchronize()
        for entry in self.table.entries():
            entry.pins = 0
        self.settle()
        for layer in range(len(self.layers)):
            self.return_staging(layer)

    def empty(self, table: SlotTable) -> None:
        """Start over with empty slots, a table of as many, and new counters; between forward passes."""
        assert table.slots == self.table.slots, (table.slots, self.table.slots)
        self.recover()
        self.table = table
        self.reset_counters()

    def return_staging(self, layer: int) -> None:
        """Give back what a layer holds beyond its capacity."""
        while (extra := self.table.beyond_capacity(layer)) is not None:
            self.evict(extra)

    def reset_counters(self) -> None:
        """Start counting anew; residents stay, and what was loaded before is no longer anybody's waste."""
        self.counters = Counters()
        self._counted_from = self.table.clock

    def close(self) -> None:
        """Stop the threads, count what was never used as waste, free the slots, close the storage. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for entry in self.table.entries():
            self._count_waste(entry)
        self.memory.close()
        self.storage.close()

    def _recorded_write(self, timeline: Timeline) -> Callable[[Entry, Any], None]:
        """Return a write of a record that is asked for now and notes when it was read."""
        asked_s = time.perf_counter()

        def write(entry: Entry, after: Any) -> None:
            started = time.perf_counter()
            self.memory.write(entry, after)
            size = self.layers[entry.layer].record_bytes
            timeline.add("load", started, layer=entry.layer, expert=entry.expert, bytes=size, asked_s=asked_s)

        return write

    def _count_eviction(self, entry: Entry) -> None:
        self.counters.evictions += 1
        self._count_waste(entry)

    def _count_waste(self, entry: Entry) -> None:
        if not entry.served and entry.arrived > self._counted_from:
            self.counters.wasted_bytes += self.layers[entry.layer].record_bytes

    def _arrived(self, entry: Entry, future: Future[None]) -> BaseException | None:
        """Settle a finished read: the entry becomes ready, or its slot is freed and the error returned."""
        del self._loading[(entry.layer, entry.expert)]
        error = future.exception()
        if error is None:
            entry.ready = True
        else:
            self._count_waste(entry)
            self.table.discard(entry)
        return error

    def _look_at(self, key: tuple[int, int], future: Future[None]) -> None:
        """Settle a read that has ended, unless somebody waits for it, who must hear of a failure."""
        entry = self.table.get(*key)
        assert entry is not None
        if entry.pins and future.exception() is not None:
            return
        error = self._arrived(entry, future)
        if error is not None:
            logger.warning("reading ahead expert %d of MoE layer %d failed: %s", key[1], key[0], error)

    def _leaving(self, layer: int, wanted: Sequence[int]) -> deque[Entry]:
        """Return who is outside a plan, oldest first, but ready ones before all: they need not be waited for."""
        outside = self.table.resident(layer).difference(wanted)
        entries = [entry for expert in outside if (entry := self.table.get(layer, expert)) is not None]
        return deque(sorted(entries, key=lambda entry: (not entry.ready, entry.touched)))

    def _remove(self, entry: Entry) -> None:
        """Evict an expert between forward passes, after its bytes have arrived."""
        future = self._loading.get((entry.layer, entry.expert))
        if future is not None:
            wait_for([future])
            self._look_at((entry.layer, entry.expert), future)
        if self.table.get(entry.layer, entry.expert) is entry:
            self.evict(entry)


class _AtOnce(Executor):
    """Runs what it is given in the calling thread, before it returns."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # as in a thread: whoever waits for it is told
            future.set_exception(error)
        return future
