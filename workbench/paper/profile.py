"""A task profile as tables and figures: output lengths, similarity curves, divergences, and the two masks (Figs. 4, 5).

Nothing here measures but `measure_masks`, which runs the experiment once without and once with each mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emoe_core.planning.tasks import LENGTH_QUANTILES, Profile
from workbench.paper.figures import say_n
from workbench.quality.configuration import ExperimentConfig
from workbench.quality.experiment import run_experiment
from workbench.quality.profile.masks import mask_by_kl, mask_by_similarity, similarity_per_layer
from workbench.quality.token_quality import LEAST_PROMPTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER_RULE, OUR_RULE = "leading layers by similarity (paper)", "cheapest layers by divergence (ours)"
MARKERS = "osD^vP"
Progress = Callable[[str, int, int], None]


def with_mask(profile: Profile, rule: str, allowance_nats: float) -> Profile:
    """Return the profile with its masks by one of the two rules."""
    tasks = {
        name: replace(
            task,
            sensitive=mask_by_similarity(task, profile.threshold)
            if rule == PAPER_RULE
            else mask_by_kl(task, allowance_nats),
        )
        for name, task in profile.tasks.items()
    }
    return replace(profile, tasks=tasks)


def mask_table(profile: Profile, allowance_nats: float) -> pd.DataFrame:
    """Return, per task and rule, the layers freed and the summed divergence of routing these at random.

    Returns
    -------
    DataFrame
        Columns ``task, rule, free_layers, free_share, kl_nats``; the sum takes layers for independent.
    """
    rows = []
    for rule in (PAPER_RULE, OUR_RULE):
        for name, task in with_mask(profile, rule, allowance_nats).tasks.items():
            free = [layer for layer, sensitive in enumerate(task.sensitive) if not sensitive]
            cost = sum(task.layer_kl_nats[layer] for layer in free) if task.layer_kl_nats else np.nan
            rows.append(
                {
                    "task": name,
                    "rule": rule,
                    "free_layers": len(free),
                    "free_share": len(free) / profile.n_layers,
                    "kl_nats": cost,
                }
            )
    return pd.DataFrame(rows)


def measure_masks(
    profile: Profile, config: ExperimentConfig, allowance_nats: float, progress: Progress | None = None
) -> pd.DataFrame:
    """Run the experiment without skipping and with each mask; return quality and what had to be loaded.

    With tolerance 0 sensitive layers load what is absent, so that all loss comes from the layers that a mask freed.
    """
    rows = []
    for rule in ("no skipping", PAPER_RULE, OUR_RULE):
        skipping = rule != "no skipping"
        masked = with_mask(profile, rule, allowance_nats) if skipping else None
        found = run_experiment(replace(config, skipping=skipping), profile=masked, progress=progress).metrics
        kept = ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "loads", "reroutes")
        rows.append({"mask": rule, **{name: found[name] for name in kept}})
    return pd.DataFrame(rows)


def length_table(profile: Profile) -> pd.DataFrame:
    """Return output lengths per task: quantiles and mean in tokens, and the share that reached the cap."""
    rows = []
    for name, task in profile.tasks.items():
        quantiles = dict(zip((f"p{100 * q:.0f}" for q in LENGTH_QUANTILES), task.length_quantiles_tokens, strict=False))
        rows.append({"task": name, **quantiles, "mean": task.expected_output_tokens, "at_cap": task.capped_share})
    return pd.DataFrame(rows)


def lengths_figure(profile: Profile) -> Figure:
    """Draw quantiles of the output length per task: 10 to 90% as a line, 25 to 75% as a bar, median and mean."""
    figure = Figure(layout="constrained", dpi=96, figsize=(8, 0.5 * len(profile.tasks) + 1.8))
    axis = figure.subplots()
    palette = sns.color_palette("colorblind")
    for place, task in enumerate(profile.tasks.values()):
        first = place == 0
        low, lower, middle, upper, high = task.length_quantiles_tokens
        axis.plot([low, high], [place, place], color="0.4", linewidth=1.4, label="10 to 90%" if first else None)
        axis.plot(
            [lower, upper], [place, place], color=palette[0], linewidth=9, solid_capstyle="butt",
            label="25 to 75%" if first else None,
        )  # fmt: skip
        axis.scatter([middle], [place], color="black", marker="|", s=220, zorder=5, label="median" if first else None)
        axis.scatter(
            [task.expected_output_tokens], [place], color=palette[1], marker="D", zorder=6,
            label="mean ($W_o$)" if first else None,
        )  # fmt: skip
    cap = max(task.length_cap_tokens for task in profile.tasks.values())
    axis.axvline(cap, color="0.5", linestyle=":", linewidth=1.4, label="cut off there")
    axis.set_yticks(range(len(profile.tasks)), list(profile.tasks))
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    _say_prompts(axis, profile)
    axis.set_xlabel("output length (tokens)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def curves_figure(profile: Profile) -> Figure:
    """Draw similarity to the undisturbed answer over the number of leading layers routed at random (Fig. 5)."""
    figure = Figure(layout="constrained", dpi=96, figsize=(9, 4.4))
    axis = figure.subplots()
    for place, (name, task) in enumerate(profile.tasks.items()):
        color = sns.color_palette("colorblind")[place]
        axis.plot([0, *task.depths], [1.0, *task.similarities], marker=MARKERS[place], color=color, label=name)
        if task.similarity_intervals and task.n_prompts >= LEAST_PROMPTS:
            low, high = np.array(task.similarity_intervals).T
            axis.fill_between(task.depths, low, high, color=color, alpha=0.08)
    threshold = f"threshold {profile.threshold:.0%}"
    axis.axhline(profile.threshold, color="black", linestyle="--", linewidth=1.2, label=threshold)
    axis.set_xlim(left=0, right=profile.n_layers)
    axis.set_ylim(top=1.01)
    _say_prompts(axis, profile)
    axis.set_xlabel("leading MoE layers routed at random")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    banded = all(task.n_prompts >= LEAST_PROMPTS for task in profile.tasks.values())
    band = "; band: 95% interval over prompts" if banded else ", few prompts"
    axis.set_ylabel(f"similarity to the undisturbed answer\n(cosine{band})")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="task", frameon=False)
    return figure


def divergence_figure(profile: Profile) -> Figure:
    """Draw the divergence of every (task, layer) routed at random alone, on a logarithmic colour scale."""
    table = pd.DataFrame({name: task.layer_kl_nats for name, task in profile.tasks.items() if task.layer_kl_nats}).T
    figure = Figure(layout="constrained", dpi=96, figsize=(0.3 * profile.n_layers + 3, 0.45 * len(table) + 1.6))
    axis = figure.subplots()
    logarithm = np.log10(table.clip(lower=1e-5))
    bar = {"label": "KL (log10 of nats per token)"}
    sns.heatmap(logarithm, ax=axis, cmap="cividis", cbar_kws=bar, linewidths=0.3)
    _say_prompts(axis, profile, "n_kl_prompts")
    axis.set_xlabel("MoE layer routed at random")
    axis.tick_params(axis="both", labelsize=9, rotation=0)
    return figure


def masks_figure(profile: Profile, allowance_nats: float) -> Figure:
    """Draw both masks side by side: dark pairs are sensitive, light ones take whatever is resident."""
    figure = Figure(layout="constrained", dpi=96, figsize=(12, 0.42 * len(profile.tasks) + 1.8))
    for axis, rule in zip(figure.subplots(1, 2, sharey=True), (PAPER_RULE, OUR_RULE), strict=True):
        tasks = with_mask(profile, rule, allowance_nats).tasks
        table = pd.DataFrame({name: task.sensitive for name, task in tasks.items()}).T.astype(float)
        sns.heatmap(table, ax=axis, cmap="cividis_r", vmin=0, vmax=1, cbar=False, linewidths=0.3, xticklabels=5)
        axis.set_title(rule, fontsize=11, loc="left")
        _say_prompts(axis, profile, "n_prompts" if rule == PAPER_RULE else "n_kl_prompts")
        axis.set_xlabel("MoE layer (dark: sensitive, light: free)")
        axis.tick_params(axis="both", labelsize=9, rotation=0)
    return figure


def _say_prompts(axis: Axes, profile: Profile, count: str = "n_prompts") -> None:
    say_n(axis, max(getattr(task, count) for task in profile.tasks.values()), "prompts a task")


def beside_paper(profile: Profile) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Figs. 4 and 5, with the figures of this profile."""
    tasks = profile.tasks
    ends = {name: task.similarities[-1] for name, task in tasks.items()}
    means = {name: task.expected_output_tokens for name, task in tasks.items()}
    ranked = sorted(ends, key=lambda name: ends[name])
    capped = ", ".join(name for name, task in tasks.items() if task.capped_share >= 0.5) or "none"
    free = {name: mask_by_similarity(task, profile.threshold).count(False) for name, task in tasks.items()}

    def listed(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {ends[name]:.0%}" for name in names if name in ends) or "not measured in this run"

    half = "not measured in this run"
    if "qa" in tasks:
        layers = (profile.n_layers + 1) // 2
        half = f"qa {similarity_per_layer(tasks['qa'])[layers - 1]:.0%} with half random, {listed(('qa',))} with all"

    lengths = f"factor {max(means.values()) / max(min(means.values()), 1e-9):.1f} between the longest and shortest mean"
    rows = [
        (
            "Fig. 4, output lengths",
            "tasks differ by up to 2x",
            lengths,
            f"lengths are cut at {max(task.length_cap_tokens for task in tasks.values())} tokens, which at least half "
            f"of the outputs reach in: {capped}; one-word tasks stand beside open ones",
        ),
        (
            "Fig. 5, classification and comparison, every layer random",
            "above 90%",
            listed(("classification", "comparison")),
            "answers of a word or two change wholly when one token does; a sentence keeps its topic",
        ),
        (
            "Fig. 5, question answering",
            "above 80% with half of the layers right",
            half,
            "a wrong expert costs little where experts stay alike (grown from one dense model, as in `reference`), "
            "much where they are parts of it (`carved`)",
        ),
        (
            "Fig. 5, conversation and summarisation",
            "below 80% even with three quarters right",
            listed(("conversation", "summarization")) + " with every layer random",
            "free text wanders off, here as there",
        ),
        (
            "most sensitive first",
            "conversation and summarisation, QA, then classification and comparison",
            ", ".join(ranked),
            "similarity punishes short answers; read it beside the divergences per token",
        ),
        (
            f"layers free at {profile.threshold:.0%}",
            "no number",
            ", ".join(f"{name} {count} of {profile.n_layers}" for name, count in free.items()),
            "the first drop below the threshold ends the free layers, whatever follows",
        ),
    ]
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])


def profile_metrics(profile: Profile, masks: pd.DataFrame) -> dict[str, float]:
    """Return each task's mean length and similarity with every layer random, and the layers that each rule frees."""
    metrics: dict[str, float] = {}
    for name, task in profile.tasks.items():
        metrics[f"{name}_output_tokens"] = task.expected_output_tokens
        metrics[f"{name}_similarity_all_random"] = task.similarities[-1]
    for row in masks.to_dict("records"):
        metrics[f"{row['task']}_free_layers_{'paper' if row['rule'] == PAPER_RULE else 'ours'}"] = row["free_layers"]
    return metrics
