"""What stands between the routes and the replicas: requests out, tokens in, metrics of all in one place.

A replica that dies takes the requests it runs with it: who has had a token is told so (``replica_lost``), who has not
is sent to another. Its successor's experts and history start cold.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from emoe_core.serving.records import Answer
from workbench.serving.replicas.replica import ReplicaMetrics
from workbench.serving.replicas.routing import TASK
from workbench.serving.server.limits import ApiError, shutting_down
from workbench.serving.server.protocol import Wanted
from workbench.serving.server.served_model import ServedModel

logger = logging.getLogger(__name__)
# How long replicas may take to say how they are; one in a long forward pass answers all the same.
ASKING_S = 5.0
# A request without a token is sent so often; more deaths than that are the request's doing.
SENDINGS = 3


class ReplicaFront:
    """The replicas, as a backend of the routes.

    Parameters
    ----------
    handle : DeploymentHandle
        Of the deployment of `EngineReplica`.
    served : ServedModel
    replicas : int
        How many there should be.
    """

    def __init__(self, handle: DeploymentHandle, served: ServedModel, replicas: int) -> None:
        self.served = served
        self.handle = handle
        self._wanted_replicas = replicas
        self._changed = threading.Condition()
        self._open: set[ReplicaExchange] = set()
        self.draining = False
        self._registry = CollectorRegistry()
        self.lost = Counter("emoe_requests_lost", "Requests that ended with their replica.", registry=self._registry)
        self.resent = Counter(
            "emoe_requests_resent", "Requests sent again since their replica died.", registry=self._registry
        )

    def begin(self, wanted: Wanted) -> ReplicaExchange:
        """Send a request to a replica."""
        with self._changed:
            if self.draining:
                raise shutting_down()
            exchange = ReplicaExchange(self, wanted)
            self._open.add(exchange)
            return exchange

    def ended(self, exchange: ReplicaExchange) -> None:
        """Note that a request is over."""
        with self._changed:
            self._open.discard(exchange)
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those accepted; False when some were ended by the timeout."""
        with self._changed:
            self.draining = True
            done = self._changed.wait_for(lambda: not self._open, timeout_s)
            left = list(self._open)
        for exchange in left:
            exchange.cancel()
        return done

    async def alive(self) -> dict[str, Any]:
        """Say that the front is there: it does not live or die with its replicas."""
        return {"alive": True}

    async def ready(self) -> dict[str, Any]:
        """Return how many replicas answer; one is enough."""
        answered = len(await self._ask())
        return {
            "ready": bool(answered) and not self.draining,
            "replicas": answered,
            "replicas_wanted": self._wanted_replicas,
        }

    async def metrics(self) -> bytes:
        """Return the metrics of all replicas that answer, labelled with the replica, and the front's own."""
        everything = CollectorRegistry()
        everything.register(_Collected([*self._registry.collect(), *together(await self._ask())]))
        return generate_latest(everything)

    async def _ask(self) -> list[ReplicaMetrics]:
        try:
            found = await self.handle.broadcast("metrics").results_async(timeout_s=ASKING_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return [item for item in found if isinstance(item, ReplicaMetrics)]


class ReplicaExchange:
    """One request on its way to a replica and back."""

    def __init__(self, front: ReplicaFront, wanted: Wanted) -> None:
        self._front = front
        self._wanted = wanted
        self._begun = False
        self._sendings = 0
        self._send()

    async def next(self) -> int | Answer:
        """Return the next token, at last the answer; raises what the request failed of."""
        while True:
            try:
                event = await anext(self._events)
            except (RayActorError, ObjectLostError) as error:
                logger.warning("a replica ended: %s", str(error).splitlines()[0])
                if self._begun or self._sendings >= SENDINGS:
                    self._front.lost.inc()
                    raise _lost() from None
                self._front.resent.inc()
                self._send()
                continue
            except (RayError, RayServeException, StopAsyncIteration) as error:
                raise self._failure(error) from None
            if isinstance(event, ApiError):
                raise event
            self._begun = True
            return event

    def cancel(self) -> None:
        """End the request at its replica."""
        self._events.cancel()

    def close(self) -> None:
        """Give the place back."""
        self.cancel()
        self._front.ended(self)

    def _send(self) -> None:
        self._sendings += 1
        stream = self._front.handle.options(stream=True)
        self._events: Any = stream.answer.remote(self._wanted, **{TASK: self._wanted.task})

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, BackPressureError):
            return ApiError(429, "too many requests wait: try again later", "rate_limit_error", "queue_full")
        if isinstance(error, RequestCancelledError) and self._front.draining:
            return shutting_down()
        if isinstance(error, DeploymentUnavailableError):
            return ApiError(503, "no replica runs: try again later", "server_error", "no_replica")
        logger.error("a request failed", exc_info=error)
        message = f"this request failed at its replica ({type(error).__name__}); others go on"
        return ApiError(500, message, "server_error", "request_failed")


class _Collected(Collector):
    """Metrics that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def together(reports: Iterable[ReplicaMetrics]) -> list[Metric]:
    """Return the families of all replicas, each sample labelled with its replica, and one that says where each runs."""
    merged: dict[str, Metric] = {}
    where = GaugeMetricFamily("emoe_replica", "1 for each replica that answers.", labels=["replica", "node", "process"])
    for report in reports:
        where.add_metric([report.replica, report.node, str(report.process)], 1)
        for family in report.families:
            one = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                one.samples.append(sample._replace(labels={"replica": report.replica} | sample.labels))
    return [where, *merged.values()]


def _lost() -> ApiError:
    message = "the replica that ran this request ended before it was done; the others go on: send it again"
    return ApiError(502, message, "server_error", "replica_lost")
