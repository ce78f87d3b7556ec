"""Sockets and signals: something served until it is told to stop.

The first SIGTERM or SIGINT ends admission (503, and not ready), lets accepted requests finish within ``drain_s``, and
then closes the listening socket; a second one closes it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from emoe_core.engine import Engine
from emoe_core.scheduler import BatchLimits, Scheduler
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.server.app import make_app
from workbench.serving.server.backend import OneEngine
from workbench.serving.server.limits import ServerLimits, require_safe_host
from workbench.serving.server.metrics import ServerMetrics
from workbench.serving.server.served_model import served_model
from workbench.serving.server.worker import Worker

# For clients that do not read what was sent to them.
LAST_BYTES_S = 5


class DrainingServer(uvicorn.Server):
    """An application on a socket; run it on the main thread, which gets the signals.

    Parameters
    ----------
    app : FastAPI
    host, port : str, int
        Port 0 takes a free one.
    drain : callable
        Called with ``drain_s`` after the first signal, on a thread of its own; returns when accepted requests ended.
    drain_s : float
        How long accepted requests may take after the first signal.
    on_listening : callable, optional
        Called with the port once connections are taken.
    on_stopping : callable, optional
        Called without arguments after the first signal, on the thread that drains.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str,
        port: int,
        drain: Callable[[float], object],
        drain_s: float,
        on_listening: Callable[[int], None] | None = None,
        on_stopping: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(app, host, port, log_level="warning", lifespan="off", timeout_graceful_shutdown=LAST_BYTES_S)
        )
        self._drain = drain
        self._drain_s = drain_s
        self._on_listening = on_listening
        self._on_stopping = on_stopping
        self._drainer: threading.Thread | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started and self._on_listening is not None:
            self._on_listening(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, close at the second; called by uvicorn's signal handlers."""
        if self._drainer is not None:
            self.should_exit = True
            return
        # Waiting here would stop the event loop that the last answers need.
        self._drainer = threading.Thread(target=self._drain_and_exit, name="emoe-drain", daemon=True)
        self._drainer.start()

    def _drain_and_exit(self) -> None:
        try:
            if self._on_stopping is not None:
                self._on_stopping()
            self._drain(self._drain_s)
        finally:
            self.should_exit = True


class EmoeServer(DrainingServer):
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
    on_stopping : callable, optional
        Called without arguments after the first signal, on the thread that drains.

    Raises
    ------
    OptionError
        When others could reach the server without a key, or the model has no tokenizer.
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
        on_stopping: Callable[[], None] | None = None,
    ) -> None:
        require_safe_host(host, api_key)
        metrics = ServerMetrics()
        self.worker = Worker(engine, served_model(engine, model), scheduler, limits, batch, metrics, costs)
        app = make_app(OneEngine(self.worker, metrics), limits, api_key)
        super().__init__(app, host, port, self.worker.drain, drain_s, on_listening, on_stopping)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Start the worker, then listen."""
        self.worker.start()
        await super().startup(sockets)

    def run_until_stopped(self) -> None:
        """Serve until a signal, then end the worker's thread."""
        try:
            self.run()
        finally:
            self.worker.stop()
