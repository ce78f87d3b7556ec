"""Measure serving costs on the real engine: prompts, decode steps by batch size, swaps.

Terms are those of `emoe_core.scheduler.costs`.

The engine is loaded under a budget at tolerance 1, as it serves when experts move only between steps; a first pass over
everything warms it, and then its times are taken (`times.py`).

Each task's lengths and expert shares come from prompts of the profile split: shares from prompts and first tokens,
lengths of answers from the model's task profile where there is one, else from short answers measured here.

Times on a busy machine are wrong; the file records how busy it was.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import DataError, OptionError
from emoe_core.scheduler.costs import ServingCosts
from workbench.machine.busy import OtherWork
from workbench.machine.environment import describe_environment
from workbench.models.names import TINY, resolve_model
from workbench.models.reference import RECIPES
from workbench.quality.profile.profiling import profile_path
from workbench.serving.costs.task_loads import profile_of, task_loads
from workbench.serving.costs.times import measure_times

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
    batches: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
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
        times = measure_times(
            engine,
            prompt_tokens=config.prompt_tokens,
            batches=config.batches,
            repeats=config.repeats,
            source=config.source,
            seed=config.seed,
            progress=report,
        )
        environment = {
            key: value for key, value in describe_environment().to_dict().items() if key in KEPT_OF_ENVIRONMENT
        }
        return ServingCosts(
            model_hash=engine.index.source_hash,
            **asdict(times),
            slots_per_layer=tuple(engine.plan.slots_per_layer),
            kv_token_bytes=engine.memory(1, 1).kv_bytes,
            tasks=tasks,
            settings=_settings(config, engine),
            environment=environment | {"others_cpu_share": others.share()},
        )


def costs_path(model_hash: str) -> Path:
    """Return where the measured costs of a model are kept: beside its profile."""
    return profile_path(model_hash).with_suffix(".costs.json")


def stored_costs(model: str | Path) -> ServingCosts:
    """Return a model's costs: those measured here, else those that come with an embedded model.

    Parameters
    ----------
    model : str or Path
        As for `resolve_model`; errors name it so.

    Raises
    ------
    DataError
        When there are none; the message says how to measure them.
    CostsError
        When those measured here are damaged or of another format.
    """
    model_hash = open_checkpoint(resolve_model(model)).source_hash
    here = costs_path(model_hash)
    if here.exists():
        return ServingCosts.load(here, model_hash)
    for path in sorted(RECIPES.glob("*/costs.json")):
        costs = ServingCosts.load(path)
        if costs.model_hash == model_hash:
            return costs
    raise DataError(f"{model} has no serving costs yet: measure them with `emoe model costs {shlex.quote(str(model))}`")


def _settings(config: CostsConfig, engine: emoe_core.Engine) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if name not in ("model", "device")}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return kept | {
        "tolerance": 1.0,
        "dtype": str(engine.index.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "one_at_a_time": engine.one_at_a_time,
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
    if model != TINY:
        return stored_costs(model)
    try:
        return stored_costs(model)
    except DataError:
        found = measure_costs(CostsConfig(model, source="fixture", prompts=3), progress)
        found.save(costs_path(found.model_hash))
        return found
