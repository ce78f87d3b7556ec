"""The forward passes of one engine: whose rows each one holds, and what its layers ask while it runs.

`ForwardPasses` is the session that MoE layers know (see `experts.Session`). Hooks on the model call `begin` and `end`;
in between ``step`` says whose rows these are. Rows belong to requests that are seated, or, when the model is called
directly, to anonymous requests of unknown task, which last until the next prefill. One pass runs at a time.

admit
    A request begins to run: it is numbered, predicted and planned for, and its history is kept.
seat
    The rows of the passes to come belong to these admitted requests, in order.
finish
    A request ends: what it wanted goes to the predictor, and its seat is free.

Models, memory and files are not known here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from emoe_core.errors import IntegrationError
from emoe_core.experts.rerouting import REROUTE
from emoe_core.experts.step import StepContext
from emoe_core.experts.trace import TraceRecorder
from emoe_core.loader.loader import ExpertLoader
from emoe_core.planning.control import ControlLoop
from emoe_core.planning.tasks import UNKNOWN
from emoe_core.planning.tolerance import MissTolerance
from emoe_core.scheduler.requests import Request
from emoe_core.timeline import Timeline


class ForwardPasses:
    """Bookkeeping of an engine's forward passes.

    Parameters
    ----------
    loader : ExpertLoader
    control : ControlLoop
        Told of requests and of what their tokens wanted.
    recorder : TraceRecorder or None
        Told when a pass ends.
    tolerance : MissTolerance
    on_miss : str
        What becomes of absent experts that the tolerance lets go: "reroute" or "drop" (`rerouting.py`).
    cache_bias : float
        Bonus of available experts that decides who may be replaced; 0 is off.

    Attributes
    ----------
    step : StepContext or None
        The pass in progress.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        control: ControlLoop,
        recorder: TraceRecorder | None,
        tolerance: MissTolerance,
        on_miss: str = REROUTE,
        cache_bias: float = 0.0,
    ) -> None:
        self.recorder = recorder
        self.on_miss = on_miss
        self.cache_bias = cache_bias
        self.step: StepContext | None = None
        self.timeline: Timeline | None = None
        self._loader = loader
        self._control = control
        self._tolerance = tolerance
        self._forward = 0
        self._seated: list[Request] = []
        self._anonymous: list[Request] = []
        self._runner: threading.Thread | None = None
        self._runner_lock = threading.Lock()
        self._closed = False
        self._begun_s = 0.0
        self._admitted_s: dict[int, float] = {}

    def close(self) -> None:
        """Refuse further passes and requests."""
        self._closed = True

    def require_idle(self) -> None:
        """Raise IntegrationError while admitted requests run."""
        self._require_open()
        self._end_anonymous()
        if self._control.running:
            raise IntegrationError("requests are running on this engine: finish them first")

    def require_free(self) -> None:
        """Raise IntegrationError while requests are seated."""
        self._require_open()
        if self._seated:
            raise IntegrationError("this engine answers one batch at a time: finish it, or load a second engine")

    def restart(self, control: ControlLoop, tolerance: MissTolerance, on_miss: str, cache_bias: float) -> None:
        """Go on with another control loop and another answer to misses; no request may be running."""
        self.on_miss, self.cache_bias = on_miss, cache_bias
        self._control, self._tolerance, self._seated = control, tolerance, []

    def tolerances(self, layer: int, step: StepContext | None) -> list[float]:
        """Return the miss tolerance in [0, 1] of each row of a pass at a layer; one for all where they are nobody's."""
        if step is None:
            return [self._tolerance.of(UNKNOWN, layer)]
        return [self._tolerance.of(request.task, layer, request.tolerance) for request in step.requests]

    def observe(self, layer: int, chosen: torch.Tensor, demand: Sequence[int], step: StepContext | None) -> None:
        """Take one layer's desired experts for the history of the running requests."""
        self._control.observe(layer, chosen, demand, step)

    def admit(self, requests: Sequence[Request]) -> None:
        """Admit requests beside those that run; nobody is admitted when that fails."""
        self._require_open()
        self._end_anonymous()
        started = 0.0 if self.timeline is None else time.perf_counter()
        self._control.admit(requests)
        if self.timeline is not None:
            self._admitted_s |= {request.engine_number: started for request in requests}

    def seat(self, requests: Sequence[Request]) -> None:
        """Say whose rows the passes to come hold, in order; without any, they are anonymous."""
        self._seated = list(requests)

    def finish(self, requests: Sequence[Request]) -> None:
        """End requests that run; the others keep their seats."""
        self._finish(requests)
        gone = set(requests)
        self._seated = [request for request in self._seated if request not in gone]

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Publish the context of the pass that starts; the model's forward pre-hook."""
        self._require_open()
        self._start_running()
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            return
        batch, length = int(inputs.shape[0]), int(inputs.shape[1])
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        real = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            (rows,) = self._loader.device.to_host(mask[:, mask.shape[1] - length :].bool())
            if not bool(rows.all()) and bool(rows.any()):
                real = rows.reshape(-1)
        requests = self._seated
        if len(requests) != batch:
            if past == 0 or len(self._anonymous) != batch:
                tokens = [length] * batch if real is None else real.view(batch, length).sum(dim=1).tolist()
                anonymous = [Request(UNKNOWN, count) for count in tokens]
                self.admit(anonymous)
                self._anonymous = anonymous
            requests = self._anonymous
        self._loader.reap()
        self._loader.table.forward = self._forward
        self.step = StepContext(self._forward, tuple(requests), length, past == 0, real)
        self._forward += 1
        self._loader.counters.forwards += 1
        if self.timeline is not None:
            self._begun_s = time.perf_counter()

    def end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take the context back; the model's forward hook, also after an error."""
        if self._runner is not threading.current_thread():
            # A pass that was refused ends here too; the one in progress is another thread's.
            return
        step, self.step, self._runner = self.step, None, None
        if step is not None and self.recorder is not None:
            self.recorder.end_of_pass(step)
        if step is not None and self.timeline is not None and self._begun_s:
            seen = {"requests": step.numbers, "prefill": step.is_prefill, "tokens": step.tokens}
            self.timeline.add("pass", self._begun_s, **seen)
            self._begun_s = 0.0

    def _finish(self, requests: Sequence[Request]) -> None:
        for request in requests:
            started = self._admitted_s.pop(request.engine_number, None)
            if self.timeline is not None and started is not None:
                known = {"request": request.engine_number, "task": request.task, "input_tokens": request.input_tokens}
                self.timeline.add("request", started, **known)
        self._control.finish(requests)

    def _start_running(self) -> None:
        thread = threading.current_thread()
        with self._runner_lock:
            before = self._runner
            if before is not None and before is not thread and before.is_alive():
                raise IntegrationError("this engine runs one forward pass at a time: wait, or load a second engine")
            self._runner = thread
        if before is not None:
            # torch skips its hooks on an interrupt from the keyboard, so that pass never said that it ended.
            self.step = None
            self._loader.recover()

    def _require_open(self) -> None:
        if self._closed:
            raise IntegrationError("the engine of this model is closed: load it again")

    def _end_anonymous(self) -> None:
        self._finish(self._anonymous)
        self._anonymous = []
