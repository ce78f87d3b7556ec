"""Replicas behind a router, on paper: several simulated engines, and who gets which request.

The router is the one of a real service on several engines (`router.py`).

Between two arrivals only those replicas are simulated that have something to do, so thousands of replicas cost no more
than their requests do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from emoe_core.errors import OptionError
from emoe_core.scheduler import Request
from workbench.serving.simulation.router import Router
from workbench.serving.simulation.simulated_engine import Served, SimulatedEngine

Progress = Callable[[str, int, int], None]
PROGRESS_EVERY = 100


class Cluster:
    """Replicas and a router; one replica is a cluster of one.

    Parameters
    ----------
    replicas : sequence of SimulatedEngine
    router : str
        One of `router.ROUTERS`.
    slack : float
        Of "affinity", as a share of a full batch.
    """

    def __init__(self, replicas: Sequence[SimulatedEngine], router: str = "round_robin", slack: float = 0.0) -> None:
        if not replicas:
            raise OptionError("a cluster needs at least one replica")
        self.replicas = list(replicas)
        batch = max(replica.limits.max_requests for replica in self.replicas)
        self._router: Router[int] = Router(router, slack, batch)
        self._router.seat(range(len(self.replicas)))
        # Busy replicas by their clock, and answers to come by the moment they are done.
        self._due: list[tuple[float, int]] = []
        self._ends: list[tuple[float, int]] = []

    def run(self, requests: Sequence[tuple[Request, int]], progress: Progress | None = None) -> list[Served]:
        """Serve requests, given in order of arrival with their true output lengths; return records by number.

        Parameters
        ----------
        requests : sequence of (Request, int)
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

    def route(self, request: Request) -> int:
        """Return the replica that a request goes to."""
        return self._router.choose(lambda place: self.replicas[place].missing_for(request.task))

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
            self._router.count(heapq.heappop(self._ends)[1], -1)

    def _submit(self, place: int, request: Request, output_tokens: int) -> None:
        replica = self.replicas[place]
        was_idle = replica.idle
        replica.submit(request, output_tokens)
        if was_idle:
            heapq.heappush(self._due, (replica.clock_s, place))
        self._router.count(place, 1)
