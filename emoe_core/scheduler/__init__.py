"""Who is served next: one protocol for the paper's scheduler (section 3.5) and for what it is compared with.

``fcfs`` order of arrival; ``edf`` due first; ``shortest`` shortest expected first; ``affine`` tasks together whose
experts are resident; ``emoe`` Algorithm 1; ``emoe_no_loading`` the same with dE = 0. Oracle lengths are no scheduler:
the driver then tells the true length as the expected one.

A scheduler decides on a `Situation` and keeps no state and no clock, so that the engine's loop and a simulation run the
same one.
"""

from __future__ import annotations

from collections.abc import Callable

from ..costs import ServingCosts
from ..errors import OptionError
from .admission import MAX_BYPASSED, Scheduler, Situation
from .orders import EarliestDueFirst, FirstComeFirstServed, ShortestExpectedFirst, TaskAffine
from .requests import BatchLimits, Objective, RequestTooLargeError, ServiceRequest, WaitingQueue
from .slo_aware import SloAware

__all__ = [
    "MAX_BYPASSED",
    "SCHEDULERS",
    "BatchLimits",
    "Objective",
    "RequestTooLargeError",
    "Scheduler",
    "ServiceRequest",
    "Situation",
    "WaitingQueue",
    "make_scheduler",
]

_MAKERS: dict[str, Callable[[ServingCosts, int], Scheduler]] = {
    "fcfs": lambda costs, bypasses: FirstComeFirstServed(),
    "edf": lambda costs, bypasses: EarliestDueFirst(bypasses),
    "shortest": ShortestExpectedFirst,
    "affine": lambda costs, bypasses: TaskAffine(bypasses),
    "emoe": SloAware,
    "emoe_no_loading": lambda costs, bypasses: SloAware(costs, bypasses, counts_loading=False),
}
SCHEDULERS = tuple(_MAKERS)


def make_scheduler(name: str, costs: ServingCosts, max_bypassed: int = MAX_BYPASSED) -> Scheduler:
    """Return a scheduler by name; `OptionError` when there is none of it."""
    if name not in _MAKERS:
        raise OptionError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
    return _MAKERS[name](costs, max_bypassed)
