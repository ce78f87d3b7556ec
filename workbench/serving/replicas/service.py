"""Start replicas on a Ray cluster, and end them again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from emoe_core.errors import ExperimentError, OptionError
from workbench.machine.ray_connection import connect
from workbench.serving.replicas.replica import EngineReplica, ReplicaConfig
from workbench.serving.simulation.router import Router

DEPLOYMENT = "engine"
# What the router knows of a replica's experts is at most about so old.
RESIDENCY_PERIOD_S = 1.0
# Requests of Serve and of the front, beside those that clients may have in a replica.
SPARE_REQUESTS = 8
STARTS = 2


@dataclass(frozen=True)
class Placement:
    """How many replicas, who gets which request, and what each takes of its node.

    Raises
    ------
    OptionError
        When there is no replica or router, or less than nothing is taken.
    """

    replicas: int = 2
    router: str = "affinity"
    slack: float = 0.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise OptionError(f"--replicas is {self.replicas}: give at least 1")
        if not (self.cpus > 0 and self.gpus >= 0):
            raise OptionError("a replica takes more than 0 CPUs and no less than 0 GPUs")
        Router(self.router, self.slack)


@contextlib.contextmanager
def running_replicas(
    config: ReplicaConfig,
    placement: Placement,
    address: str | None,
    drain_s: float,
    tell: Callable[[str], object] = print,
) -> Iterator[Any]:
    """Start replicas, yield the `ReplicaFront` before them, and end them.

    One Serve application for each model name: if one runs already, left behind by a front that was killed, it is taken
    over. Serve itself is ended with its last application.

    Parameters
    ----------
    config : ReplicaConfig
    placement : Placement
    address : str or None
        Of the cluster; the one that this machine is part of when missing.
    drain_s : float
        How long a replica that ends may take for what it runs.
    tell : callable
        Called with a sentence when something takes long.

    Raises
    ------
    OptionError
        When the cluster has no room for the replicas.
    ExperimentError
        When no cluster answers, or the replicas do not start.
    """
    ray = connect(address, "emoe serve --replicas")
    try:
        require_room(ray.nodes(), placement)
        from ray import serve

        from workbench.serving.replicas.front import ReplicaFront

        application = f"emoe-{config.name}"
        tell(f"Starting {placement.replicas} replicas of {config.name}; the first start of a model writes its pack.")
        quiet = {"log_level": "WARNING"}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        try:
            with _told_why(application):
                handle = serve.run(
                    _application(config, placement, drain_s),
                    name=application,
                    route_prefix=None,
                    logging_config=quiet,
                )
            yield ReplicaFront(handle, handle.served.remote().result(), placement.replicas)
        finally:
            serve.delete(application)
            if not serve.status().applications:
                serve.shutdown()
    finally:
        ray.shutdown()


def require_room(nodes: list[dict[str, Any]], placement: Placement) -> None:
    """Raise `OptionError` when the nodes cannot hold the replicas, even with nothing else on them."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(_room(node, placement) for node in alive)
    if room < placement.replicas:
        found = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in alive)
        raise OptionError(
            f"{placement.replicas} replicas of {placement.cpus:g} CPUs and {placement.gpus:g} GPUs do not fit: the "
            f"cluster's nodes have room for {room} ({found}). Add nodes, or give fewer --replicas, --cpus or --gpus."
        )


def _room(resources: dict[str, float], placement: Placement) -> int:
    room = resources.get("CPU", 0.0) / placement.cpus
    if placement.gpus:
        room = min(room, resources.get("GPU", 0.0) / placement.gpus)
    return int(room + 1e-9)


def _application(config: ReplicaConfig, placement: Placement, drain_s: float) -> Any:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    most = config.limits.max_batch + config.limits.max_waiting
    router = {
        "kind": placement.router,
        "slack": placement.slack,
        "batch": config.limits.max_batch,
        "most": most,
    }
    routing = {
        "request_router_class": "workbench.serving.replicas.routing.TaskRouter",
        "request_router_kwargs": router,
        "request_routing_stats_period_s": RESIDENCY_PERIOD_S,
    }
    make: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=placement.replicas,
        # A replica says itself when it is full, in OpenAI's words.
        max_ongoing_requests=most + SPARE_REQUESTS,
        max_queued_requests=placement.replicas * most,
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5.0,
        max_constructor_retry_count=STARTS,
        request_router_config=RequestRouterConfig.model_validate(routing),
    )
    return make(EngineReplica).bind(config)


@contextlib.contextmanager
def _told_why(application: str) -> Iterator[None]:
    """Turn Serve's error into ours, with what the replica said."""
    from ray import serve

    try:
        yield
    except RuntimeError as error:
        state = serve.status().applications.get(application)
        said = [one.message for one in state.deployments.values()] if state else []
        lines = [line.strip() for line in "\n".join([str(error), *said]).splitlines() if line.strip()]
        raise ExperimentError(
            f"the replicas did not start: {lines[-1].rstrip('.') if lines else error}. Every node needs the model at "
            "the same path and the same installation; what a replica printed is in Ray's logs on its node."
        ) from error
