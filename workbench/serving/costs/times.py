"""Times of a loaded engine as it serves: prompts, decode steps by batch size, swaps, predictions.

Prompts and steps are the serving loop's own (`emoe_core/serving/batch.py`), of real text and mixed tasks: with random
text or one task only, nobody would miss an expert, and a tiny model's prompts came out at half of their time. Medians
of repeats:

* prompts of several lengths, one at a time: a line through (tokens, seconds);
* decode steps of several batch sizes over the middle one of these lengths; their times are no straight line, since
  more rows ask for more experts until all are asked for;
* swaps of several sizes, from start until every byte has arrived: a line through (experts, seconds);
* one prediction with its plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import emoe_core
from emoe_core.planning.tasks import TASK_TYPES
from emoe_core.scheduler import Request
from emoe_core.scheduler.costs import CostsError
from emoe_core.serving.batch import RunningBatch
from emoe_core.serving.records import Pass
from emoe_core.serving.sampling import Sampler
from workbench.serving.costs.task_loads import cut, task_tokens

Progress = Callable[[str, int, int], None]
Texts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Times:
    """The measured part of `ServingCosts`, under the same names."""

    prefill_token_s: float
    prefill_fixed_s: float
    decode_batches: tuple[int, ...]
    decode_step_s: tuple[float, ...]
    expert_load_s: float
    swap_s: float
    prediction_s: float


def measure_times(
    engine: emoe_core.Engine,
    *,
    prompt_tokens: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    source: str,
    seed: int,
    progress: Progress,
) -> Times:
    """Measure the times of a loaded engine, which serves at tolerance 1 and is warm.

    Parameters
    ----------
    engine : Engine
    prompt_tokens, batches : sequence of int
        Prompt lengths (two or more) and batch sizes (ascending) to time; 1 alone where requests cannot share a batch.
    repeats : int
        Repeats of each prompt length and swap size, and steps of each batch size.
    source : str
        Of the prompts: "embedded", "fixture" or "hub".
    seed : int
    progress : callable
        Called with (stage, done, total).
    """
    texts = task_tokens(engine, source, "profile", seed)
    batches = batches if engine.one_at_a_time is None else (1,)
    slope, intercept = _prompts(engine, texts, prompt_tokens, repeats, progress)
    steps = _steps(engine, texts, sorted(prompt_tokens)[len(prompt_tokens) // 2], batches, repeats, progress)
    load_s, swap_s = _swaps(engine, repeats, seed, progress)
    return Times(slope, intercept, tuple(batches), tuple(steps), load_s, swap_s, _prediction(engine, repeats))


def fitted(passes: Sequence[Pass]) -> Times:
    """Return the times of a service's own passes; waiting for experts is in them, so loading costs nothing more.

    Raises
    ------
    CostsError
        When there was no prompt, or no step.
    """
    prompts = [one for one in passes if one.is_prompt]
    sizes = sorted({one.size for one in passes if not one.is_prompt})
    if not prompts or not sizes:
        raise CostsError("a service without a prompt or a step has no times: serve answers of two or more tokens")
    lengths, seconds = [float(one.size) for one in prompts], [one.seconds for one in prompts]
    slope, intercept = fit_line(lengths, seconds) if len(set(lengths)) > 1 else (0.0, float(np.mean(seconds)))
    steps = [
        float(np.mean([one.seconds for one in passes if not one.is_prompt and one.size == size])) for size in sizes
    ]
    return Times(slope, intercept, tuple(sizes), tuple(steps), 0.0, 0.0, 0.0)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line; neither is let below 0, as no cost is.

    Raises
    ------
    CostsError
        When fewer than two different x were measured.
    """
    if len(set(x)) < 2:
        raise CostsError("a line of costs needs two different sizes: measure more of them")
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
    if slope < 0:
        return 0.0, float(np.mean(y))
    if intercept < 0:
        # Through the origin.
        xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
        return float((xs * ys).sum() / (xs * xs).sum()), 0.0
    return slope, intercept


def _prompts(
    engine: emoe_core.Engine, texts: Texts, prompt_tokens: Sequence[int], repeats: int, report: Progress
) -> tuple[float, float]:
    sizes, seconds = [], []
    for place, count in enumerate(prompt_tokens):
        times = []
        # The first of each length is not counted; then every task has its turn.
        for repeat in range(repeats + 1):
            with _running(engine, _tasks_from(repeat, 1)) as (batch, (request,)):
                times.append(_read(batch, request, cut(texts[request.task], count)))
        sizes.append(float(count))
        seconds.append(float(np.median(times[1:])))
        report("prompts", place + 1, len(prompt_tokens))
    return fit_line(sizes, seconds)


def _steps(
    engine: emoe_core.Engine, texts: Texts, context: int, batches: Sequence[int], repeats: int, report: Progress
) -> list[float]:
    medians = []
    for place, size in enumerate(batches):
        times: list[float] = []
        # Whose rows they are decides what is resident: every task has its turn, in a small batch as in a large one.
        for first in range(0, len(TASK_TYPES), size):
            with _running(engine, _tasks_from(first, size)) as (batch, requests):
                for request in requests:
                    _read(batch, request, cut(texts[request.task], context))
                times += [_step(batch) for _ in range(repeats + 1)][1:]
        medians.append(float(np.median(times)))
        report("steps", place + 1, len(batches))
    return medians


def _step(batch: RunningBatch) -> float:
    started = time.perf_counter()
    for error in batch.step().values():
        raise error
    return time.perf_counter() - started


@contextmanager
def _running(engine: emoe_core.Engine, tasks: Sequence[str]) -> Iterator[tuple[RunningBatch, list[Request]]]:
    """Admit requests as the serving loop does, their experts in place; end them afterwards."""
    batch = RunningBatch(engine)
    requests = [Request(task, 1, sampler=Sampler(None)) for task in tasks]
    engine.passes.admit(requests)
    engine.loader.settle()
    try:
        with torch.no_grad():
            yield batch, requests
    finally:
        engine.passes.finish(requests)
        batch.seat(())


def _read(batch: RunningBatch, request: Request, ids: Sequence[int]) -> float:
    """Run a prompt, whose request joins the batch; return its seconds. Choosing a token waits for the device."""
    request.prompt_ids, request.input_tokens = ids, len(ids)
    started = time.perf_counter()
    batch.prefill(request)
    return time.perf_counter() - started


def _tasks_from(first: int, count: int) -> list[str]:
    """Return task types in turn."""
    return [TASK_TYPES[(first + place) % len(TASK_TYPES)] for place in range(count)]


def _swaps(engine: emoe_core.Engine, repeats: int, seed: int, report: Progress) -> tuple[float, float]:
    """Swap one to all that can be replaced, in some of the layers and in all of them."""
    loader, generator = engine.loader, np.random.default_rng(seed)
    capacity = loader.table.capacity
    layers = len(loader.layers)
    replaceable = [min(slots, layer.num_experts - slots) for slots, layer in zip(capacity, loader.layers, strict=True)]
    if not any(replaceable):
        return 0.0, 0.0  # everything is resident, so nothing is ever swapped
    sizes, seconds = [], []
    shares = (0.25, 0.5, 1.0)
    for done, share in enumerate(shares):
        for _ in range(repeats):
            touched = set(generator.permutation(layers)[: max(1, round(share * layers))].tolist())
            targets = []
            for layer in range(layers):
                held = sorted(loader.table.resident(layer))
                absent = [expert for expert in range(loader.layers[layer].num_experts) if expert not in held]
                moved = min(replaceable[layer], len(absent)) if layer in touched else 0
                kept = held[: capacity[layer] - moved]
                targets.append(tuple([*generator.permutation(absent)[:moved].tolist(), *kept]))
            started = time.perf_counter()
            loads = loader.swap(targets)
            loader.settle()
            _synchronize(engine)
            sizes.append(float(loads))
            seconds.append(time.perf_counter() - started)
        report("swaps", done + 1, len(shares))
    return fit_line(sizes, seconds)


def _prediction(engine: emoe_core.Engine, repeats: int) -> float:
    """Return the seconds of one prediction with its plan: what the control loop counted, over how often it ran."""
    control = engine.control
    before, times = control.prediction_s, []
    tasks = sorted(TASK_TYPES)
    for repeat in range(repeats):
        engine.finish(engine.admit([tasks[repeat % len(tasks)]], [64]))
        times.append(control.prediction_s - before)
        before = control.prediction_s
    engine.loader.settle()
    return float(np.median(times))


def _synchronize(engine: emoe_core.Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
