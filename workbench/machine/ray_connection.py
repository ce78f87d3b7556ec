"""Join a running Ray cluster (extra ``ray``), whose nodes have the same code installed."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from emoe_core.errors import ExperimentError, OptionError

KNOCK_PATIENCE_S = 10.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def connect(address: str | None, what: str) -> Any:
    """Join a running Ray cluster and return the module.

    Parameters
    ----------
    address : str or None
        ``HOST:PORT`` or ``ray://HOST:PORT``; the cluster that this machine is part of when missing.
    what : str
        Who needs it, for the message.

    Raises
    ------
    OptionError
        When Ray is not installed.
    ExperimentError
        When no cluster answers.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise OptionError(f"{what} needs Ray: pip install -c constraints.txt -e '.[ray]'") from None
    try:
        knock(address)
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        where = address or "this machine"
        raise ExperimentError(
            f"no Ray cluster answers at {where}: {str(error).strip().splitlines()[0]} Start one with "
            "`ray start --head`, or name its address (--ray-address HOST:PORT)."
        ) from None
    return ray


def knock(address: str | None) -> None:
    """Raise `OSError` when nothing listens at an address ``HOST:PORT``; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_PATIENCE_S).close()
