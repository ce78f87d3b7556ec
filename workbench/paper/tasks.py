"""Figures and closing table of a comparison of what the engine is told about tasks (Figs. 13, 19 of the eMoE paper).

Nothing here measures.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from workbench.paper.figures import MEGABYTE, say_n
from workbench.quality.token_quality import LEAST_PROMPTS
from workbench.quality.variants import paired_difference

AWARE, AGNOSTIC = "task-aware", "task-agnostic"


def task_table(requests: pd.DataFrame, label: str, baseline: str) -> pd.DataFrame:
    """Return, per true task, the KL of two variants and their paired difference with a 95% interval.

    Parameters
    ----------
    requests : DataFrame
        Of a `Comparison`.
    label, baseline : str
        The difference is label minus baseline.
    """
    rows = []
    for task, group in requests.groupby("task"):
        means = {
            name: float(np.average(part["kl_nats"], weights=part["output_tokens"]))
            for name, part in group.groupby("label")
        }
        difference, low, high = paired_difference(group, label, baseline, "kl_nats")
        count = int((group["label"] == label).sum())
        rows.append((task, count, means[label], means[baseline], difference, low, high))
    columns = ["task", "prompts", f"{label}_kl_nats", f"{baseline}_kl_nats", "difference_nats", "low_nats", "high_nats"]
    return pd.DataFrame(rows, columns=columns)


def awareness_figure(table: pd.DataFrame, label: str = AWARE, baseline: str = AGNOSTIC) -> Figure:
    """Draw each task's KL with and without task labels, and the paired difference.

    Parameters
    ----------
    table : DataFrame
        From `task_table`.
    """
    figure = Figure(layout="constrained", dpi=96, figsize=(11, 0.45 * len(table) + 2.0))
    axes = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(table))
    color = sns.color_palette("colorblind")
    axes[0].barh(place - 0.2, table[f"{label}_kl_nats"], height=0.38, color=color[0], label=label)
    axes[0].barh(place + 0.2, table[f"{baseline}_kl_nats"], height=0.38, color=color[1], hatch="//", label=baseline)
    axes[0].set_yticks(place, table["task"])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("KL to all-resident (nats per token)")
    axes[0].legend(frameon=False)
    say_n(axes[1], table["prompts"].sum())
    middle = table["difference_nats"]
    spread = [middle - table["low_nats"], table["high_nats"] - middle]
    axes[1].errorbar(middle, place, xerr=np.maximum(spread, 0), fmt="D", color="black", capsize=3)
    axes[1].axvline(0.0, color="0.4", linestyle=":", linewidth=1.2)
    axes[1].set_xlabel(f"{label} minus {baseline}\n(nats per token; 95% interval from {LEAST_PROMPTS} prompts on)")
    return figure


def error_figure(summary: pd.DataFrame) -> Figure:
    """Draw quality and bytes moved over the share of wrong task labels, one line a task order.

    Parameters
    ----------
    summary : DataFrame
        Of a `Comparison` whose variants differ in ``label_error`` (and ``mix``).
    """
    figure = Figure(layout="constrained", dpi=96, figsize=(10, 4.0))
    axes = figure.subplots(1, 2)
    for number, (mix, group) in enumerate(summary.groupby("mix")):
        rows = group.sort_values("label_error")
        look = {"color": sns.color_palette("colorblind")[number], "marker": "os^D"[number % 4]}
        ratio = rows["perplexity_ratio"]
        spread = [ratio - rows["perplexity_ratio_low"], rows["perplexity_ratio_high"] - ratio]
        axes[0].errorbar(
            rows["label_error"], ratio, yerr=np.maximum(spread, 0), capsize=3, label=f"{mix} stream", **look
        )
        axes[1].plot(rows["label_error"], rows["bytes_loaded"] / rows["prompts"] / MEGABYTE, **look)
    axes[0].set_ylabel("perplexity ratio to all-resident\n(95% interval over prompts)")
    axes[1].set_ylabel("expert bytes loaded (MB a prompt)")
    axes[1].set_ylim(0, 1.08 * float((summary["bytes_loaded"] / summary["prompts"]).max()) / MEGABYTE)
    say_n(axes[1], summary["prompts"].max())
    for axis in axes:
        axis.set_xlabel("share of wrong task labels")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def beside_paper(tasks: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Figs. 13 and 19, with this run's figures.

    Parameters
    ----------
    tasks : DataFrame
        From `task_table`.
    errors : DataFrame
        As `error_figure` takes it, of one task order.
    """
    clear = tasks[(tasks["high_nats"] < 0) | (tasks["low_nats"] > 0)]
    better = ", ".join(clear[clear["difference_nats"] < 0]["task"]) or "none"
    worse = ", ".join(clear[clear["difference_nats"] > 0]["task"]) or "none"
    judged = f"of {int(tasks['low_nats'].notna().sum())} tasks with {LEAST_PROMPTS} prompts or more"
    rows = [
        (
            "Fig. 13, task-aware against agnostic",
            "the same for classification and comparison, better for conversation, QA, summarisation",
            f"{judged}, lower KL (95% interval excludes 0): {better}; higher: {worse}",
            "the paper's awareness is skipping, with one history; here a history for each task, with skipping or not",
        )
    ]
    ordered = errors.sort_values("label_error")
    base = ordered.iloc[0]
    for row in ordered.iloc[1:].to_dict("records"):
        moved = row["bytes_loaded"] / max(base["bytes_loaded"], 1)
        rows.append(
            (
                f"Fig. 19, {row['label_error']:.0%} wrong labels",
                "below 10% more latency at 20%",
                f"perplexity ratio {row['perplexity_ratio']:.3f} (all right: {base['perplexity_ratio']:.3f}), bytes "
                f"moved x{moved:.2f}",
                "latency is the bytes' to show here: a run that measures quality does not time",
            )
        )
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])
