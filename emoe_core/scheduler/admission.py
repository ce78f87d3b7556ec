"""What every scheduler shares: the protocol, the batch's limits, and the promise that nobody starves.

A scheduler is asked between steps which waiting requests to admit. Whatever order it prefers, no request is bypassed
more than ``max_bypassed`` times: once the oldest has been, it is next, and nobody else is admitted before it. Running
requests end, and a request that fits alone always fits in an empty batch, so every request is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from emoe_core.errors import OptionError
from emoe_core.scheduler.requests import BatchLimits, Request, WaitingQueue

MAX_BYPASSED = 100


@dataclass(frozen=True)
class SchedulingContext:
    """What a scheduler decides on.

    Attributes
    ----------
    now_s : float
        Of the same clock as the arrivals.
    queue : WaitingQueue
    running : sequence of Request
    limits : BatchLimits
    loading_s : callable
        dE of Eq. 3: seconds of loading that a request of a task would cause if it were admitted now.
    """

    now_s: float
    queue: WaitingQueue
    running: Sequence[Request]
    limits: BatchLimits
    loading_s: Callable[[str], float]


class Scheduler(Protocol):
    """Who is admitted next."""

    name: str

    def choose(self, context: SchedulingContext) -> list[Request]:
        """Return the waiting requests to admit now, in order; the caller takes them out of the queue.

        With nobody running and somebody waiting, at least one is chosen.
        """


class Admission:
    """One decision in the making: the room that is left, and whose turn it has become.

    Parameters
    ----------
    context : SchedulingContext
    max_bypassed : int
    """

    def __init__(self, context: SchedulingContext, max_bypassed: int) -> None:
        self.chosen: list[Request] = []
        self._taken: set[int] = set()
        limits = context.limits
        self.free_requests = limits.max_requests - len(context.running)
        self.free_tokens = limits.max_tokens - sum(request.reserved_tokens for request in context.running)
        self._queue = context.queue
        self._left = context.queue.left
        self._max_bypassed = max_bypassed
        self._arrivals: Iterator[Request] = iter(context.queue)
        self._oldest = next(self._arrivals, None)

    @property
    def full(self) -> bool:
        """Whether nobody else can be admitted now."""
        return self.free_requests < 1 or self._oldest is None

    def fits(self, request: Request) -> bool:
        """Return whether there is room for the request."""
        return self.free_requests > 0 and request.reserved_tokens <= self.free_tokens

    def waits(self, request: Request) -> bool:
        """Return whether the request has not been chosen yet."""
        return request.number not in self._taken

    def overdue(self) -> Request | None:
        """Return the oldest waiting request when it may not be bypassed again."""
        oldest = self._oldest
        if oldest is not None and self._queue.bypassed(oldest, self._left) >= self._max_bypassed:
            return oldest
        return None

    def admit(self, request: Request) -> None:
        """Choose a request."""
        self.chosen.append(request)
        self._taken.add(request.number)
        self._left += 1
        self.free_requests -= 1
        self.free_tokens -= request.reserved_tokens
        while self._oldest is not None and self._oldest.number in self._taken:
            self._oldest = next(self._arrivals, None)

    def admit_overdue(self) -> bool:
        """Choose those whose turn it has become; False when the next of them does not fit, so that all must wait."""
        while (request := self.overdue()) is not None:
            if not self.fits(request):
                return False
            self.admit(request)
        return True


def admit_in_order(
    context: SchedulingContext, order: Iterable[Request], max_bypassed: int, *, skip: bool
) -> list[Request]:
    """Admit in a given order while there is room; ``skip``: go on behind one that does not fit."""
    admission = Admission(context, max_bypassed)
    for request in order:
        if admission.full or not admission.admit_overdue():
            break
        if not admission.waits(request):
            continue
        if admission.fits(request):
            admission.admit(request)
        elif not skip:
            break
    return admission.chosen


def require_bypasses(count: int) -> int:
    """Return the largest number of bypasses, or raise `OptionError` when it is negative."""
    if count < 0:
        raise OptionError(f"max_bypassed is {count}: give 0 (order of arrival) or more")
    return count
