"""Measure task profiles: output lengths, and how far routing may go wrong before a task's output changes.

With every expert resident, three things are measured per task on the profile split (terms: `emoe_core.planning.tasks`):

* output lengths: greedy answers of at most ``length_cap_tokens`` (W_o of Eq. 2; Fig. 4);
* the curve of the paper's section 3.4 (Fig. 5): the first j MoE layers are routed at random and prompts are answered
  greedily; the similarity of those answers to the undisturbed ones;
* a finer one: each layer alone routed at random, and the KL divergence (nats per token) of the output distribution,
  scored on the undisturbed answer;
* for quality targets: coverage and a loss scale (`coverage.py`); `extend_profile` adds them to a profile without.

Undisturbed answers are `reference_outputs`. What is measured is kept cell by cell (a task, a depth and a batch of
prompts; or a prompt's divergences), so an interrupted profile goes on where it stopped and a longer one reuses it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import DataError, OptionError
from emoe_core.files import write_whole
from emoe_core.loader.cache_folder import cache_dir
from emoe_core.planning.tasks import DEFAULT_SIMILARITY_THRESHOLD, LENGTH_QUANTILES, TASK_TYPES, Profile, TaskProfile
from workbench.models.names import resolve_model
from workbench.models.reference import RECIPES
from workbench.quality.profile.coverage import extend
from workbench.quality.profile.disturbance import layer_divergences, random_routing
from workbench.quality.profile.masks import mask_by_similarity
from workbench.quality.similarity import similarity
from workbench.quality.token_quality import bootstrap_interval
from workbench.replay.references import Reference, ReferenceOutput, reference_outputs
from workbench.workloads import StreamConfig, prompt_stream

CELL_FORMAT = 1
BATCH = 10
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProfileConfig:
    """What a profile depends on.

    Attributes
    ----------
    model : str
    prompts : int
        Prompts of each task for lengths and similarities.
    kl_prompts : int
        How many of these for the divergence of single layers; 0 leaves it out.
    depths : int
        Numbers of disturbed leading layers to try, evenly spaced, the last being all.
    threshold : float
        Similarity in [0, 1] below which a layer counts as sensitive.
    tasks : tuple of str
    max_new_tokens : int
        Tokens of the answers that are compared.
    length_cap_tokens : int
        Tokens after which an answer is cut when its length is measured.
    source, dtype, seed
        As in `ExperimentConfig`.
    """

    model: str = "reference"
    prompts: int = 20
    kl_prompts: int = 4
    depths: int = 6
    threshold: float = DEFAULT_SIMILARITY_THRESHOLD
    tasks: tuple[str, ...] = TASK_TYPES
    max_new_tokens: int = 32
    length_cap_tokens: int = 96
    source: str = "embedded"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.depths < 1:
            raise OptionError("prompts and depths must be 1 or more")
        if not 0 <= self.kl_prompts <= self.prompts:
            raise OptionError(f"kl_prompts must be between 0 and the number of prompts ({self.prompts})")
        if not 1 <= self.max_new_tokens <= self.length_cap_tokens:
            raise OptionError("max_new_tokens must be 1 or more, and length_cap_tokens no less")
        if not 0.0 <= self.threshold <= 1.0:
            raise OptionError(f"threshold {self.threshold} is outside 0..1; the usual value is 0.85")

    def texts(self, task: str) -> list[str]:
        """Return the prompts of a task, from the profile split."""
        stream = StreamConfig((task,), self.prompts, "uniform", 8.0, self.seed, "profile", self.source)  # type: ignore[arg-type]
        return [prompt.text for prompt in prompt_stream(stream)]

    def loss_slots(self, checkpoint: str | Path) -> tuple[int, ...]:
        """Return the slots a layer at which the loss scale is measured: half of the experts, at least top-k."""
        index = open_checkpoint(checkpoint)
        return (max(index.top_k, max(layer.num_experts for layer in index.layers) // 2),)

    def settings(self) -> dict[str, Any]:
        """Return what the profile file records about how it was measured."""
        kept = ("max_new_tokens", "length_cap_tokens", "source", "dtype", "seed")
        return {name: value for name, value in asdict(self).items() if name in kept}


def measure_profile(config: ProfileConfig, progress: Progress | None = None) -> Profile:
    """Measure the profile of a model.

    Parameters
    ----------
    config : ProfileConfig
    progress : callable, optional
        Called with (stage, done, total).
    """
    checkpoint = resolve_model(config.model)
    texts = {task: config.texts(task) for task in config.tasks}
    # Before the engine is loaded, so that two copies of the model are never resident at once.
    references = _undisturbed(config, checkpoint, texts, progress)
    outputs = {task: reference.outputs for task, reference in references.items()}
    with emoe_core.load(checkpoint, budget="100%", predictor=None, dtype=config.dtype) as engine:
        layers = len(engine.index.layers)
        depths = sorted({max(1, round(layers * (step + 1) / config.depths)) for step in range(config.depths)})
        answers = _Count("disturbed answers", len(config.tasks) * len(depths) * config.prompts, progress)
        measured: dict[str, dict[str, Any]] = {}
        for task in config.tasks:
            cells = _Cells(engine, config, task)
            curve = {depth: cells.similarities(depth, texts[task], outputs[task], answers) for depth in depths}
            intervals = tuple(bootstrap_interval(values) for values in curve.values())
            measured[task] = {
                "depths": tuple(depths),
                "similarities": tuple(float(np.mean(values)) for values in curve.values()),
                "similarity_intervals": intervals if np.isfinite(intervals).all() else (),
            }
        passes = _Count("single layers", len(config.tasks) * config.kl_prompts * layers, progress)
        for task in config.tasks:
            cells = _Cells(engine, config, task)
            rows = [cells.divergences(output, passes) for output in outputs[task][: config.kl_prompts]]
            means = tuple(float(value) for value in np.mean(rows, axis=0)) if rows else ()
            measured[task] |= {"layer_kl_nats": means, "n_kl_prompts": len(rows)}
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
        profiles = {task: _task_profile(config, task, layers, outputs[task], measured[task]) for task in config.tasks}
        profile = Profile(engine.index.source_hash, digest, layers, profiles, config.threshold, config.settings())
    return extend(checkpoint, profile, references, config.loss_slots(checkpoint), {"dtype": config.dtype}, progress)


def extend_profile(profile: Profile, config: ProfileConfig, progress: Progress | None = None) -> Profile:
    """Return a stored profile with coverage and loss scales measured; its other measurements are not repeated.

    Parameters
    ----------
    profile : Profile
        Of the model that ``config`` names.
    config : ProfileConfig
        Of its fields, only model, prompts, length_cap_tokens, source, dtype, seed and tasks matter.
    progress : callable, optional
        Called with (stage, done, total).
    """
    checkpoint = resolve_model(config.model)
    profile.require_model(open_checkpoint(checkpoint).source_hash)
    tasks = [task for task in profile.tasks if task in config.tasks]
    references = _undisturbed(config, checkpoint, {task: config.texts(task) for task in tasks}, progress)
    extended = extend(
        checkpoint,
        replace(profile, tasks={task: profile.tasks[task] for task in tasks}),
        references,
        config.loss_slots(checkpoint),
        {"dtype": config.dtype},
        progress,
    )
    return replace(profile, tasks={**profile.tasks, **extended.tasks})


def _undisturbed(
    config: ProfileConfig, checkpoint: str | Path, texts: dict[str, list[str]], progress: Progress | None
) -> dict[str, Reference]:
    """Return each task's all-resident answers of at most ``length_cap_tokens``."""
    report = None if progress is None else partial(progress, "answers")
    options: dict[str, Any] = {"max_new_tokens": config.length_cap_tokens, "dtype": config.dtype, "progress": report}
    # All at once first: what is missing is then answered in one process.
    pairs = [(text, task) for task, some in texts.items() for text in some]
    reference_outputs(checkpoint, *zip(*pairs, strict=True), **options)
    return {task: reference_outputs(checkpoint, some, [task] * len(some), **options) for task, some in texts.items()}


def _task_profile(
    config: ProfileConfig, task: str, layers: int, outputs: Sequence[ReferenceOutput], measured: dict[str, Any]
) -> TaskProfile:
    lengths = np.array([len(output.token_ids) for output in outputs])
    found = TaskProfile(
        task,
        (True,) * layers,
        float(lengths.mean()),
        length_quantiles_tokens=tuple(float(value) for value in np.quantile(lengths, LENGTH_QUANTILES)),
        length_cap_tokens=config.length_cap_tokens,
        capped_share=float((lengths >= config.length_cap_tokens).mean()),
        n_prompts=len(outputs),
        **measured,
    )
    return replace(found, sensitive=mask_by_similarity(found, config.threshold))


@dataclass
class _Count:
    """One stage's progress."""

    stage: str
    total: int
    report: Progress | None
    done: int = field(default=0)

    def add(self, items: int = 1) -> None:
        self.done += items
        if self.report is not None:
            self.report(self.stage, self.done, self.total)


class _Cells:
    """Measurements of one task, each kept in a file under a hash of what it depends on."""

    def __init__(self, engine: emoe_core.Engine, config: ProfileConfig, task: str) -> None:
        self.engine = engine
        self.config = config
        self.task = task

    def similarities(
        self, depth: int, texts: Sequence[str], outputs: Sequence[ReferenceOutput], count: _Count
    ) -> np.ndarray:
        """Return each prompt's similarity of the answers with and without disturbance, [n]."""
        found: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            expected = [self._beginning(output) for output in outputs[start : start + BATCH]]
            content = {"depth": depth, "task": self.task, "texts": batch, "expected": expected}
            found += self._cell(content, partial(self._answer_disturbed, depth, batch, expected))
            count.add(len(batch))
        return np.array(found)

    def divergences(self, output: ReferenceOutput, count: _Count) -> list[float]:
        """Return a prompt's divergence per layer, nats per token."""
        ids = (list(output.prompt_ids), list(output.token_ids[: self.config.max_new_tokens]))
        before = count.done
        found = self._cell({"ids": ids}, lambda: layer_divergences(self.engine, *ids, self.config.seed, count.add))
        count.add(len(found) - (count.done - before))
        return found

    def _answer_disturbed(self, depth: int, texts: list[str], expected: list[str]) -> list[float]:
        with random_routing(self.engine, range(depth), self.config.seed):
            given = self.engine.generate(
                texts, [self.task] * len(texts), max_new_tokens=self.config.max_new_tokens, batch_size=BATCH
            )
        return [float(value) for value in similarity(expected, [answer.text for answer in given])]

    def _beginning(self, output: ReferenceOutput) -> str:
        """Return the text of an undisturbed answer as far as disturbed ones go (greedy: a prefix of the longer)."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        return str(tokenizer.decode(list(output.token_ids[: self.config.max_new_tokens]), skip_special_tokens=True))

    def _cell(self, content: dict[str, Any], compute: Callable[[], list[float]]) -> list[float]:
        key = content | {
            "format": CELL_FORMAT,
            "model": self.engine.index.source_hash,
            "dtype": self.config.dtype,
            "max_new_tokens": self.config.max_new_tokens,
            "seed": self.config.seed,
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = cache_dir() / "profiles" / "cells" / f"{name}.json"
        try:
            return [float(value) for value in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            pass  # absent, or damaged: measured again
        values = compute()
        write_whole(path, json.dumps(values))
        return values


def profile_path(model_hash: str) -> Path:
    """Return where the measured profile of a model is kept."""
    return cache_dir() / "profiles" / f"{model_hash[:24]}.json"


def stored_profile(model: str | Path) -> Profile:
    """Return a model's profile: the one measured here, else the one that comes with an embedded model.

    Parameters
    ----------
    model : str or Path
        As for `resolve_model`; errors name it so.

    Raises
    ------
    DataError
        When there is none; the message says how to measure it.
    ProfileError
        When the one measured here is damaged or of an older format.
    """
    model_hash = open_checkpoint(resolve_model(model)).source_hash
    for path in (profile_path(model_hash), *sorted(RECIPES.glob("*/profile.json"))):
        if path.exists():
            profile = Profile.load(path)
            if profile.model_hash == model_hash:
                return profile
    raise DataError(f"{model} has no task profile yet: measure one with `emoe model profile {shlex.quote(str(model))}`")
