"""How tests start the nodes of a Ray cluster on one machine."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def agent_ports() -> dict[str, int]:
    """Return free ports: a node that has to learn what its agents took gives up after 15 s on a busy machine."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [one.getsockname()[1] for one in listening]
    return dict(
        zip(("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port"), ports, strict=True)
    )
