"""Who is served next: one protocol for the paper's scheduler (section 3.5) and for what it is compared with.

``fcfs`` order of arrival; ``edf`` due first; ``emoe`` Algorithm 1; ``emoe_no_loading`` the same with dE = 0. Oracle
lengths are no scheduler: the driver then tells the true length as the expected one.

A scheduler decides on a `Situation` and keeps no state and no clock, so that the engine's loop and a simulation run the
same one.
"""

from __future__ import annotations

from collections.abc import Callable

from emoe_core.errors import require_known
from emoe_core.scheduler.admission import MAX_BYPASSED, Scheduler, Situation
from emoe_core.scheduler.costs import CostsError, ServingCosts
from emoe_core.scheduler.orders import EarliestDueFirst, FirstComeFirstServed
from emoe_core.scheduler.requests import BatchLimits, Objective, RequestTooLargeError, ServiceRequest, WaitingQueue
from emoe_core.scheduler.slo_aware import SloAware

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
    "require_costs",
]

_COSTED: dict[str, Callable[[ServingCosts, int], Scheduler]] = {
    "emoe": SloAware,
    "emoe_no_loading": lambda costs, bypasses: SloAware(costs, bypasses, counts_loading=False),
}


# These are an order of what is known without measuring.
COSTLESS: dict[str, Callable[[int], Scheduler]] = {
    "fcfs": lambda bypasses: FirstComeFirstServed(),
    "edf": EarliestDueFirst,
}
SCHEDULERS = (*COSTLESS, *_COSTED)


def require_costs(name: str, costs: ServingCosts | None) -> ServingCosts:
    """Return the costs that a scheduler decides by, or raise `CostsError` where there are none."""
    if costs is None:
        raise CostsError(f"scheduler {name!r} decides by measured costs: measure them with `emoe model costs MODEL`")
    return costs


def make_scheduler(name: str, costs: ServingCosts | None, max_bypassed: int = MAX_BYPASSED) -> Scheduler:
    """Return a scheduler by name.

    Raises
    ------
    OptionError
        When there is none of that name.
    CostsError
        When it needs costs and there are none.
    """
    require_known(name, SCHEDULERS, "scheduler")
    if name in COSTLESS:
        return COSTLESS[name](max_bypassed)
    return _COSTED[name](require_costs(name, costs), max_bypassed)
