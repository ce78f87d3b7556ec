"""Several configurations on the same prompts, in one table: what a notebook that argues a claim starts from.

Quality is compared prompt by prompt (`paired_difference`), so that hard prompts do not hide what a method does. Times
are compared in rounds (`timed`): every variant once a round, in fresh processes, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from emoe_core.config import EngineConfig
from emoe_core.errors import ExperimentError, OptionError
from workbench.measure.memory import MemoryMeasurement, measure
from workbench.models.names import resolve_model
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.experiment import all_resident, quality_metrics, run_experiment, warm_trace
from workbench.quality.quantized import BITS_PER_WEIGHT, score_quantized
from workbench.quality.token_quality import bootstrap_interval
from workbench.tracking.findings import Findings
from workbench.workloads import prompt_stream

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """Variants that were run on the same prompts.

    Attributes
    ----------
    summary : DataFrame
        One row a variant: ``label``, the fields of its configuration, its metrics.
    requests : DataFrame
        One row a (variant, prompt): ``label``, and as `Result.requests`.
    answers : DataFrame
        One row a (variant, answered prompt); empty when none were asked for.
    residency : DataFrame
        One row a (variant, layer, expert): ``label``, and as `Result.residency`.
    identity : dict
        Model hash, data hash, dtype, seed; of the last stream where variants differ in it.
    """

    summary: pd.DataFrame
    requests: pd.DataFrame
    answers: pd.DataFrame
    identity: dict[str, Any]
    residency: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __add__(self, other: Comparison) -> Comparison:
        """Put two comparisons in one."""
        pairs = (
            (self.summary, other.summary),
            (self.requests, other.requests),
            (self.answers, other.answers),
            (self.residency, other.residency),
        )
        # An empty table has no columns: joining it would only change types.
        summary, requests, answers, residency = (
            pd.concat([frame for frame in pair if len(frame)] or [pair[0]], ignore_index=True) for pair in pairs
        )
        return Comparison(summary, requests, answers, self.identity | other.identity, residency)

    def findings(self, **more: pd.DataFrame | None) -> Findings:
        """Return the tables, and more of them, as a notebook draws and logs them."""
        tables = {name: getattr(self, name) for name in ("summary", "requests", "residency", "answers")} | more
        found = {name: table for name, table in tables.items() if table is not None and len(table)}
        return Findings(found, self.identity, int(self.summary["prompts"].max()))


def run_variants(variants: Mapping[str, ExperimentConfig], progress: Progress | None = None) -> Comparison:
    """Run configurations one after another.

    Parameters
    ----------
    variants : mapping of str to ExperimentConfig
        By label.
    progress : callable, optional
        Called with (stage, done, total); the stage "variants" counts those that are through.
    """
    if not variants:
        raise OptionError("there is nothing to compare: name at least one variant")
    rows, requests, answers, residency = [], [], [], []
    identity: dict[str, Any] = {}
    for done, (label, config) in enumerate(variants.items()):
        result = run_experiment(config)
        rows.append({"label": label, **_fields(config), **result.metrics})
        requests.append(result.requests.assign(label=label))
        residency.append(result.residency.assign(label=label))
        if len(result.answers):
            answers.append(result.answers.assign(label=label))
        identity |= result.identity
        if progress is not None:
            progress("variants", done + 1, len(variants))
    return Comparison(
        pd.DataFrame(rows),
        pd.concat(requests, ignore_index=True),
        pd.concat(answers, ignore_index=True) if answers else pd.DataFrame(),
        identity,
        pd.concat(residency, ignore_index=True),
    )


def measure_variants(variants: Mapping[str, ExperimentConfig], progress: Progress) -> Findings:
    """Run configurations one after another and return what a notebook draws of them."""
    return run_variants(variants, progress).findings()


def run_quantized(config: ExperimentConfig, formats: Iterable[str], progress: Progress | None = None) -> Comparison:
    """Run the prompts of a configuration with every expert resident in a quantised format instead.

    ``expert_memory_share`` of the summary is the format's size over 16-bit experts.
    """
    prompts = prompt_stream(config.stream())
    checkpoint = resolve_model(config.model)
    reference = all_resident(config, checkpoint, prompts, "reference", progress)
    rows, requests, answers = [], [], []
    for name in formats:
        scored, texts = score_quantized(
            checkpoint, name, prompts, reference,
            answers=config.answers, max_new_tokens=config.max_new_tokens, dtype=config.dtype, progress=progress,
        )  # fmt: skip
        metrics = quality_metrics(scored)
        if texts:
            from workbench.quality.similarity import similarity

            expected = [output.text for output in reference.outputs[: len(texts)]]
            found = {"task": [p.task for p in prompts[: len(texts)]], "all_resident": expected, "answer": texts}
            answers.append(pd.DataFrame({**found, "similarity": similarity(expected, texts)}).assign(label=name))
            metrics |= {"similarity": float(answers[-1]["similarity"].mean()), "similarity_prompts": float(len(texts))}
        size = {"expert_memory_share": BITS_PER_WEIGHT[name] / 16}
        rows.append(
            {"label": name, **_fields(config), "strategy": name, "budget": None, "tolerance": 0.0, **metrics, **size}
        )
        requests.append(scored.assign(label=name))
    return Comparison(
        pd.DataFrame(rows),
        pd.concat(requests, ignore_index=True) if requests else pd.DataFrame(),
        pd.concat(answers, ignore_index=True) if answers else pd.DataFrame(),
        {},
    )


def variant_metrics(summary: pd.DataFrame, names: Iterable[str]) -> dict[str, float]:
    """Return metrics of every variant of a summary, each behind its label: ``sticky_p8_kl_nats``, ``lru_50pct_...``."""
    spelled = (("%", "pct"), (", p=", "_p"), (", ", "_"), (" ", "_"), ("-", "_"))
    found: dict[str, float] = {}
    for row in summary.to_dict("records"):
        label = row["label"]
        for mark, text in spelled:
            label = label.replace(mark, text)
        found |= {f"{label}_{name}": row[name] for name in names if pd.notna(row.get(name))}
    return found


def paired_difference(requests: pd.DataFrame, label: str, baseline: str, column: str) -> tuple[float, float, float]:
    """Return the mean difference of two variants over their common prompts, and its 95% bootstrap interval.

    Too few prompts for an interval leave it NaN (`quality.LEAST_PROMPTS`).

    Parameters
    ----------
    requests : DataFrame
        Of a `Comparison`.
    label, baseline : str
        The result is label minus baseline.
    column : str
        ``kl_nats``, ``log_ratio_nats``, ...; weighted by output tokens.
    """
    first, second = (requests[requests["label"] == name].set_index("request") for name in (label, baseline))
    common = first.index.intersection(second.index)
    if common.empty:
        raise ExperimentError(f"{label!r} and {baseline!r} have no prompt in common: they cannot be compared")
    difference = (first.loc[common, column] - second.loc[common, column]).to_numpy(dtype=float)
    tokens = first.loc[common, "output_tokens"].to_numpy(dtype=float)
    if not (first.loc[common, ["task", "output_tokens"]] == second.loc[common, ["task", "output_tokens"]]).all(
        axis=None
    ):
        raise ExperimentError(f"{label!r} and {baseline!r} were run on different prompts: they cannot be compared")
    return float(np.average(difference, weights=tokens)), *bootstrap_interval(difference, tokens)


def timed(
    variants: Mapping[str, Mapping[str, Any]],
    config: ExperimentConfig,
    *,
    prompts: int,
    tokens: int,
    rounds: int,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure memory and times of variants in fresh processes, interleaved.

    Parameters
    ----------
    variants : mapping of str to options
        Options of `emoe_core.load` by label, or ``{"implementation": "stock"}``. The first is the one that the others
        are compared with.
    config : ExperimentConfig
        Names the model and the prompts; predictors are warmed with its warm-up.
    prompts, tokens : int
        Prompts timed after one to warm up, and tokens generated for each.
    rounds : int
        How often each variant is measured.

    Returns
    -------
    DataFrame
        One row a variant: medians over rounds of ``serving_bytes, ttft_s, tpot_s, stall_share, bytes_loaded``, the
        largest ``others_cpu_share``, ``page_cache``; and of the ratios to the first variant within each round the
        medians ``serving_ratio, ttft_ratio, tpot_ratio`` and the range ``tpot_ratio_low, tpot_ratio_high``.
    """
    stream = prompt_stream(config.stream(n_prompts=prompts + 1))
    checkpoint = resolve_model(config.model)
    warm = warm_trace(config, checkpoint)
    found: dict[str, list[MemoryMeasurement]] = {label: [] for label in variants}
    for number in range(rounds):
        for place, (label, options) in enumerate(variants.items()):
            uses_history = options.get("predictor", EngineConfig.predictor) is not None
            found[label].append(
                measure(
                    checkpoint,
                    [prompt.text for prompt in stream],
                    [prompt.task for prompt in stream],
                    options=dict(options),
                    warm_trace=warm if uses_history else None,
                    max_new_tokens=tokens,
                )
            )
            if progress is not None:
                progress("timed processes", number * len(variants) + place + 1, rounds * len(variants))
    rows = []
    base = next(iter(found.values()))
    for label, measured in found.items():
        row: dict[str, Any] = {"label": label}
        for name in ("serving_bytes", "ttft_s", "tpot_s", "stall_share", "bytes_loaded"):
            row[name] = float(np.median([getattr(one, name) for one in measured]))
        for name in ("serving_bytes", "ttft_s", "tpot_s"):
            ratios = [getattr(one, name) / getattr(first, name) for one, first in zip(measured, base, strict=True)]
            short = f"{name.removesuffix('_s').removesuffix('_bytes')}_ratio"
            row |= {short: float(np.median(ratios)), f"{short}_low": min(ratios), f"{short}_high": max(ratios)}
        row["others_cpu_share"] = max(one.others_cpu_share for one in measured)
        rows.append(row | {"page_cache": measured[0].page_cache, "rounds": rounds})
    return pd.DataFrame(rows)


def _fields(config: ExperimentConfig) -> dict[str, Any]:
    kept = (
        *("model", "budget", "tolerance", "on_miss", "cache_bias", "strategy", "policy", "interval", "replan"),
        *("skipping", "mix", "labels", "label_error", "stepwise", "expert_dtype", "seed"),
    )
    return {name: getattr(config, name) for name in kept}
