"""Everything that recorded routing says of the next experts, measured at once, as tables (`patterns`, `cache`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from emoe_core.experts.trace import RoutingTrace
from workbench.replay import patterns
from workbench.replay.accesses import RoutingRecord, record_accesses
from workbench.replay.cache import simulate
from workbench.replay.prediction import PromptUse, prompt_uses
from workbench.replay.recording import Progress, RecordingConfig
from workbench.tracking.findings import Findings
from workbench.workloads import prompt_stream

EVERY_TASK = "all tokens"
PROMPT_LAGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
TOKEN_LAGS = (1, 2, 4, 8, 12, 16, 20)


def measure_patterns(
    config: RecordingConfig, slot_shares: Sequence[float], batch_size: int, progress: Progress
) -> Findings:
    """Record the routing of a uniform and a sticky stream, and return what it says.

    Parameters
    ----------
    config : RecordingConfig
    slot_shares : sequence of float
        Cache sizes, as shares of a layer's experts.
    batch_size : int
        Prompts that the simulated cache serves together.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Findings
        Of the uniform stream ``shares`` (task, layer, expert, share), ``mass`` (`patterns.mass_of_best`),
        ``association`` (of, layer, cramers_v: of all tokens, and of each task's), ``transitions`` (of the two tasks
        with most prompts, out of a middle layer: task, layer, expert, next_expert, tokens), ``reuse`` (lag, reuse,
        chance) and ``pairs`` (of two prompts: tasks, correlation); of both streams ``by_lag`` (lag, and the likeness
        of routing and words by stream) and ``simulation`` (`cache.simulate`).
    """
    recorded = record_accesses(config, batch_size=batch_size, progress=progress)
    uniform = recorded.references["uniform"].trace
    uses = {mix: prompt_uses(reference.trace) for mix, reference in recorded.references.items()}
    lags = [lag for lag in PROMPT_LAGS if lag < config.n_prompts]
    by_lag = pd.DataFrame(
        {f"routing, {mix}": patterns.prompt_correlation(used, lags) for mix, used in uses.items()}
        | {f"words, {mix}": _word_likeness(config, mix, [use.task for use in used], lags) for mix, used in uses.items()}
    )
    apart = range(1, config.n_prompts)
    pairs = {
        "the same task": patterns.prompt_correlation(uses["uniform"], apart, same_task=True).mean(),
        "different tasks": patterns.prompt_correlation(uses["uniform"], apart, same_task=False).mean(),
    }
    names = [use.task for use in uses["uniform"]]
    tables = {
        "shares": _shares(uses["uniform"]),
        "mass": patterns.mass_of_best(uses["uniform"]).reset_index(),
        "association": _association(uniform, sorted(set(names))),
        "transitions": _transitions(uniform, sorted(set(names), key=lambda task: (-names.count(task), task))[:2]),
        "by_lag": by_lag.rename_axis("lag").reset_index(),
        "pairs": pd.DataFrame({"tasks": pairs.keys(), "correlation": pairs.values()}),
        "reuse": _reuse(config, recorded, batch_size),
        "simulation": _simulation(config, recorded, slot_shares, progress),
    }
    identity = {
        "model_hash": recorded.model_hash,
        "data_hash": recorded.data_hash,
        "dtype": config.dtype,
        "seed": config.seed,
    }
    return Findings(tables, identity, config.n_prompts)


def _word_likeness(config: RecordingConfig, mix: str, tasks: Sequence[str], lags: Sequence[int]) -> pd.Series:
    return patterns.text_similarity([prompt.text for prompt in prompt_stream(config.stream(mix))], tasks, lags)


def _shares(uses: Sequence[PromptUse]) -> pd.DataFrame:
    parts = []
    for task, shares in patterns.task_shares(uses).items():
        layer, expert = np.indices(shares.shape)
        parts.append(pd.DataFrame({"task": task, "layer": layer.ravel(), "expert": expert.ravel()}))
        parts[-1]["share"] = shares.ravel()
    return pd.concat(parts, ignore_index=True)


def _association(trace: RoutingTrace, tasks: Sequence[str]) -> pd.DataFrame:
    rows = [
        {"of": task or EVERY_TASK, "layer": layer, "cramers_v": patterns.cramers_v(table)}
        for task in (None, *tasks)
        for layer, table in enumerate(patterns.layer_transitions(trace, task))
    ]
    return pd.DataFrame(rows)


def _transitions(trace: RoutingTrace, tasks: Sequence[str]) -> pd.DataFrame:
    middle = trace.chosen.shape[1] // 2
    parts = []
    for task in tasks:
        counts = patterns.layer_transitions(trace, task)[middle]
        expert, following = np.indices(counts.shape)
        part = {"task": task, "layer": middle, "expert": expert.ravel(), "next_expert": following.ravel()}
        parts.append(pd.DataFrame({**part, "tokens": counts.ravel()}))
    return pd.concat(parts, ignore_index=True)


def _reuse(config: RecordingConfig, recorded: RoutingRecord, batch_size: int) -> pd.DataFrame:
    # Of a batch's steps nobody can say which token needed what.
    single = recorded if batch_size == 1 else record_accesses(config)
    lags = [lag for lag in TOKEN_LAGS if lag < config.max_new_tokens - 1]
    reuse, chance = patterns.token_reuse(single.streams["uniform"], lags, seed=config.seed)
    return reuse.rename_axis("lag").reset_index().assign(chance=chance)


def _simulation(
    config: RecordingConfig, recorded: RoutingRecord, slot_shares: Sequence[float], progress: Progress
) -> pd.DataFrame:
    layers, experts = recorded.streams["uniform"].layers, recorded.streams["uniform"].experts
    sizes = sorted({max(1, round(share * experts)) for share in slot_shares})
    return simulate(
        recorded.streams,
        {f"{slots} slots": [slots] * layers for slots in sizes},
        warm=recorded.warm,
        expert_bytes=recorded.expert_bytes,
        seed=config.seed,
        progress=lambda done, total: progress("replays", done, total),
    )
