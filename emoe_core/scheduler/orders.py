"""Schedulers that are an order: first come, due first.

They admit whenever there is room; which one is next is all that differs. Only `SloAware` (`slo_aware.py`) ever leaves a
place free.
"""

from __future__ import annotations

from operator import attrgetter

from emoe_core.scheduler.admission import MAX_BYPASSED, Situation, admit_in_order, require_bypasses
from emoe_core.scheduler.requests import ServiceRequest


class FirstComeFirstServed:
    """Order of arrival. One that does not fit holds up all behind it."""

    name = "fcfs"

    def choose(self, situation: Situation) -> list[ServiceRequest]:
        """Admit in order of arrival."""
        return admit_in_order(situation, situation.queue, 0, skip=False)


class EarliestDueFirst:
    """The one whose first token is due first (EDF)."""

    name = "edf"

    def __init__(self, max_bypassed: int = MAX_BYPASSED) -> None:
        self._max_bypassed = require_bypasses(max_bypassed)

    def choose(self, situation: Situation) -> list[ServiceRequest]:
        """Admit by due time."""
        order = sorted(situation.queue, key=attrgetter("due_s"))
        return admit_in_order(situation, order, self._max_bypassed, skip=True)
