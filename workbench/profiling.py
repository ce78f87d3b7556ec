"""Measure task profiles: how far routing may go wrong before a task's output changes (paper, section 3.4, Fig. 5).

With every expert resident, the routers of MoE layers 0..j are made to choose at random (distinct experts, the
router's own weights) and prompts are answered greedily. The similarity of those answers to the undisturbed ones, as a
function of j, is the task's curve; layers before it falls below the threshold are insensitive.

Measured at a few depths; a layer between two of them takes the value of the deeper one, which errs on the side of
calling it sensitive. The profile also keeps each task's mean output length (W_o of Eq. 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import emoe_core
from emoe_core.cache import cache_dir
from emoe_core.errors import DataError, OptionError
from emoe_core.experts import router_of
from emoe_core.tasks import DEFAULT_SIMILARITY_THRESHOLD, TASK_TYPES, Profile, TaskProfile
from workbench.models import REFERENCE, resolve_model
from workbench.similarity import similarity
from workbench.workloads import StreamConfig, prompt_stream

COMMITTED = Path(__file__).parent / "reference_model" / "recipes" / "upcycled" / "profile.json"
BATCH = 10
ProgressCallback = Callable[[int, int], None]


@contextmanager
def random_routing(engine: emoe_core.Engine, layers: int, seed: int = 0) -> Iterator[None]:
    """Make the routers of the first ``layers`` MoE layers choose distinct experts at random while the context lasts.

    Raises
    ------
    OptionError
        When a layer's router is not known, so that it cannot be disturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = []
    for layer in engine.index.layers[:layers]:
        router = router_of(engine.model.get_submodule(layer.name))
        if router is None:
            raise OptionError(f"{engine.index.model_type} cannot be profiled: the router of {layer.name} is not known")

        def scramble(module: torch.nn.Module, args: Any, output: Any, experts: int = layer.num_experts) -> Any:
            place = next(i for i, part in enumerate(output) if not part.is_floating_point())
            index = output[place]
            drawn = torch.rand(index.shape[0], experts, generator=generator).topk(index.shape[1], dim=-1).indices
            return (*output[:place], drawn.to(index.device), *output[place + 1 :])

        hooks.append(router.register_forward_hook(scramble))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_profile(
    model: str | Path = REFERENCE,
    *,
    prompts_per_task: int = 30,
    depths: int = 4,
    threshold: float = DEFAULT_SIMILARITY_THRESHOLD,
    tasks: Sequence[str] = TASK_TYPES,
    max_new_tokens: int = 32,
    source: str = "embedded",
    dtype: str = "float32",
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Profile:
    """Measure the profile of a model on the profile split.

    Parameters
    ----------
    model : str or Path
    prompts_per_task : int
    depths : int
        Numbers of disturbed layers to try, evenly spaced, the last being all.
    threshold : float
        Similarity in [0, 1] below which a layer counts as sensitive.
    tasks : sequence of str
    max_new_tokens : int
    source, dtype, seed
        As in `ExperimentConfig`.
    progress : callable, optional
        Called with (answers done, answers in all).
    """
    if prompts_per_task < 1 or depths < 1:
        raise OptionError("prompts_per_task and depths must be 1 or more")
    digest = hashlib.sha256()
    profiles: dict[str, TaskProfile] = {}
    with emoe_core.load(resolve_model(model), budget="100%", predictor=None, dtype=dtype) as engine:
        layers = len(engine.index.layers)
        tried = sorted({max(1, round(layers * (step + 1) / depths)) for step in range(depths)})
        total, done = len(tasks) * (len(tried) + 1) * prompts_per_task, 0
        for task in tasks:
            stream = StreamConfig((task,), prompts_per_task, "uniform", 8.0, seed, "profile", source)  # type: ignore[arg-type]
            texts = [prompt.text for prompt in prompt_stream(stream)]
            digest.update(json.dumps([task, texts]).encode())

            def answer(texts: list[str] = texts, task: str = task) -> list[emoe_core.Generation]:
                return engine.generate(texts, [task] * len(texts), max_new_tokens=max_new_tokens, batch_size=BATCH)

            undisturbed = answer()
            done += len(texts)
            curve: dict[int, float] = {}
            for depth in tried:
                with random_routing(engine, depth, seed):
                    disturbed = answer()
                pairs = [own.text for own in undisturbed], [other.text for other in disturbed]
                curve[depth] = float(similarity(*pairs).mean())
                done += len(texts)
                if progress is not None:
                    progress(done, total)
            similarities = [curve[min(depth for depth in tried if depth > layer)] for layer in range(layers)]
            length = sum(len(own.token_ids) for own in undisturbed) / len(undisturbed)
            profiles[task] = TaskProfile.from_similarities(task, similarities, length, threshold, len(texts))
        return Profile(engine.index.source_hash, digest.hexdigest(), layers, profiles, threshold)


def profile_path(model_hash: str) -> Path:
    """Return where the measured profile of a model is kept."""
    return cache_dir() / "profiles" / f"{model_hash[:24]}.json"


def stored_profile(checkpoint: str | Path) -> Profile:
    """Return a model's profile: the one measured here, else the one that comes with the reference model.

    Raises
    ------
    DataError
        When there is none; the message says how to measure it.
    """
    from emoe_core.checkpoint import open_checkpoint

    model_hash = open_checkpoint(checkpoint).source_hash
    for path in (profile_path(model_hash), COMMITTED):
        if path.exists():
            profile = Profile.load(path)
            if profile.model_hash == model_hash:
                return profile
    raise DataError(f"{checkpoint} has no task profile yet: measure one with `emoe profile {checkpoint}`")
