"""The one thread that runs the engine: takes requests in, hands tokens out.

Requests and cancellations arrive from other threads and are taken up between turns of the `ServingLoop`, so one forward
pass runs at a time and nobody else touches the engine. A request that fails ends alone; should a whole turn fail,
everybody in it is told, and the next turn starts anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from emoe_core.engine import Engine
from emoe_core.errors import OptionError, is_out_of_memory
from emoe_core.metrics import Counters
from emoe_core.scheduler import BatchLimits, Objective, RequestTooLargeError, Scheduler
from emoe_core.scheduler.costs import ServingCosts
from emoe_core.serving.loop import ServingLoop
from emoe_core.serving.records import Answer
from emoe_core.serving.sampling import Sampling
from emoe_core.serving.text_stream import TextStream
from workbench.serving.server.limits import ApiError, ServerLimits, shutting_down
from workbench.serving.server.metrics import ServerMetrics
from workbench.serving.server.served_model import ServedModel
from workbench.serving.server.stop_strings import StopStrings

logger = logging.getLogger(__name__)
Event = int | Answer | ApiError


@dataclass(eq=False)
class Job:
    """A request on its way; ``deliver`` is called on the worker's thread: each token id, then an answer or error.

    It arrives when it is made, however long the turn in progress goes on.
    """

    prompt_ids: list[int]
    task: str
    max_new_tokens: int
    objective: Objective
    tolerance: float | None
    deliver: Callable[[Event], None]
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()
    to_limit: bool = False
    skip_special_tokens: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None
    arrival_s: float = field(default_factory=time.perf_counter)


class Worker:
    """Runs an engine for many clients; `start` it, `submit` to it, `stop` it.

    Parameters
    ----------
    engine : Engine
    served : ServedModel
        Of the engine.
    scheduler : Scheduler
    limits : ServerLimits
    batch : BatchLimits
    metrics : ServerMetrics
    costs : ServingCosts, optional
    """

    def __init__(
        self,
        engine: Engine,
        served: ServedModel,
        scheduler: Scheduler,
        limits: ServerLimits,
        batch: BatchLimits,
        metrics: ServerMetrics,
        costs: ServingCosts | None = None,
    ) -> None:
        self.served = served
        self._engine = engine
        self._metrics = metrics
        self._most = limits.max_batch + limits.max_waiting
        self._loop = ServingLoop(
            engine,
            scheduler,
            batch,
            costs,
            stop_tokens=served.ends,
            on_token=lambda number, token: self._jobs[number].deliver(token),
            on_failure=self._failed,
        )
        if engine.one_at_a_time is not None and batch.max_requests > 1:
            logger.warning("%s: requests run one at a time, since %s", served.name, engine.one_at_a_time)
        self._changed = threading.Condition()
        self._accepted: set[Job] = set()
        self._fresh: list[Job] = []
        self._gone: list[Job] = []
        self._errands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._jobs: dict[int, Job] = {}
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="emoe-serve", daemon=True)
        self._publish()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a request; `ApiError` 429 when too many wait, 503 when the server shuts down."""
        with self._changed:
            if self._draining:
                raise shutting_down()
            if len(self._accepted) >= self._most:
                raise ApiError(
                    429,
                    f"{self._most} requests run and wait already: try again later",
                    "rate_limit_error",
                    "queue_full",
                )
            self._accepted.add(job)
            self._fresh.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Give up a request; its place is free before the next forward pass. Nothing happens when it has ended."""
        with self._changed:
            if job in self._accepted:
                self._gone.append(job)
                self._changed.notify_all()

    def between_turns(self, errand: Callable[[], Any]) -> Future[Any]:
        """Have something done on the worker's thread while no pass runs: it may look at the engine."""
        outcome: Future[Any] = Future()
        with self._changed:
            self._errands.append((errand, outcome))
            self._changed.notify_all()
        return outcome

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those accepted; False when some were ended by the timeout."""
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not self._accepted, timeout_s)
            left = list(self._accepted)
            self._gone += left
            self._changed.notify_all()
        for job in left:
            job.deliver(shutting_down())
        return done

    def stop(self) -> None:
        """End the thread after the turn in progress; unfinished requests are told. Idempotent."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping:
                    break
                fresh, self._fresh = self._fresh, []
                gone, self._gone = self._gone, []
                errands, self._errands = self._errands, []
            for errand, outcome in errands:
                _run_errand(errand, outcome)
            self._turn(fresh, gone)
            self._publish()
        for job in list(self._accepted):
            self._end(job, shutting_down())
        for _, outcome in self._errands:
            outcome.cancel()

    def _has_work(self) -> bool:
        return bool(self._fresh or self._gone or self._errands or self._stopping or not self._loop.idle)

    def _turn(self, fresh: list[Job], gone: list[Job]) -> None:
        for job in fresh:
            try:
                job.number = self._loop.submit(
                    job.prompt_ids,
                    job.task,
                    job.max_new_tokens,
                    job.objective,
                    tolerance=job.tolerance,
                    arrival_s=job.arrival_s,
                    sampling=job.sampling,
                    ends=self._stop_watch(job) if job.stop else None,
                    to_limit=job.to_limit,
                    settings=job.settings,
                )
            except (OptionError, RequestTooLargeError) as error:
                self._end(job, ApiError(400, str(error)))
            else:
                self._jobs[job.number] = job
        for job in gone:
            if job in self._accepted and job.number is not None:
                self._loop.cancel(job.number)
                self._metrics.ended("cancelled")
                self._end(job, None)
        try:
            for answer in self._loop.turn():
                job = self._jobs[answer.number]
                self._metrics.answered(answer, job.objective)
                self._end(job, answer)
        except Exception as error:
            logger.exception("a whole turn failed")
            for number in list(self._jobs):
                self._loop.cancel(number)
                self._failed(number, error)

    def _stop_watch(self, job: Job) -> Callable[[int], bool]:
        """Return whether an answer's text has come to a stop string, told its tokens one by one."""
        stream = TextStream(self.served.tokenizer, () if job.to_limit else self.served.ends, job.skip_special_tokens)
        stops = StopStrings(job.stop)

        def ended(token: int) -> bool:
            stops.push(stream.push(token))
            return stops.found

        return ended

    def _failed(self, number: int, error: Exception) -> None:
        logger.error("request %d failed", number, exc_info=error)
        self._metrics.ended("failed")
        self._end(self._jobs[number], _failure(error))

    def _end(self, job: Job, event: Answer | ApiError | None) -> None:
        if job.number is not None:
            self._jobs.pop(job.number, None)
        if event is not None:
            job.deliver(event)
        with self._changed:
            self._accepted.discard(job)
            self._changed.notify_all()

    def _publish(self) -> None:
        counters: Counters = replace(self._engine.loader.counters)
        self._metrics.publish(counters, self._loop.waiting, self._loop.running)


def _run_errand(errand: Callable[[], Any], outcome: Future[Any]) -> None:
    try:
        outcome.set_result(errand())
    except Exception as error:
        outcome.set_exception(error)


def _failure(error: Exception) -> ApiError:
    if is_out_of_memory(error):
        message = "this request ran out of memory and ended alone: shorten its prompt or answer, or serve fewer at once"
        return ApiError(500, message, "server_error", "out_of_memory")
    message = f"this request failed while it ran ({type(error).__name__}: {error}); others go on"
    return ApiError(500, message, "server_error", "request_failed")
