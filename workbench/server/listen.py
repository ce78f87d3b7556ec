"""Sockets and signals: one engine served until it is told to stop.

The first SIGTERM or SIGINT ends admission (503, and not ready), lets accepted requests finish within ``drain_s``, and
then closes the listening socket; a second one closes it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from emoe_core.costs import ServingCosts
from emoe_core.engine import Engine
from emoe_core.scheduler import BatchLimits, Scheduler
from workbench.server.app import make_app
from workbench.server.limits import ServerLimits, require_safe_host
from workbench.server.metrics import ServerMetrics
from workbench.server.worker import Worker

# For clients that do not read what was sent to them.
LAST_BYTES_S = 5


class EmoeServer(uvicorn.Server):
    """A server of one engine; `run_until_stopped` on the main thread, which gets the signals.

    Parameters
    ----------
    engine : Engine
        Stays the caller's to close.
    scheduler : Scheduler
    limits : ServerLimits
    batch : BatchLimits
    model : str
        The name that clients ask for.
    host, port : str, int
        Port 0 takes a free one.
    api_key : str, optional
    costs : ServingCosts, optional
    drain_s : float
        How long accepted requests may take after the first signal.
    on_listening : callable, optional
        Called with the port once connections are taken.

    Raises
    ------
    OptionError
        When others could reach the server without a key.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        limits: ServerLimits,
        batch: BatchLimits,
        model: str,
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
        costs: ServingCosts | None = None,
        drain_s: float = 30.0,
        on_listening: Callable[[int], None] | None = None,
    ) -> None:
        require_safe_host(host, api_key)
        metrics = ServerMetrics()
        self.worker = Worker(engine, scheduler, limits, batch, metrics, costs)
        app = make_app(engine, self.worker, metrics, limits, model, api_key)
        super().__init__(
            uvicorn.Config(app, host, port, log_level="warning", lifespan="off", timeout_graceful_shutdown=LAST_BYTES_S)
        )
        self._drain_s = drain_s
        self._on_listening = on_listening
        self._drainer: threading.Thread | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Start the worker, then listen."""
        self.worker.start()
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started and self._on_listening is not None:
            self._on_listening(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, close at the second; called by uvicorn's signal handlers."""
        if self._drainer is not None:
            self.should_exit = True
            return
        # Waiting here would stop the event loop that the last answers need.
        self._drainer = threading.Thread(target=self._drain, name="emoe-drain", daemon=True)
        self._drainer.start()

    def run_until_stopped(self) -> None:
        """Serve until a signal, then end the worker's thread."""
        try:
            self.run()
        finally:
            self.worker.stop()

    def _drain(self) -> None:
        self.worker.drain(self._drain_s)
        self.should_exit = True
