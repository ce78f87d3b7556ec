"""Who gets a request: the routers of a simulated cluster (`cluster.py`) and of a real one (`serving/replicas`).

Routers see what a real one can: how many requests each replica has, and which experts it holds.

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

import heapq
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from emoe_core.errors import OptionError, require_known

ROUTERS = ("round_robin", "least_loaded", "affinity")
Replica = TypeVar("Replica", bound=Hashable)


class Router(Generic[Replica]):
    """Counts the unfinished requests of each replica and chooses between them; `seat` replicas first.

    Parameters
    ----------
    kind : str
        One of `ROUTERS`.
    slack : float
        Of "affinity", as a share of a full batch.
    batch : int
        Requests of a full batch.
    most : float
        A replica with so many unfinished requests is passed over while another has fewer.

    Raises
    ------
    OptionError
        When the kind is unknown or the slack below 0.
    """

    def __init__(self, kind: str, slack: float = 0.0, batch: int = 1, most: float = math.inf) -> None:
        require_known(kind, ROUTERS, "router")
        if not slack >= 0:
            raise OptionError(f"a slack of {slack} makes no sense; give 0 or more of a full batch")
        self.kind = kind
        self._slack_requests = slack * batch
        self._most = most
        self._turn = 0
        # Unfinished requests of each replica in order of seating; the same as a heap of (load, order, replica).
        self._load: dict[Replica, int] = {}
        self._seated: list[Replica] = []
        self._order: dict[Replica, int] = {}
        self._by_load: list[tuple[int, int, Replica]] = []

    def seat(self, replicas: Iterable[Replica]) -> None:
        """Take these as the replicas there are; who stays keeps its requests."""
        known = dict.fromkeys(replicas)
        if known.keys() == self._load.keys():
            return
        self._load = {replica: self._load.get(replica, 0) for replica in known}
        self._seated = list(self._load)
        self._order = {replica: place for place, replica in enumerate(self._seated)}
        self._by_load = [(load, self._order[replica], replica) for replica, load in self._load.items()]
        heapq.heapify(self._by_load)

    def choose(self, missing: Callable[[Replica], int]) -> Replica:
        """Return the replica that a request goes to; the caller counts it.

        Parameters
        ----------
        missing : callable
            How many of the experts that the request's task wants a replica lacks.
        """
        if self.kind == "round_robin":
            return self._next_in_turn()
        if self.kind == "least_loaded":
            return self._least_loaded()
        least = min(self._load.values())
        bound = max(least, min(least + self._slack_requests, self._most - 1))
        near = [replica for replica, load in self._load.items() if load <= bound]
        lacking = {replica: missing(replica) for replica in near}
        return min(near, key=lambda replica: (lacking[replica], self._load[replica], self._order[replica]))

    def count(self, replica: Replica, change: int) -> None:
        """Add to a replica's unfinished requests; nothing happens when it has gone."""
        if replica not in self._load:
            return
        self._load[replica] += change
        if self.kind == "least_loaded":
            heapq.heappush(self._by_load, (self._load[replica], self._order[replica], replica))

    def _next_in_turn(self) -> Replica:
        for _ in self._seated:
            replica = self._seated[self._turn % len(self._seated)]
            self._turn += 1
            if self._load[replica] < self._most:
                return replica
        return replica

    def _least_loaded(self) -> Replica:
        # Every change has put in a new entry; older ones of the same replica are out of date.
        while self._by_load[0][0] != self._load[self._by_load[0][2]]:
            heapq.heappop(self._by_load)
        return self._by_load[0][2]
