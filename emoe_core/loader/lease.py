"""Lending experts to one forward pass of one layer.

A `Lease` covers the experts that the pass will compute, in ascending order of expert id (the order in which the
family's own eager code computes and accumulates them):

* experts already resident are pinned at once, so that nothing can overwrite them before they are used;
* absent ones are requested ahead, in order, as far as evictable slots (and the staging one) reach;
* moving on to the next expert releases the previous one, whose slot may then take a later arrival.

``lease[expert]`` goes through them in ascending order; `Lease.take` takes them as they are ready, resident ones first.
So a layer with more active experts than slots streams them with the same arithmetic, and reading overlaps
computing. A lease cannot deadlock: everything it has in flight is used before whatever it still waits for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from emoe_core.loader.slots import Entry

if TYPE_CHECKING:
    from emoe_core.loader.loader import ExpertLoader


class Lease:
    """Experts of one layer, borrowed for one forward pass. ``lease[expert]`` gives its tensors, waiting if need be.

    Use either `take` alone, or ask for experts in ascending order; asking for the same expert
    again (its second matrix) is free. An id outside the lease (chosen by padding alone) gets the current expert's
    tensors: the result goes to padding rows only, which attention masks.
    """

    def __init__(self, loader: ExpertLoader, layer: int, experts: Sequence[int]) -> None:
        assert list(experts) == sorted(set(experts)), experts
        self._loader = loader
        self._layer = layer
        self._held: dict[int, Entry] = {}
        # All ascending: who waits for a slot, and who has one and was not taken, resident at first or fetched since.
        self._absent: deque[int] = deque()
        self._resident: deque[int] = deque()
        self._fetched: deque[int] = deque()
        self.order = tuple(experts)
        self._current: int | None = None
        for expert in experts:
            entry = loader.table.get(layer, expert)
            if entry is None:
                self._absent.append(expert)
                continue
            entry.pins += 1
            self._held[expert] = entry
            self._resident.append(expert)
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

    def take(self, lowest: bool = False) -> tuple[int, Mapping[str, torch.Tensor]] | None:
        """Return an expert not taken yet and its tensors, or None after the last; the one before is released.

        Parameters
        ----------
        lowest : bool
            True: the lowest expert that is left. False: the lowest that had a slot when the lease began; after
            these the lowest that had none. The order does not depend on when reads end, so neither does what is
            evicted.
        """
        loader = self._loader
        if self._current is not None:
            loader.release(self._held.pop(self._current))
            self._current = None
        self._advance()
        queues = [queue for queue in (self._resident, self._fetched) if queue]
        if not queues:
            assert not self._absent, "a lease without pins can always load"
            return None
        # Absent experts are asked for in ascending order; the staging slot serves the first: the lowest one is held.
        expert = (min(queues, key=lambda queue: queue[0]) if lowest else queues[0]).popleft()
        entry = self._held[expert]
        self._current = expert
        loader.wait(entry)
        loader.serve(entry)
        return expert, loader.tensors(entry)

    def close(self) -> None:
        """Release everything and give the staging slot back. Idempotent."""
        held = list(self._held.values())
        for part in (self._held, self._absent, self._resident, self._fetched):
            part.clear()
        for entry in held:
            self._loader.release(entry)
        if not all(entry.ready for entry in held):
            # An aborted pass: what is still arriving must be there before a staging slot can be given back.
            self._loader.settle()
        self._loader.return_staging(self._layer)

    def _move_to(self, expert: int) -> None:
        if expert not in self._held and expert not in self._absent:
            # Chosen by padding alone: any resident tensor will do.
            if self._current is None:
                self._move_to(self.order[0])
            return
        if self._current is not None and self._current < expert:
            self._loader.release(self._held.pop(self._current))
            self._current = None
        self._advance()
        entry = self._held.get(expert)
        assert entry is not None, f"expert {expert} was asked for out of order"
        self._current = expert
        self._loader.wait(entry)
        self._loader.serve(entry)

    def _advance(self) -> None:
        while self._absent:
            entry = self._loader.fetch(self._layer, self._absent[0])
            if entry is None:
                return
            self._held[self._absent[0]] = entry
            self._fetched.append(self._absent.popleft())
            self._loader.counters.lookups += 1
            self._loader.counters.loads += 1
