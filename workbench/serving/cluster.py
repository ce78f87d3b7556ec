"""Replicas behind a router, on paper: several simulated engines, and who gets which request.

Routers see what a real one could: how many requests each replica has, and which experts it holds.

round_robin
    In turn.
least_loaded
    The one with the fewest unfinished requests.
affinity
    The one whose residents lack the fewest of the task's experts, among those that are busier than the least loaded by
    at most ``slack`` of a full batch; ties go to the less loaded. 0 lets the fit decide between the least loaded only;
    more saves loading and fills batches unevenly. Without a bound, one task would queue while other replicas idle.

Between two arrivals only those replicas are simulated that have something to do, so thousands of replicas cost no more
than their requests do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from emoe_core.errors import OptionError
from emoe_core.scheduler import ServiceRequest
from workbench.serving.simulated_engine import Served, SimulatedEngine

ROUTERS = ("round_robin", "least_loaded", "affinity")
Progress = Callable[[str, int, int], None]
PROGRESS_EVERY = 100


class Cluster:
    """Replicas and a router; one replica is a cluster of one.

    Parameters
    ----------
    replicas : sequence of SimulatedEngine
    router : str
        One of `ROUTERS`.
    slack : float
        Of "affinity", as a share of a full batch.
    """

    def __init__(self, replicas: Sequence[SimulatedEngine], router: str = "round_robin", slack: float = 0.0) -> None:
        if router not in ROUTERS:
            raise OptionError(f"unknown router {router!r}: choose one of {', '.join(ROUTERS)}")
        if not replicas:
            raise OptionError("a cluster needs at least one replica")
        if slack < 0:
            raise OptionError(f"a slack of {slack} makes no sense; give 0 or more of a full batch")
        self.replicas = list(replicas)
        self.router = router
        self.slack = slack
        self._turn = 0
        # Unfinished requests of each replica, and the same as a heap of (load, replica).
        self._load = [0] * len(self.replicas)
        self._by_load = [(0, place) for place in range(len(self.replicas))]
        # Busy replicas by their clock, and answers to come by the moment they are done.
        self._due: list[tuple[float, int]] = []
        self._ends: list[tuple[float, int]] = []

    def run(self, requests: Sequence[tuple[ServiceRequest, int]], progress: Progress | None = None) -> list[Served]:
        """Serve requests, given in order of arrival with their true output lengths; return records by number.

        Parameters
        ----------
        requests : sequence of (ServiceRequest, int)
        progress : callable, optional
            Called with (stage, requests that have arrived, requests in all).

        Raises
        ------
        RequestTooLargeError
            When a request would not fit alone.
        """
        for place, (request, output_tokens) in enumerate(requests):
            self._advance(request.arrival_s)
            chosen = self.route(request)
            self._submit(chosen, request, output_tokens)
            if progress is not None and (place % PROGRESS_EVERY == 0 or place + 1 == len(requests)):
                progress("arrivals", place + 1, len(requests))
        self._advance(math.inf)
        return sorted((record for replica in self.replicas for record in replica.served), key=lambda one: one.number)

    def route(self, request: ServiceRequest) -> int:
        """Return the replica that a request goes to."""
        if self.router == "round_robin":
            self._turn += 1
            return (self._turn - 1) % len(self.replicas)
        if self.router == "least_loaded":
            return self._least_loaded()
        bound = min(self._load) + self.slack * max(replica.limits.max_requests for replica in self.replicas)
        near = [place for place, load in enumerate(self._load) if load <= bound]
        missing = {place: self.replicas[place].missing_for(request.task) for place in near}
        return min(near, key=lambda place: (missing[place], self._load[place], place))

    def _advance(self, now_s: float) -> None:
        """Simulate up to a moment those replicas that have something to do before it, and count who is done by then."""
        while self._due and self._due[0][0] < now_s:
            _, place = heapq.heappop(self._due)
            replica = self.replicas[place]
            known = len(replica.served)
            replica.advance(now_s)
            for record in replica.served[known:]:
                heapq.heappush(self._ends, (record.finished_s, place))
            if not replica.idle:
                heapq.heappush(self._due, (replica.clock_s, place))
        while self._ends and self._ends[0][0] <= now_s:
            self._count(heapq.heappop(self._ends)[1], -1)

    def _submit(self, place: int, request: ServiceRequest, output_tokens: int) -> None:
        replica = self.replicas[place]
        was_idle = replica.idle
        replica.submit(request, output_tokens)
        if was_idle:
            heapq.heappush(self._due, (replica.clock_s, place))
        self._count(place, 1)

    def _count(self, place: int, change: int) -> None:
        self._load[place] += change
        if self.router == "least_loaded":
            heapq.heappush(self._by_load, (self._load[place], place))

    def _least_loaded(self) -> int:
        # Every change has put in a new entry; older ones of the same replica are out of date.
        while self._by_load[0][0] != self._load[self._by_load[0][1]]:
            heapq.heappop(self._by_load)
        return self._by_load[0][1]
