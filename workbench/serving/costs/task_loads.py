"""What the requests of each task look like to a service: lengths of prompts and answers, and who computes them.

Shares of experts come from prompts and first tokens run here, lengths of answers from the model's task profile where
there is one, else from the short answers run here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import emoe_core
from emoe_core.errors import DataError, OptionError
from emoe_core.generation import encode
from emoe_core.planning.tasks import LENGTH_QUANTILES, TASK_TYPES, Profile, TaskProfile
from emoe_core.scheduler.costs import TaskLoad
from workbench.quality.profile.profiling import stored_profile
from workbench.workloads import StreamConfig, prompt_stream

LENGTH_SAMPLES = 19
Progress = Callable[[str, int, int], None]


def task_loads(
    engine: emoe_core.Engine,
    profile: Profile | None,
    prompts: int,
    answer_tokens: int,
    source: str,
    seed: int,
    report: Progress,
) -> dict[str, TaskLoad]:
    """Return the load of each task, from some prompts of the profile split; the engine must record its routing."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise OptionError(f"{engine.index.path} has no tokenizer: save one beside the weights")
    loads = {}
    for place, task in enumerate(TASK_TYPES):
        stream = StreamConfig((task,), prompts, "uniform", 8.0, seed, "profile", source)  # type: ignore[arg-type]
        texts = [prompt.text for prompt in prompt_stream(stream)]
        engine.forget_trace()
        answers = engine.generate(texts, [task] * len(texts), max_new_tokens=answer_tokens)
        trace = engine.trace()
        counts = np.sum([trace.counts(request) for request in trace.tasks], axis=0)
        shares = counts / counts.sum(axis=1, keepdims=True)
        entry = None if profile is None else profile.tasks.get(task)
        lengths = sorted(len(answer.token_ids) for answer in answers) if entry is None else _lengths(entry)
        loads[task] = TaskLoad(
            tuple(sorted(len(encode(tokenizer, text)) for text in texts)),
            tuple(lengths),
            max(1.0, float(np.mean(lengths)) if entry is None else entry.expected_output_tokens),
            tuple(tuple(round(float(value), 5) for value in row) for row in shares),
        )
        report("tasks", place + 1, len(TASK_TYPES))
    engine.forget_trace()
    return loads


def task_tokens(engine: emoe_core.Engine, source: str, split: str, seed: int, prompts: int = 4) -> dict[str, list[int]]:
    """Return token ids of some prompts of each task, one behind the other: real text, to be `cut` to any length."""
    if engine.tokenizer is None:
        raise OptionError(f"{engine.index.path} has no tokenizer: save one beside the weights")
    tokens = {}
    for task in TASK_TYPES:
        stream = StreamConfig((task,), prompts, "uniform", 8.0, seed, split, source)  # type: ignore[arg-type]
        tokens[task] = [token for prompt in prompt_stream(stream) for token in encode(engine.tokenizer, prompt.text)]
    return tokens


def cut(tokens: Sequence[int], count: int) -> list[int]:
    """Return the first tokens of a text, which starts anew where it is too short."""
    return (list(tokens) * (count // len(tokens) + 1))[:count]


def _lengths(entry: TaskProfile) -> list[int]:
    """Return samples of a task's output length: its profile's quantiles, joined by lines from 1 token to the cap."""
    if not entry.length_quantiles_tokens:
        return [max(1, round(entry.expected_output_tokens))]
    longest = max(entry.length_cap_tokens, entry.length_quantiles_tokens[-1])
    places = np.linspace(0, 1, LENGTH_SAMPLES + 2)[1:-1]
    known = (0.0, *LENGTH_QUANTILES, 1.0)
    return [
        max(1, round(float(value)))
        for value in np.interp(places, known, (1.0, *entry.length_quantiles_tokens, longest))
    ]


def profile_of(checkpoint: str | Path) -> Profile | None:
    """Return a model's task profile, None where it has none yet."""
    try:
        return stored_profile(checkpoint)
    except DataError:
        return None
