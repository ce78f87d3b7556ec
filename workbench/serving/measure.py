"""Measure serving costs on the real engine: prompts, decode steps by batch size, swaps (terms: `emoe_core.costs`).

The engine is loaded under a budget at tolerance 1, as it serves when experts move only between steps; a first pass over
everything warms it. Times are medians of repeats, in the order that the engine meets them:

* prompts of several lengths, one at a time: a line through (tokens, seconds);
* decode steps of several batch sizes over a short context;
* swaps of several sizes, from start until every byte has arrived: a line through (experts, seconds);
* one prediction with its plan.

Each task's lengths and expert shares come from prompts of the profile split: shares from prompts and first tokens,
lengths of answers from the model's task profile where there is one, else from short answers measured here.

Times on a busy machine are wrong; the file records how busy it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import emoe_core
from emoe_core.checkpoint import open_checkpoint
from emoe_core.costs import CostsError, ServingCosts
from emoe_core.errors import DataError, OptionError
from emoe_core.tasks import TASK_TYPES, UNKNOWN
from workbench.busy import OtherWork
from workbench.environment import describe_environment
from workbench.models import resolve_model
from workbench.profiling import RECIPES, profile_path
from workbench.serving.task_loads import profile_of, task_loads

Progress = Callable[[str, int, int], None]
KEPT_OF_ENVIRONMENT = ("platform", "packages", "cpu", "cpu_flags", "cores", "threads", "ram_bytes", "gpus", "commit")


@dataclass(frozen=True)
class CostsConfig:
    """How costs are measured.

    Attributes
    ----------
    model : str
    budget : str
        Expert memory that the engine serves under.
    prompt_tokens : tuple of int
        Prompt lengths to time, two or more.
    batches : tuple of int
        Batch sizes to time, ascending.
    repeats : int
        Repeats of each prompt length and swap size, and steps of each batch size.
    prompts : int
        Prompts of each task for lengths and shares.
    answer_tokens : int
        Tokens generated for each of them.
    source, dtype, device, seed
        As in `ExperimentConfig`.
    """

    model: str = "reference"
    budget: str = "60%"
    prompt_tokens: tuple[int, ...] = (16, 64, 128, 256)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 5
    prompts: int = 8
    answer_tokens: int = 8
    source: str = "embedded"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.prompt_tokens)) < 2 or min(self.prompt_tokens) < 1:
            raise OptionError("prompt_tokens must name two or more lengths of 1 token or more: a line needs two points")
        if not self.batches or sorted(set(self.batches)) != list(self.batches) or self.batches[0] < 1:
            raise OptionError("batches must ascend from 1 or more, such as 1,2,4,8")
        if self.repeats < 1 or self.prompts < 1 or self.answer_tokens < 1:
            raise OptionError("repeats, prompts and answer_tokens must be 1 or more")


def measure_costs(config: CostsConfig, progress: Progress | None = None) -> ServingCosts:
    """Measure the serving costs of a model.

    Parameters
    ----------
    config : CostsConfig
    progress : callable, optional
        Called with (stage, done, total).
    """
    report = progress or (lambda stage, done, total: None)
    checkpoint = resolve_model(config.model)
    with emoe_core.load(
        checkpoint,
        budget=config.budget,
        tolerance=1.0,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        record=True,
    ) as engine:
        profile = profile_of(checkpoint)
        tasks = task_loads(engine, profile, config.prompts, config.answer_tokens, config.source, config.seed, report)
        others = OtherWork()
        slope, intercept = _prompts(engine, config, report)
        steps = _steps(engine, config, report)
        load_s, swap_s = _swaps(engine, config, report)
        prediction_s = _prediction(engine, config)
        environment = {
            key: value for key, value in describe_environment().to_dict().items() if key in KEPT_OF_ENVIRONMENT
        }
        return ServingCosts(
            model_hash=engine.index.source_hash,
            prefill_token_s=slope,
            prefill_fixed_s=intercept,
            decode_batches=config.batches,
            decode_step_s=tuple(steps),
            expert_load_s=load_s,
            swap_s=swap_s,
            prediction_s=prediction_s,
            slots_per_layer=tuple(engine.plan.slots_per_layer),
            kv_token_bytes=engine.memory(1, 1).kv_bytes,
            tasks=tasks,
            settings=_settings(config, engine),
            environment=environment | {"others_cpu_share": others.share()},
        )


def costs_path(model_hash: str) -> Path:
    """Return where the measured costs of a model are kept: beside its profile."""
    return profile_path(model_hash).with_suffix(".costs.json")


def stored_costs(checkpoint: str | Path) -> ServingCosts:
    """Return a model's costs: those measured here, else those that come with an embedded model.

    Raises
    ------
    DataError
        When there are none; the message says how to measure them.
    CostsError
        When those measured here are damaged or of another format.
    """
    model_hash = open_checkpoint(checkpoint).source_hash
    here = costs_path(model_hash)
    if here.exists():
        return ServingCosts.load(here, model_hash)
    for path in sorted(RECIPES.glob("*/costs.json")):
        costs = ServingCosts.load(path)
        if costs.model_hash == model_hash:
            return costs
    raise DataError(f"{checkpoint} has no serving costs yet: measure them with `emoe costs {checkpoint}`")


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


def _prompts(engine: emoe_core.Engine, config: CostsConfig, report: Progress) -> tuple[float, float]:
    ids = _random_ids(engine, max(config.prompt_tokens), config.seed)
    sizes, seconds = [], []
    for place, count in enumerate(config.prompt_tokens):
        _prefill(engine, ids[:, :count])
        times = []
        for _ in range(config.repeats):
            started = time.perf_counter()
            _prefill(engine, ids[:, :count])
            times.append(time.perf_counter() - started)
        sizes.append(float(count))
        seconds.append(float(np.median(times)))
        report("prompts", place + 1, len(config.prompt_tokens))
    return fit_line(sizes, seconds)


def _steps(engine: emoe_core.Engine, config: CostsConfig, report: Progress) -> list[float]:
    context = min(config.prompt_tokens)
    medians = []
    for place, batch in enumerate(config.batches):
        ids = _random_ids(engine, context * batch, config.seed + batch).view(batch, context)
        numbers = engine.admit([UNKNOWN] * batch, [context] * batch)
        times = []
        try:
            with torch.no_grad():
                output = engine.model(input_ids=ids, use_cache=True)
                for step in range(config.repeats + 1):
                    chosen = output.logits[:, -1:].argmax(dim=-1)
                    _synchronize(engine)
                    started = time.perf_counter()
                    output = engine.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
                    _synchronize(engine)
                    if step:
                        times.append(time.perf_counter() - started)
        finally:
            engine.finish(numbers)
        medians.append(float(np.median(times)))
        report("steps", place + 1, len(config.batches))
    return medians


def _swaps(engine: emoe_core.Engine, config: CostsConfig, report: Progress) -> tuple[float, float]:
    """Swap one to all that can be replaced, in some of the layers and in all of them."""
    loader, generator = engine.loader, np.random.default_rng(config.seed)
    capacity = loader.table.capacity
    layers = len(loader.layers)
    replaceable = [min(slots, layer.num_experts - slots) for slots, layer in zip(capacity, loader.layers, strict=True)]
    if not any(replaceable):
        return 0.0, 0.0  # everything is resident, so nothing is ever swapped
    sizes, seconds = [], []
    shares = (0.25, 0.5, 1.0)
    for done, share in enumerate(shares):
        for _ in range(config.repeats):
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


def _prediction(engine: emoe_core.Engine, config: CostsConfig) -> float:
    """Return the seconds of one prediction with its plan: what the control loop counted, over how often it ran."""
    control = engine.control
    before, times = control.prediction_s, []
    tasks = sorted(TASK_TYPES)
    for repeat in range(config.repeats):
        engine.finish(engine.admit([tasks[repeat % len(tasks)]], [64]))
        times.append(control.prediction_s - before)
        before = control.prediction_s
    engine.loader.settle()
    return float(np.median(times))


def _prefill(engine: emoe_core.Engine, ids: torch.Tensor) -> None:
    numbers = engine.admit([UNKNOWN], [ids.shape[1]])
    try:
        with torch.no_grad():
            engine.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        _synchronize(engine)
    finally:
        engine.finish(numbers)


def _random_ids(engine: emoe_core.Engine, count: int, seed: int) -> torch.Tensor:
    vocabulary = engine.model.config.get_text_config().vocab_size
    drawn = np.random.default_rng(seed).integers(vocabulary, size=(1, count))
    return torch.tensor(drawn, device=engine.device)


def _synchronize(engine: emoe_core.Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _settings(config: CostsConfig, engine: emoe_core.Engine) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if name not in ("model", "device")}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return kept | {
        "tolerance": 1.0,
        "dtype": str(engine.index.dtype).removeprefix("torch."),
        "device": engine.device.type,
    }


def costs_of(model: str, progress: Progress | None = None) -> ServingCosts:
    """Return the costs of a model for a notebook: stored ones, or those of the tiny model, measured in seconds.

    Parameters
    ----------
    model : str
        "tiny" (a random model of the tests, measured here and kept), or a name that `stored_costs` knows.
    progress : callable, optional
        Called with (stage, done, total).
    """
    if model != "tiny":
        return stored_costs(resolve_model(model))
    from workbench.reference_model.tiny import cached_tiny_moe

    checkpoint = cached_tiny_moe()
    try:
        return stored_costs(checkpoint)
    except DataError:
        found = measure_costs(CostsConfig(str(checkpoint), source="fixture", prompts=3), progress)
        found.save(costs_path(found.model_hash))
        return found
