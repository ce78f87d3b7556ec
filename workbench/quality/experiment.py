"""One run of the bench: a frozen configuration in, tables and metrics out.

The run plays a prompt stream through an engine under a budget and holds the result against the all-resident model
(`replay/references.py`):

1. Every prompt, with the all-resident model's own continuation, is scored by teacher forcing (one admission each), so
   quality is measured on the same tokens for every configuration.
2. The first ``answers`` prompts are also answered freely, for text similarity and for people to read.
3. On request, memory and times are measured in fresh processes (`measure/memory.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import emoe_core
from emoe_core.config import resolve_device
from emoe_core.errors import ExperimentError
from emoe_core.experts.trace import RoutingTrace
from emoe_core.planning.tasks import Profile
from emoe_core.predictor import TRAINED
from workbench.measure.memory import MemoryMeasurement, as_metrics, measure
from workbench.models.names import resolve_model
from workbench.predictors.bounds import OraclePredictor
from workbench.quality.configuration import ORACLE, ExperimentConfig
from workbench.quality.token_quality import TokenQuality, bootstrap_interval, compare, perplexity_ratio
from workbench.replay.predictor_training import stored_predictor
from workbench.replay.references import Reference, reference_outputs
from workbench.replay.residency import ResidencyWatch, replayed_hit_rates
from workbench.replay.scoring import score
from workbench.systems.option_names import resolve_options
from workbench.tracking.run import Run
from workbench.workloads import Prompt, StreamConfig, prompt_stream, prompts_hash
from workbench.workloads.labels import told_tasks


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes
    ----------
    metrics : dict
        Numbers of the run, units in their names.
    requests : DataFrame
        One row a prompt: task, tokens, quality, routing counters, seconds.
    answers : DataFrame
        Prompt, all-resident text, this run's text, similarity; empty when none were asked for.
    stats : dict
        The engine's own account (`RunStats.to_dict`).
    identity : dict
        Model hash, data hash, dtype, seed.
    residency : DataFrame
        Which experts were resident and wanted, layer by layer (`replay/residency.py`).
    memory, stock : MemoryMeasurement or None
        This configuration, and stock transformers with everything resident, in fresh processes.
    """

    config: ExperimentConfig
    metrics: dict[str, float]
    requests: pd.DataFrame
    answers: pd.DataFrame
    stats: dict[str, Any]
    identity: dict[str, Any]
    residency: pd.DataFrame
    memory: MemoryMeasurement | None = None
    stock: MemoryMeasurement | None = None

    def log(self, run: Run) -> None:
        """Log everything that was found, and how files were read where memory was measured."""
        run.log_metrics(self.metrics)
        for name, table in (("requests", self.requests), ("residency", self.residency), ("answers", self.answers)):
            if len(table):
                run.log_frame(name, table)
        if self.memory is not None:
            run.log_tags({"emoe.page_cache": self.memory.page_cache})


Progress = Callable[[str, int, int], None]


def run_experiment(
    config: ExperimentConfig,
    *,
    profile: Profile | None = None,
    measure_memory: bool = False,
    timing_prompts: int = 3,
    timing_tokens: int = 24,
    timing_dtype: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """Run one configuration.

    Parameters
    ----------
    config : ExperimentConfig
    profile : Profile, optional
        Task profile for ``skipping`` and ``max_quality_loss``; the model's own is used when missing.
    measure_memory : bool
        Also measure memory and times, of this configuration and of stock transformers, in fresh processes.
    timing_prompts, timing_tokens : int
        Prompts timed there, after one warm-up, and tokens generated for each.
    timing_dtype : str
        Dtype there; "auto" is the checkpoint's own.
    progress : callable, optional
        Called with (stage, done, total).
    """
    if measure_memory and config.max_quality_loss is not None:
        raise ExperimentError(
            "memory under a quality target is not measured in a fresh process: measure the budget that it comes to"
        )
    if measure_memory and config.strategy == ORACLE:
        raise ExperimentError("the oracle knows the scored prompts only: it cannot be timed in a fresh process")
    checkpoint = resolve_model(config.model)
    prompts = prompt_stream(config.stream())
    reference = all_resident(config, checkpoint, prompts, "reference", progress)
    warm = warm_trace(config, checkpoint, progress)
    options = config.engine_options()
    if config.skipping or config.max_quality_loss is not None:
        options["profile"] = profile or _stored_profile(config.model)
        options["max_quality_loss"] = config.max_quality_loss
    if config.strategy == TRAINED:
        options["predictor_path"] = str(stored_predictor(config.model))
    told = told_tasks(prompts, config.labels, config.label_error, config.seed)
    if config.strategy == ORACLE:
        future = [(task, reference.trace.counts(place)) for place, task in enumerate(told)]
        options["predictor"] = lambda *shape: OraclePredictor(future, config.interval)
    with emoe_core.load(checkpoint, **resolve_options(options)) as engine:
        if warm is not None:
            engine.warm_start(warm)
        watch = ResidencyWatch(engine)
        rows = score_prompts(engine, prompts, told, reference, config.stepwise, watch, progress)
        # Counters are those of the scored prompts: free answers come after them, and only some runs ask for any.
        stats = engine.stats().to_dict()
        answers = _answer(engine, prompts[: config.answers], told, reference, config.max_new_tokens)
        slots = engine.plan.slots_per_layer
        predicted = {} if engine.quality is None else dict(engine.quality.predicted_loss)
        exact_layers = {} if engine.quality is None else {t: len(v) for t, v in engine.quality.exact.items()}
        found = {"model_hash": engine.index.source_hash, "dtype": str(engine.index.dtype).removeprefix("torch.")}
    requests = pd.DataFrame(rows)
    identity: dict[str, Any] = found | {
        "data_hash": prompts_hash(prompts),
        "reference_hash": reference.hash,
        "seed": config.seed,
    }
    memory = stock = None
    if measure_memory:
        if progress is not None:
            progress("memory", 0, 1)
        common: dict[str, Any] = {"max_new_tokens": timing_tokens}
        texts, tasks = [prompt.text for prompt in prompts[: timing_prompts + 1]], told[: timing_prompts + 1]
        own = {name: value for name, value in options.items() if name != "profile"} | {"dtype": timing_dtype}
        memory = measure(checkpoint, texts, tasks, options=own, warm_trace=warm, **common)
        stock_options = {"implementation": "stock", "dtype": timing_dtype, "device": config.device}
        stock = measure(checkpoint, texts, tasks, options=stock_options, **common)
    metrics = _metrics(requests, answers, stats, memory, stock)
    metrics |= replayed_hit_rates(reference, slots, config.seed)
    metrics |= {f"predicted_loss_{task}": value for task, value in predicted.items()}
    metrics |= {f"exact_layers_{task}": float(count) for task, count in exact_layers.items()}
    residency = watch.frame(reference.trace.counts())
    return Result(config, metrics, requests, answers, stats, identity, residency, memory, stock)


def all_resident(
    config: ExperimentConfig, checkpoint: str | Path, prompts: list[Prompt], stage: str, progress: Progress | None
) -> Reference:
    """Return the all-resident outputs of a run's prompts."""
    return reference_outputs(
        checkpoint,
        [prompt.text for prompt in prompts],
        [prompt.task for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        dtype=config.dtype,
        device=resolve_device(config.device).type,
        progress=None if progress is None else (lambda done, total: progress(stage, done, total)),
    )


def warm_trace(
    config: ExperimentConfig, checkpoint: str | Path, progress: Progress | None = None
) -> RoutingTrace | None:
    """Return the routing that a run's predictor learns from first; None where there is nothing to learn."""
    if config.warm_prompts == 0 or config.strategy in ("random", "lru", ORACLE):
        return None
    # One session per task in turn would teach the last task best: the warm-up is always a uniform mix. It is the same
    # for all seeds, so that they differ in the prompts that are judged (and in residents drawn at random) alone.
    stream = StreamConfig(config.tasks, config.warm_prompts, "uniform", 8.0, 0, "profile", config.stream().source)
    prompts = prompt_stream(stream)
    trace = all_resident(config, checkpoint, prompts, "warm-up", progress).trace
    return replace(trace, tasks=dict(enumerate(told_tasks(prompts, config.labels))))


def _stored_profile(checkpoint: str | Path) -> Profile:
    from workbench.quality.profile.profiling import stored_profile

    return stored_profile(checkpoint)


def score_prompts(
    engine: emoe_core.Engine,
    prompts: list[Prompt],
    told: list[str],
    reference: Reference,
    stepwise: bool,
    watch: ResidencyWatch | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Score prompts by teacher forcing on their references' continuations; return one row a prompt, for a table."""
    head = engine.model.get_output_embeddings()
    rows = []
    for place, (prompt, task, expected) in enumerate(zip(prompts, told, reference.outputs, strict=True)):
        before = engine.stats().counters
        started = time.perf_counter()
        scored = score(engine, [(expected.prompt_ids, expected.token_ids)], [task], stepwise=stepwise)[0]
        elapsed_s = time.perf_counter() - started
        if watch is not None:
            watch.after_prompt()
        counters = engine.stats().counters.since(before)
        with torch.no_grad():
            both = [head(states.to(engine.device)).float().cpu() for states in (expected.hidden, scored.hidden)]
        quality = compare(both[0], both[1], torch.tensor(expected.token_ids))
        row = _row(prompt, expected.prompt_ids, quality, counters, elapsed_s)
        rows.append({**row, "told_task": task, "prompt_hash": prompt.hash, "scored_hash": expected.hash})
        if progress is not None:
            progress("score", place + 1, len(prompts))
    return rows


def _row(
    prompt: Prompt, prompt_ids: tuple[int, ...], quality: TokenQuality, counters: emoe_core.Counters, elapsed_s: float
) -> dict[str, Any]:
    return {
        "request": prompt.request_id,
        "task": prompt.task,
        "prompt_tokens": len(prompt_ids),
        **quality.row(),
        "hit_rate": counters.hit_rate,
        "token_hit_rate": counters.token_hit_rate,
        "loads": counters.loads,
        "reroutes": counters.reroutes,
        "drops": counters.drops,
        "prefetches": counters.prefetches,
        "bytes_loaded": counters.bytes_loaded,
        "stall_s": counters.stall_s,
        "score_s": elapsed_s,
    }


def _answer(
    engine: emoe_core.Engine, prompts: list[Prompt], told: list[str], reference: Reference, max_new_tokens: int
) -> pd.DataFrame:
    if not prompts:
        return pd.DataFrame(columns=["task", "prompt", "all_resident", "answer", "similarity"])
    from workbench.quality.similarity import similarity

    texts = [prompt.text for prompt in prompts]
    answers = engine.generate(texts, told[: len(prompts)], max_new_tokens=max_new_tokens)
    expected = [output.text for output in reference.outputs[: len(prompts)]]
    given = [answer.text for answer in answers]
    return pd.DataFrame(
        {
            "task": [prompt.task for prompt in prompts],
            "prompt": texts,
            "all_resident": expected,
            "answer": given,
            "similarity": similarity(expected, given),
            "ttft_s": [answer.ttft_s for answer in answers],
            "tpot_s": [answer.tpot_s for answer in answers],
        }
    )


def quality_metrics(requests: pd.DataFrame) -> dict[str, float]:
    """Return the quality of a run: means over tokens of its table of prompts, and a 95% interval over prompts."""
    tokens = requests["output_tokens"].to_numpy()
    loss = requests["log_ratio_nats"].to_numpy()
    low, high = bootstrap_interval(loss, tokens)
    return {
        "perplexity_ratio": perplexity_ratio(np.repeat(loss, tokens)),
        "perplexity_ratio_low": float(np.exp(low)),
        "perplexity_ratio_high": float(np.exp(high)),
        "kl_nats": float(np.average(requests["kl_nats"], weights=tokens)),
        "top1_agreement": float(np.average(requests["top1_agreement"], weights=tokens)),
        "scored_tokens": float(tokens.sum()),
        "prompts": float(len(requests)),
    }


def _metrics(
    requests: pd.DataFrame,
    answers: pd.DataFrame,
    stats: dict[str, Any],
    memory: MemoryMeasurement | None,
    stock: MemoryMeasurement | None,
) -> dict[str, float]:
    metrics = quality_metrics(requests)
    for name in ("hit_rate", "token_hit_rate", "slot_share", "slot_bytes", "expert_bytes", "dense_bytes"):
        metrics[name] = float(stats[name])
    for name in ("lookups", "hits", "loads", "reroutes", "drops", "prefetches", "evictions"):
        metrics[name] = float(stats[name])
    for name in ("bytes_loaded", "wasted_bytes", "stall_s", "swap_s", "prediction_s", "predictions", "swaps"):
        metrics[name] = float(stats[name])
    if len(answers):
        metrics["similarity"] = float(answers["similarity"].mean())
        metrics["similarity_prompts"] = float(len(answers))
    if memory is not None and stock is not None:
        metrics |= {f"fresh_{name}": value for name, value in as_metrics(memory).items()}
        metrics |= {f"stock_{name}": value for name, value in as_metrics(stock).items()}
        # Of serving peaks: what either needs while it loads is told apart.
        metrics["memory_ratio"] = memory.serving_bytes / stock.serving_bytes
        metrics["tpot_ratio"] = memory.tpot_s / stock.tpot_s
        metrics["ttft_ratio"] = memory.ttft_s / stock.ttft_s
        metrics["others_cpu_share"] = max(memory.others_cpu_share, stock.others_cpu_share)
    return metrics
