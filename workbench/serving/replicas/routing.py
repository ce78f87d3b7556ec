"""Which replica gets a request: the simulation's router (`simulation/router.py`), asked by Ray Serve.

Serve's own seam is used (`ray.serve.request_router.RequestRouter`, an alpha interface that the pinned version has)
rather than a choice in the front: so Serve's bookkeeping stays whole (replicas that come, go or die, requests that are
sent again when a replica dies before it took them). It runs in the process of the front, the only one that sends
requests, which therefore knows every replica's unfinished requests without asking. What the replicas hold they tell
once a second (`record_routing_stats`).
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from workbench.serving.replicas.residency import Residency, missing_for
from workbench.serving.simulation.router import Router

RESIDENCY = "residency"
# Keyword of the call that a request is sent with.
TASK = "task"
# A client may go between the choice and the sending, of which Serve tells nothing: then the choice is forgotten.
UNSENT_S = 30.0


class TaskRouter(RequestRouter):
    """Asks a `Router` for one replica at a time, and tells it what begins and ends."""

    def initialize_state(self, **options: Any) -> None:
        """Take the options of `Router`; called by Serve."""
        self._router: Router[ReplicaID] = Router(**options)
        # By Serve's id of the request.
        self._sent: dict[str, ReplicaID] = {}
        self._unsent: dict[str, tuple[ReplicaID, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica; called by Serve, again when that one is full or dead."""
        self._forget_unsent()
        seated = {replica.replica_id: replica for replica in candidate_replicas}
        self._router.seat(seated)
        reports = {name: replica.routing_stats.get(RESIDENCY, Residency()) for name, replica in seated.items()}
        task = None
        if pending_request is not None:
            self._ended(pending_request.metadata.internal_request_id)
            task = pending_request.kwargs.get(TASK)
        chosen = self._router.choose(missing_for(task, reports))
        if pending_request is not None:
            # Counted at once: the next request may be routed before this one is sent.
            self._router.count(chosen, 1)
            self._unsent[pending_request.metadata.internal_request_id] = (chosen, time.monotonic())
        return [[seated[chosen]]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note that a replica took a request; called by Serve."""
        name = pending_request.metadata.internal_request_id
        if name in self._unsent:
            self._sent[name] = self._unsent.pop(name)[0]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request ended, however it did; called by Serve."""
        self._ended(internal_request_id)

    def _ended(self, name: str) -> None:
        chosen = self._sent.pop(name, None) or self._unsent.pop(name, (None, 0.0))[0]
        if chosen is not None:
            self._router.count(chosen, -1)

    def _forget_unsent(self) -> None:
        now_s = time.monotonic()
        for name in [name for name, (_, chosen_s) in self._unsent.items() if now_s - chosen_s > UNSENT_S]:
            self._ended(name)
