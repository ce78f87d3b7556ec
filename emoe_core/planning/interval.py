"""When to predict again: before every p-th request (paper, section 3.3), or when the plan stops fitting.

Terms
-----
coverage
    Of the choices that a finished request's router made, the share that the plan's experts cover, divided by the
    share that the best set of the same size in each layer would have covered: 1 is a plan made in hindsight. Being
    relative, it means the same for every model and budget.

A fixed interval costs a prediction and a swap even when nothing changed, and keeps a bad plan until the interval is
over. The adaptive one predicts when the mean coverage of the last few requests falls below a threshold.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.planning.planner import Plan

ADAPTIVE = "adaptive"
WINDOW = 8


class Interval(Protocol):
    """What the control loop asks: is a prediction due before this request?"""

    span: int

    def due(self, admitted: int) -> bool:
        """Return whether to predict before the request of this number (0 is the first) is served."""

    def predicted(self) -> None:
        """Take note that a prediction was made."""

    def served(self, coverage: float) -> None:
        """Take the coverage of a finished request, in [0, 1]."""


class FixedInterval:
    """Predict before every p-th admitted request; ``span`` is p."""

    def __init__(self, requests: int) -> None:
        if requests < 1:
            raise OptionError(f"interval is {requests}: predict every 1 or more requests, or give {ADAPTIVE!r}")
        self.span = requests

    def due(self, admitted: int) -> bool:
        """Return whether the request's number is a multiple of p."""
        return admitted % self.span == 0

    def predicted(self) -> None:
        """Do nothing: the clock is the request's number."""

    def served(self, coverage: float) -> None:
        """Do nothing."""


class AdaptiveInterval:
    """Predict when mean coverage falls below a threshold.

    The mean is over the last ``span`` requests since the latest prediction, so there are at least that many requests
    between predictions, and one bad prompt does not cause one. Until a plan was in force, every request is due.

    Parameters
    ----------
    threshold : float
        Coverage in (0, 1]; 1 predicts after every ``span`` requests.
    span : int
        Requests to average over.
    """

    def __init__(self, threshold: float, span: int = WINDOW) -> None:
        if not 0 < threshold <= 1:
            raise OptionError(f"min_coverage is {threshold}: it must lie in (0, 1]; 0.9 is usual")
        if span < 1:
            raise OptionError(f"the adaptive interval averages over {span} requests: give 1 or more")
        self.threshold = threshold
        self.span = span
        self._recent: deque[float] = deque(maxlen=span)
        self._planned = False

    def due(self, admitted: int) -> bool:
        """Return whether the last requests were covered too badly, or no plan was ever in force."""
        if not self._planned:
            return True
        return len(self._recent) == self.span and float(np.mean(self._recent)) < self.threshold

    def predicted(self) -> None:
        """Start a new average."""
        self._recent.clear()

    def served(self, coverage: float) -> None:
        """Take one request's coverage; it can only be measured once there is a plan."""
        self._planned = True
        self._recent.append(coverage)


def make_interval(interval: int | str, min_coverage: float = 0.9) -> Interval:
    """Return the interval for an option's value: a number of requests, or "adaptive"."""
    if interval == ADAPTIVE:
        return AdaptiveInterval(min_coverage)
    if isinstance(interval, bool) or not isinstance(interval, int):
        raise OptionError(f"interval is {interval!r}: give a number of requests, or {ADAPTIVE!r}")
    return FixedInterval(interval)


def coverage(plan: Plan, counts: np.ndarray) -> float | None:
    """Return how well a plan covered a request's choices, relative to the best sets of the same sizes.

    Parameters
    ----------
    plan : Plan
        Layers without demand (an empty set) are left out.
    counts : np.ndarray
        Choices per expert, [layers, experts].

    Returns
    -------
    float or None
        None when the request chose nothing in the planned layers.
    """
    covered = best = 0.0
    for layer, experts in enumerate(plan.experts):
        if experts:
            covered += float(counts[layer, list(experts)].sum())
            best += float(np.sort(counts[layer])[::-1][: len(experts)].sum())
    return covered / best if best else None
