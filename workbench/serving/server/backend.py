"""What answers the requests behind the routes: one engine here, or replicas elsewhere (`serving/replicas`)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

from emoe_core.serving.records import Answer
from workbench.serving.server.limits import ApiError
from workbench.serving.server.metrics import ServerMetrics
from workbench.serving.server.protocol import Wanted
from workbench.serving.server.served_model import ServedModel
from workbench.serving.server.worker import Event, Job, Worker


class Exchange(Protocol):
    """One request and what comes of it."""

    async def next(self) -> int | Answer:
        """Return the next token, at last the answer; raises what the request failed of."""

    def close(self) -> None:
        """Give the place back; nothing happens when the request has ended."""


class Backend(Protocol):
    """Takes requests that were understood."""

    @property
    def served(self) -> ServedModel:
        """Return the model."""

    def begin(self, wanted: Wanted) -> Exchange:
        """Take a request, on the event loop; `ApiError` when it is refused."""

    async def alive(self) -> dict[str, Any]:
        """Return {"alive": whether it works at all}."""

    async def ready(self) -> dict[str, Any]:
        """Return {"ready": whether requests are taken}, and what else there is to say."""

    async def metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""


class OneEngine:
    """The engine of this process, behind its worker."""

    def __init__(self, worker: Worker, metrics: ServerMetrics) -> None:
        self.served = worker.served
        self._worker = worker
        self._metrics = metrics

    def begin(self, wanted: Wanted) -> WorkerExchange:
        """Give a request to the worker."""
        return WorkerExchange(self._worker, wanted)

    async def alive(self) -> dict[str, Any]:
        """Return whether the worker's thread runs."""
        return {"alive": self._worker.alive}

    async def ready(self) -> dict[str, Any]:
        """Return whether the worker takes requests."""
        return {"ready": self._worker.ready}

    async def metrics(self) -> bytes:
        """Return the worker's metrics."""
        return self._metrics.text()


class WorkerExchange:
    """One request between the event loop and the worker's thread; made on the event loop."""

    def __init__(self, worker: Worker, wanted: Wanted) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            # After the event loop nobody is there to hear it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._worker = worker
        self._job = Job(
            wanted.prompt_ids,
            wanted.task,
            wanted.max_new_tokens,
            wanted.objective,
            wanted.tolerance,
            deliver,
            wanted.sampling,
            wanted.stop,
            wanted.to_limit,
            wanted.skip_special_tokens,
            wanted.settings,
        )
        worker.submit(self._job)

    async def next(self) -> int | Answer:
        """Return the next token, at last the answer; raises what the request failed of."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def close(self) -> None:
        """Give the place back."""
        self._worker.cancel(self._job)
