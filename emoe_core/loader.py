"""Loading experts into slots in the background, and lending them to forward passes.

`ExpertLoader` owns the slot memory, the residency table and a few reading threads. A forward pass of one layer takes
a `Lease` on the experts it will compute, in ascending order of expert id (the order in which the family's own eager
code computes and accumulates them):

* experts already resident are pinned at once, so that nothing can overwrite them before they are used;
* absent ones are requested ahead, in order, as far as evictable slots (and the spare one) reach;
* moving on to the next expert releases the previous one, whose slot may then take a later arrival.

So a layer with more active experts than slots streams them with the same arithmetic in the same order, and reading
overlaps computing. A lease cannot deadlock: everything it has in flight is used before whatever it still waits for.

On CUDA the threads read into pinned staging memory and copy on their own stream; the copy waits for the event that
the compute stream recorded when the slot was last released, and the thread, never the device, waits for the copy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from types import TracebackType

import torch

from .checkpoint import MoeLayer
from .metrics import Counters
from .slots import Entry, SlotTable
from .storage import Storage, aligned_buffer, unpin

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
    device : torch.device
        Where the slots live.
    threads : int
        Reading threads.

    Attributes
    ----------
    slot_bytes : int
        Bytes of device memory that the slots take, padding included; freed by `close`.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        storage: Storage,
        table: SlotTable,
        device: torch.device,
        threads: int = 2,
    ) -> None:
        self.layers = tuple(layers)
        self.storage = storage
        self.table = table
        self.device = device
        self.counters = Counters()
        self.stride_bytes = max(layer.record_bytes for layer in layers)
        self.slot_bytes = table.slots * self.stride_bytes
        self._memory = (
            aligned_buffer(self.slot_bytes)
            if device.type == "cpu"
            else torch.empty(self.slot_bytes, dtype=torch.uint8, device=device)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="emoe-load")
        self._loading: dict[tuple[int, int], Future[None]] = {}
        # Layers of one layout share the views of a slot, so that there are no more views than slots in most models.
        layouts = [layer.params for layer in self.layers]
        self._layout = [layouts.index(params) for params in layouts]
        self._views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._staging = threading.local()
        self._pinned: list[torch.Tensor] = []
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._released: dict[int, torch.cuda.Event] = {}
        self._counted_from = 0
        self._closed = False

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """Borrow experts (ascending, distinct) of one layer for one forward pass; use as a context manager."""
        return Lease(self, layer, experts)

    def tensors(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """Return the parameters of a resident expert as views of its slot, by name."""
        key = (self._layout[entry.layer], entry.slot)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self.layers[entry.layer].views(self._slot(entry))
        return views

    def record(self, entry: Entry) -> torch.Tensor:
        """Return the raw bytes of a resident expert (uint8, length ``record_bytes``), for verification."""
        return self._slot(entry)

    def fetch(self, layer: int, expert: int, *, may_use_spare: bool = True) -> Entry | None:
        """Start loading an absent expert; the entry comes back pinned. None when no slot can be had now.

        The caller counts it as a load or a prefetch.
        """
        self.reap()
        admitted = self.table.admit(layer, expert, may_use_spare=may_use_spare)
        if admitted is None:
            return None
        entry, evicted = admitted
        if evicted is not None:
            self._count_eviction(evicted)
        self.counters.bytes_loaded += self.layers[layer].record_bytes
        self._loading[(layer, expert)] = self._pool.submit(self._read, entry)
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
        error = self._arrived(entry, future)
        if error is not None:
            raise error

    def release(self, entry: Entry) -> None:
        """Unpin an expert once; on CUDA, note the point of the compute stream after which it may be overwritten."""
        assert entry.pins > 0, entry
        entry.pins -= 1
        if self._copy_stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._released[entry.slot] = event

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
            wanted = set(target[: self.table.capacity[layer]])
            for expert in target[: self.table.capacity[layer]]:
                if self.table.get(layer, expert) is not None:
                    continue
                while not self.table.room(layer):
                    self._make_room(layer, wanted)
                entry = self.fetch(layer, expert, may_use_spare=False)
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
        self.reap()

    def reap(self) -> None:
        """Mark arrived experts as ready. A prefetch that failed is dropped: the request that needs it will report."""
        for key, future in list(self._loading.items()):
            entry = self.table.get(*key)
            assert entry is not None
            # A pinned entry is somebody's to wait for, who must hear of a failure.
            if not future.done() or (entry.pins and future.exception() is not None):
                continue
            error = self._arrived(entry, future)
            if error is not None:
                logger.warning("reading ahead expert %d of MoE layer %d failed: %s", key[1], key[0], error)

    def recover(self) -> None:
        """Put the table in order after a forward pass that was interrupted anywhere: no pins, no spare slot lent."""
        if self._copy_stream is not None:
            torch.cuda.synchronize(self.device)
        for entry in self.table.entries():
            entry.pins = 0
        self.settle()
        for layer in range(len(self.layers)):
            self.return_spare(layer)

    def return_spare(self, layer: int) -> None:
        """Give back what a layer holds beyond its capacity."""
        while (extra := self.table.overdrawn(layer)) is not None:
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
        for buffer in self._pinned:
            unpin(buffer)
        self._pinned.clear()
        self._views.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.storage.close()

    def _slot(self, entry: Entry) -> torch.Tensor:
        start = entry.slot * self.stride_bytes
        return self._memory[start : start + self.layers[entry.layer].record_bytes]

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

    def _make_room(self, layer: int, wanted: set[int]) -> None:
        """Remove the oldest expert outside the plan, a ready one if possible: nothing then has to be waited for."""
        outside = [self.table.get(layer, expert) for expert in self.table.resident(layer) - wanted]
        oldest = min((entry for entry in outside if entry), key=lambda entry: (not entry.ready, entry.touched))
        wait_for([future for key, future in self._loading.items() if key == (layer, oldest.expert)])
        self.reap()
        if self.table.get(layer, oldest.expert) is oldest:
            self.evict(oldest)

    def _read(self, entry: Entry) -> None:
        target = self._slot(entry)
        if self._copy_stream is None:
            self.storage.read_into(entry.layer, entry.expert, target)
            return
        staging = getattr(self._staging, "record", None)
        if staging is None:
            staging = self._staging.record = aligned_buffer(self.stride_bytes, pin=True)
            self._pinned.append(staging)
        staged = staging[: target.numel()]
        self.storage.read_into(entry.layer, entry.expert, staged)
        with torch.cuda.stream(self._copy_stream):
            released = self._released.get(entry.slot)
            if released is not None:
                self._copy_stream.wait_event(released)
            target.copy_(staged, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._copy_stream)
        arrived.synchronize()


class Lease:
    """Experts of one layer, borrowed for one forward pass. ``lease[expert]`` gives its tensors, waiting if need be.

    Experts must be asked for in ascending order; asking for the same expert
    again (its second matrix) is free. An id outside the lease (chosen by padding alone) gets the current expert's
    tensors: the result goes to padding rows only, which attention masks.
    """

    def __init__(self, loader: ExpertLoader, layer: int, experts: Sequence[int]) -> None:
        assert list(experts) == sorted(set(experts)), experts
        self._loader = loader
        self._layer = layer
        self._held: dict[int, Entry] = {}
        self._absent: deque[int] = deque()
        self._order = tuple(experts)
        self._current: int | None = None
        for expert in experts:
            entry = loader.table.get(layer, expert)
            if entry is None:
                self._absent.append(expert)
                continue
            entry.pins += 1
            self._held[expert] = entry
        try:
            self._advance()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, expert: int) -> Mapping[str, torch.Tensor]:
        if expert != self._current:
            self._move_to(expert)
        assert self._current is not None
        return self._loader.tensors(self._held[self._current])

    def close(self) -> None:
        """Release everything and give borrowed spare slots back. Idempotent."""
        held = list(self._held.values())
        self._held.clear()
        self._absent.clear()
        for entry in held:
            self._loader.release(entry)
        if not all(entry.ready for entry in held):
            # An aborted pass: what is still arriving must be there before a spare slot can be given back.
            self._loader.settle()
        self._loader.return_spare(self._layer)

    def _move_to(self, expert: int) -> None:
        if expert not in self._held and expert not in self._absent:
            # Chosen by padding alone: any resident tensor will do.
            if self._current is None:
                self._move_to(self._order[0])
            return
        if self._current is not None and self._current < expert:
            self._loader.release(self._held.pop(self._current))
            self._current = None
        self._advance()
        entry = self._held.get(expert)
        assert entry is not None, f"expert {expert} was asked for out of order"
        self._current = expert
        self._loader.wait(entry)
        self._loader.table.touch(entry)

    def _advance(self) -> None:
        while self._absent:
            entry = self._loader.fetch(self._layer, self._absent[0])
            if entry is None:
                return
            self._held[self._absent.popleft()] = entry
            self._loader.counters.requests += 1
            self._loader.counters.loads += 1
