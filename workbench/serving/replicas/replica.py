"""One replica: an engine and the worker of `emoe serve`, as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric

import emoe_core
from emoe_core.errors import ExperimentError
from emoe_core.scheduler import BatchLimits
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.serving.records import Answer
from workbench.machine.environment import code_hash
from workbench.serving.orders import make_scheduler
from workbench.serving.replicas.residency import Residency, look
from workbench.serving.replicas.routing import RESIDENCY
from workbench.serving.server.backend import WorkerExchange
from workbench.serving.server.limits import ApiError, ServerLimits
from workbench.serving.server.metrics import ServerMetrics
from workbench.serving.server.protocol import Wanted
from workbench.serving.server.served_model import ServedModel, served_model
from workbench.serving.server.worker import Event, Worker


@dataclass(frozen=True)
class ReplicaConfig:
    """What every replica is made of; sent to its node.

    Attributes
    ----------
    model : str
        A checkpoint directory that every node has at this path.
    name : str
        What clients call it.
    engine : dict
        Options of `emoe_core.load`.
    scheduler : str
    costs : ServingCosts or None
        Where the scheduler needs them.
    limits : ServerLimits
        Of each replica.
    kv_tokens : int
    code : str
        `code_hash` of the front.
    """

    model: str
    name: str
    engine: dict[str, Any]
    scheduler: str
    costs: ServingCosts | None
    limits: ServerLimits
    kv_tokens: int
    code: str


@dataclass(frozen=True)
class ReplicaMetrics:
    """The metrics of one replica, and where it runs."""

    replica: str
    node: str
    process: int
    families: list[Metric]


class EngineReplica:
    """An engine that serves; Ray Serve calls every method.

    Raises
    ------
    ExperimentError
        When the node has other code.
    """

    def __init__(self, config: ReplicaConfig) -> None:
        if config.code != code_hash():
            raise ExperimentError(
                f"node {os.uname().nodename} has another version of this code: install the same one on every node"
            )
        self._metrics = ServerMetrics()
        self._served: Counter[str] = Counter()
        self._engine = emoe_core.load(config.model, **config.engine)
        self._worker = Worker(
            self._engine,
            served_model(self._engine, config.name),
            make_scheduler(config.scheduler, config.costs),
            config.limits,
            BatchLimits(config.limits.max_batch, config.kv_tokens),
            self._metrics,
            config.costs,
        )
        self._worker.start()

    async def answer(self, wanted: Wanted, task: str) -> AsyncIterator[Event]:
        """Yield a request's tokens, then its answer; or an error, which is the last. ``task`` is for the router."""
        exchange = None
        try:
            exchange = WorkerExchange(self._worker, wanted)
            while True:
                event = await exchange.next()
                if isinstance(event, Answer):
                    self._served[task] += 1
                yield event
                if isinstance(event, Answer):
                    return
        except ApiError as error:
            yield error
        finally:
            # Serve ends this generator where the client has gone.
            if exchange is not None:
                exchange.close()

    async def served(self) -> ServedModel:
        """Return what the front must know of the model."""
        return self._worker.served

    async def metrics(self) -> ReplicaMetrics:
        """Return this replica's metrics."""
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        return ReplicaMetrics(name, os.uname().nodename, os.getpid(), self._metrics.families())

    async def record_routing_stats(self) -> dict[str, Residency]:
        """Return what the router must know; looked at between two turns."""
        report = self._worker.between_turns(lambda: look(self._engine, dict(self._served)))
        return {RESIDENCY: await asyncio.wrap_future(report)}

    def check_health(self) -> None:
        """Raise when the worker's thread has ended: Serve then starts the replica anew."""
        if not self._worker.alive:
            raise RuntimeError("the thread that runs the engine has ended")

    def __del__(self) -> None:
        # Serve calls this when it has waited for the last request; after a failed start there may be nothing to end.
        if worker := getattr(self, "_worker", None):
            worker.stop()
        if engine := getattr(self, "_engine", None):
            engine.close()
