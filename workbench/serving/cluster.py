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
"""

from __future__ import annotations

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
            for replica in self.replicas:
                replica.advance(request.arrival_s)
            self.replicas[self.route(request)].submit(request, output_tokens)
            if progress is not None and (place % PROGRESS_EVERY == 0 or place + 1 == len(requests)):
                progress("arrivals", place + 1, len(requests))
        for replica in self.replicas:
            replica.advance()
        return sorted((record for replica in self.replicas for record in replica.served), key=lambda one: one.number)

    def route(self, request: ServiceRequest) -> int:
        """Return the replica that a request goes to."""
        if self.router == "round_robin":
            self._turn += 1
            return (self._turn - 1) % len(self.replicas)
        load = [replica.outstanding(request.arrival_s) for replica in self.replicas]
        places = range(len(self.replicas))
        if self.router == "least_loaded":
            return min(places, key=lambda place: (load[place], place))
        bound = min(load) + self.slack * max(replica.limits.max_requests for replica in self.replicas)
        near = [place for place in places if load[place] <= bound]
        missing = {place: self.replicas[place].missing_for(request.task) for place in near}
        return min(near, key=lambda place: (missing[place], load[place], place))
