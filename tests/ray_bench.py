"""How tests start a Ray cluster of several nodes on one machine, which may be busy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TRIES = 5
PATIENCE_S = 300.0


@contextmanager
def ray_cluster(head: dict[str, Any], node: dict[str, Any], nodes: int) -> Iterator[Cluster]:
    """Run a cluster of a head and some nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        # Ray's workers give way to whatever else runs: beside two busy loops they would get a thirtieth of a core.
        with patch.dict(os.environ, RAY_worker_niceness="0"):
            _add(made, head | {"include_dashboard": False})
            for _ in range(nodes):
                _add(made, node)
        made.wait_for_nodes(timeout=PATIENCE_S)
        yield made
    finally:
        made.shutdown()


def _add(cluster: Cluster, options: dict[str, Any]) -> None:
    for left in reversed(range(TRIES)):
        try:
            cluster.add_node(wait=False, **options, **_agent_ports())
        except Exception as error:
            # Ray gives a node, and each of its processes, 30 s at most to start, whatever the machine does beside, and
            # says so by several classes. A wrong option stays wrong.
            if not left or isinstance(error, TypeError | ValueError):
                raise
        else:
            return


def _agent_ports() -> dict[str, int]:
    """Return free ports: a node that has to learn what its agents took gives up after 15 s on a busy machine."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [one.getsockname()[1] for one in listening]
    return dict(
        zip(("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port"), ports, strict=True)
    )
