"""The forward passes of one engine: whose rows each one holds, and what its layers ask while it runs.

`ForwardPasses` is the session that MoE layers know (see `experts.Session`). Hooks on the model call `begin` and `end`;
in between ``step`` says whose rows these are. Rows belong to requests that `admit` announced, or, when the model is
called directly, to anonymous requests of unknown task, which last until the next prefill. One pass runs at a time.

Models, memory and files are not known here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from emoe_core.errors import IntegrationError
from emoe_core.experts.step import StepContext
from emoe_core.experts.trace import TraceRecorder
from emoe_core.loader.loader import ExpertLoader
from emoe_core.planning.control import ControlLoop
from emoe_core.planning.quality_target import QualityPlan
from emoe_core.planning.tasks import UNKNOWN
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
    tolerance : float
        Miss tolerance where no profile says otherwise.
    cache_bias : float
        Bonus of available experts that decides who may be replaced; 0 is off.
    quality : QualityPlan or None
        Given, it alone decides the tolerance of every (task, layer).

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
        tolerance: float,
        cache_bias: float = 0.0,
        quality: QualityPlan | None = None,
    ) -> None:
        self.recorder = recorder
        self.cache_bias = cache_bias
        self.step: StepContext | None = None
        self.timeline: Timeline | None = None
        self._loader = loader
        self._control = control
        self._tolerance = tolerance
        self._quality = quality
        self._forward = 0
        self._assigned: list[int] | None = None
        self._open: list[int] = []
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

    def restart(self, control: ControlLoop, tolerance: float, cache_bias: float) -> None:
        """Go on with another control loop and other tolerances; no request may be running."""
        self.cache_bias = cache_bias
        self._control, self._tolerance, self._assigned = control, tolerance, None

    def tolerance_of(self, task: str, layer: int) -> float:
        """Miss tolerance of a (task, layer) in [0, 1]."""
        if self._quality is not None:
            return self._quality.tolerance(task, layer)
        return self._control.tolerance(task, layer, self._tolerance)

    def observe(self, layer: int, chosen: torch.Tensor, demand: Sequence[int], step: StepContext | None) -> None:
        """Take one layer's desired experts for the history of the running requests."""
        self._control.observe(layer, chosen, demand, step)

    def admit(self, tasks: Sequence[str], input_tokens: Sequence[int]) -> list[int]:
        """Admit requests whose rows the next prefill will hold, in order; return their numbers.

        Raises
        ------
        IntegrationError
            When the engine is closed, or other admitted requests are not finished.
        """
        self._require_open()
        if self._assigned is not None:
            raise IntegrationError("this engine answers one batch at a time: finish it, or load a second engine")
        self._end_anonymous()
        self._assigned = self._admit(tasks, input_tokens)
        return self._assigned

    def finish(self, numbers: Sequence[int]) -> None:
        """End admitted requests."""
        self._finish(numbers)
        self._assigned = None

    def admit_beside(
        self, tasks: Sequence[str], input_tokens: Sequence[int], tolerances: Sequence[float | None] | None = None
    ) -> list[int]:
        """Admit requests beside those that run (continuous batching); `seat` says whose rows a pass holds.

        ``tolerances`` are the requests' own, in place of what the engine, its profile or its quality target says.
        """
        self._require_open()
        self._end_anonymous()
        return self._admit(tasks, input_tokens, tolerances)

    def seat(self, numbers: Sequence[int] | None) -> None:
        """Say whose rows the passes to come hold, in order; None when no admitted request runs any more."""
        self._assigned = None if numbers is None else list(numbers)

    def leave(self, numbers: Sequence[int]) -> None:
        """End some of the requests that run; the others stay."""
        self._finish(numbers)

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
            rows = mask[:, mask.shape[1] - length :].bool().cpu()
            if not bool(rows.all()) and bool(rows.any()):
                real = rows.reshape(-1)
        numbers = self._assigned if self._assigned is not None and len(self._assigned) == batch else None
        if numbers is None:
            if past == 0 or len(self._open) != batch:
                self._end_anonymous()
                tokens = [length] * batch if real is None else real.view(batch, length).sum(dim=1).tolist()
                self._open = self._admit([UNKNOWN] * batch, tokens)
            numbers = self._open
        self._loader.reap()
        self._loader.table.forward = self._forward
        running = self._control.running
        tasks = tuple(running[number].task if number in running else UNKNOWN for number in numbers)
        own = tuple(running[number].tolerance if number in running else None for number in numbers)
        self.step = StepContext(self._forward, tuple(numbers), tasks, length, past == 0, real, own)
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
            seen = {"requests": step.requests, "prefill": step.is_prefill, "tokens": step.tokens}
            self.timeline.add("pass", self._begun_s, **seen)
            self._begun_s = 0.0

    def _admit(
        self, tasks: Sequence[str], input_tokens: Sequence[int], tolerances: Sequence[float | None] | None = None
    ) -> list[int]:
        started = 0.0 if self.timeline is None else time.perf_counter()
        numbers = self._control.admit(tasks, input_tokens, tolerances)
        if self.timeline is not None:
            self._admitted_s |= dict.fromkeys(numbers, started)
        return numbers

    def _finish(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            started, request = self._admitted_s.pop(number, None), self._control.running.get(number)
            if self.timeline is not None and started is not None and request is not None:
                known = {"request": number, "task": request.task, "input_tokens": request.input_tokens}
                self.timeline.add("request", started, **known)
        self._control.finish(numbers)

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
        self._finish(self._open)
        self._open = []
