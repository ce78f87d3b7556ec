"""What an engine did and when: requests, predictions, swaps, forward passes, loads and stalls, as plain events.

Off unless asked for (`Engine.timeline`): an engine without a timeline reads no clock for it. Moments are seconds of
``time.perf_counter``; loads are recorded by the threads that read. What becomes of the events is the caller's matter.

Kinds of events and their details
---------------------------------
request
    From admission to the end: ``request`` (number), ``task``, ``input_tokens``.
prediction
    Asking the predictor and planning: ``tasks``.
swap
    Asking for the experts of a plan, which then arrive in the background: ``loads``.
pass
    One forward pass: ``requests``, ``prefill``, ``tokens`` (padding included).
load
    One expert read into a slot: ``layer``, ``expert``, ``bytes``, ``asked_s`` (when it was asked for).
stall
    The pass waiting for an expert: ``layer``, ``expert``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something with a beginning and an end."""

    kind: str
    started_s: float
    ended_s: float
    details: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_s - self.started_s


@dataclass
class Timeline:
    """Events in the order in which they ended.

    ``epoch_s`` is what turns a moment into the time of day: ``moment + epoch_s`` is seconds since 1970.
    """

    events: list[Event] = field(default_factory=list)
    epoch_s: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def add(self, kind: str, started_s: float, **details: Any) -> None:
        """Record an event that ends now; may be called from any thread."""
        self.events.append(Event(kind, started_s, time.perf_counter(), details))

    def of(self, kind: str) -> list[Event]:
        """Return the events of a kind."""
        return [event for event in self.events if event.kind == kind]
