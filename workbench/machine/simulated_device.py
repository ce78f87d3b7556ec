"""A device that is simulated on the CPU: real tensors, copies that happen late, and a check of what orders them.

It stands in for CUDA where there is none (``device="simulated"``, known once this module is imported). What it computes
is the CPU's, bit for bit. What differs is when bytes arrive: a copy that was queued happens only when something waits
for it, or by chance (``seed``) somewhat earlier, as on a device whose copy stream lags behind. Computations happen
when they are asked for, so the other way round, a copy that overtakes a computation, would not show in results.

Therefore each stream's knowledge is followed as well. There are two streams in order each, so all that can be known
is "the first c computations and the first k copies are done": a vector clock of two numbers. Streams learn from events
that they wait for and, when something is queued, from the host; the host learns from what it waits for. A `Race` is

* a slot that is used before the copy into it is known to be done, or overwritten before its last use is;
* pinned memory that changes, or is unpinned, while a copy from it is not known to be done;
* a copy from memory that is not pinned.

Who uses slots, and when, is told by `used` (the tests watch every operation of torch); without that, uses go unchecked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from emoe_core.device import KINDS, PARAM_ALIGN_BYTES, Device, Part, aligned_buffer

Span = tuple[int, int]
# What memory holds before anything was copied there: not a number, in every floating-point dtype.
UNWRITTEN = 255


class Race(AssertionError):
    """Two uses of memory that nothing orders."""


@dataclass(frozen=True)
class Clock:
    """So many computations and copies, the first ones, are known to be done; an event is a clock."""

    computations: int = 0
    copies: int = 0

    def and_then(self, other: Clock) -> Clock:
        return Clock(max(self.computations, other.computations), max(self.copies, other.copies))


@dataclass
class _Copy:
    """Bytes of targets and sources, and what the sources held when it was queued; nothing once it is known to be done.

    As arrays: what the device does by itself is no operation of torch.
    """

    targets: list[np.ndarray]
    sources: list[np.ndarray]
    before: list[np.ndarray]


class SimulatedDevice(Device):
    """See the module's text.

    Parameters
    ----------
    torch_device : torch.device, optional
    seed : int
        Of the chance by which copies happen before they have to.
    early : float
        The chance, at each operation, that one more copy happens; 0: each as late as possible.
    memory_bytes : int or None
        What slots may take in all; None: no limit.

    Attributes
    ----------
    events : int
        How many events of the compute stream were recorded.
    races : list of str
        What was found: who reads ahead only logs what is raised.
    """

    kind = "simulated"
    copies = True
    align_bytes = PARAM_ALIGN_BYTES

    def __init__(
        self,
        torch_device: torch.device | None = None,
        seed: int = 0,
        early: float = 0.0,
        memory_bytes: int | None = None,
    ) -> None:
        super().__init__(torch_device)
        self.events = 0
        self.races: list[str] = []
        self._early = early
        self._chance = Random(seed)
        self._memory_bytes = memory_bytes
        self._lock = threading.RLock()
        self._memory: list[Span] = []
        self._pinned: dict[int, int] = {}
        self._copies: list[_Copy] = []
        self._happened = 0
        self._compared = 0
        self._compute, self._copy, self._host = Clock(), Clock(), Clock()
        # By bytes: the last computation that used them, and the last copy that wrote them.
        self._uses: dict[Span, int] = {}
        self._writes: dict[Span, int] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        free = self.free_bytes()
        if free is not None and nbytes > free:
            raise RuntimeError(f"simulated: out of memory, {nbytes} bytes were asked for")
        memory = aligned_buffer(nbytes).fill_(UNWRITTEN)
        self._memory.append(_span(memory))
        return memory

    def free_bytes(self) -> int | None:
        if self._memory_bytes is None:
            return None
        return self._memory_bytes - sum(stop - start for start, stop in self._memory)

    def pin(self, buffer: torch.Tensor) -> None:
        with self._lock:
            start, stop = _span(buffer)
            self._pinned[start] = stop

    def unpin(self, buffer: torch.Tensor) -> None:
        with self._lock:
            span = _span(buffer)
            del self._pinned[span[0]]
            for number, copy in enumerate(self._copies, 1):
                if number > self._host.copies and any(_meet(_array_span(source), span) for source in copy.sources):
                    raise self._race(f"memory is unpinned while copy {number} from it may be under way")

    def copy(self, parts: Iterable[Part], after: Clock | None) -> Clock:
        with self._lock:
            self._by_chance()
            parts = list(parts)
            # The host queues this now: what it knows to be done is done before.
            self._copy = self._copy.and_then(self._host).and_then(after or Clock())
            number = len(self._copies) + 1
            for target, source in parts:
                place = _span(source)
                if not any(start <= place[0] and place[1] <= stop for start, stop in self._pinned.items()):
                    raise self._race(f"copy {number} is from memory that is not pinned")
                for span, use in self._uses.items():
                    if _meet(span, _span(target)) and use > self._copy.computations:
                        raise self._race(f"copy {number} may overwrite a slot before computation {use} has used it")
                self._writes[_span(target)] = number
            targets, sources = ([tensor.numpy() for tensor in side] for side in zip(*parts, strict=True))
            self._copies.append(_Copy(targets, sources, [source.copy() for source in sources]))
            self._copy = self._copy.and_then(Clock(copies=number))
            return self._copy

    def record(self) -> Clock:
        with self._lock:
            self.events += 1
            self._by_chance()
            return self._compute

    def wait(self, event: Clock) -> None:
        with self._lock:
            self._by_chance()
            self._compute = self._compute.and_then(Clock(copies=event.copies))
            self._happen(event.copies)

    def finish(self, event: Clock) -> None:
        with self._lock:
            self._learn(event)

    def synchronize(self) -> None:
        with self._lock:
            self.host_waits += 1
            self._learn(self._compute.and_then(self._copy))

    def to_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._lock:
            self.host_waits += 1
            self._by_chance()
            self._learn(self._compute)
            return tuple(tensor.clone() for tensor in tensors)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned now."""
        return sum(stop - start for start, stop in self._pinned.items())

    def used(self, tensor: torch.Tensor) -> None:
        """Hear that the compute stream uses a tensor now, which may lie in slots; raise Race where it must not yet."""
        if not self.holds(tensor):
            return
        with self._lock:
            here = _span(tensor)
            self._compute = self._compute.and_then(Clock(copies=self._host.copies))
            for span, number in self._writes.items():
                if _meet(span, here) and number > self._compute.copies:
                    raise self._race(f"a slot is used before copy {number} into it is known to be done")
            self._compute = self._compute.and_then(Clock(self._compute.computations + 1))
            self._uses[here] = self._compute.computations

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in slots."""
        return any(start <= tensor.data_ptr() < stop for start, stop in self._memory)

    def _learn(self, event: Clock) -> None:
        """Let the host know that an event is past; from here on it may write where finished copies came from."""
        self._happen(event.copies)
        self._host = self._host.and_then(event)
        while self._compared < self._host.copies:
            self._compared += 1
            self._compare(self._compared)
            self._copies[self._compared - 1] = _Copy([], [], [])

    def _happen(self, until: int) -> None:
        """Let copies happen, in their order."""
        for number in range(self._happened + 1, until + 1):
            self._compare(number)
            copy = self._copies[number - 1]
            for target, source in zip(copy.targets, copy.sources, strict=True):
                target[:] = source
            self._happened = number

    def _compare(self, number: int) -> None:
        copy = self._copies[number - 1]
        for source, before in zip(copy.sources, copy.before, strict=True):
            if not np.array_equal(source, before):
                raise self._race(f"pinned memory was written while copy {number} from it may have been under way")

    def _race(self, told: str) -> Race:
        self.races.append(told)
        return Race(told)

    def _by_chance(self) -> None:
        if self._happened < len(self._copies) and self._chance.random() < self._early:
            self._happen(self._happened + 1)


def _span(tensor: torch.Tensor) -> Span:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _array_span(array: np.ndarray) -> Span:
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


KINDS.setdefault(SimulatedDevice.kind, SimulatedDevice)
