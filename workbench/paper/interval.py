"""Figure and closing table of a comparison of prediction intervals (Fig. 10 of the eMoE paper).

Nothing here measures.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from workbench.paper.figures import MEGABYTE, say_n

MARKERS = "os^D"


def interval_figure(summary: pd.DataFrame) -> Figure:
    """Draw quality and bytes moved over the prediction interval, one line a task order, with and without skipping.

    Parameters
    ----------
    summary : DataFrame
        Of a `Comparison` whose variants differ in ``interval``, ``mix`` and ``skipping``; "adaptive" stands apart at
        the right.
    """
    fixed = sorted({int(value) for value in summary["interval"] if str(value).isdigit()})
    ticks = [str(value) for value in fixed] + (["adaptive"] if (summary["interval"] == "adaptive").any() else [])
    figure = Figure(layout="constrained", dpi=96, figsize=(11, 4.2))
    axes = figure.subplots(1, 2)
    lines = summary.groupby(["mix", "skipping"])
    for number, ((mix, skipping), group) in enumerate(lines):
        rows = group.assign(tick=group["interval"].astype(str)).set_index("tick").reindex(ticks)
        look = {"color": sns.color_palette("colorblind")[number], "marker": MARKERS[number % 4]}
        ratio = rows["perplexity_ratio"]
        spread = [ratio - rows["perplexity_ratio_low"], rows["perplexity_ratio_high"] - ratio]
        moved = rows["bytes_loaded"] / rows["prompts"] / MEGABYTE
        # A line joins what lies on one scale; "adaptive" is no number.
        joined = len(fixed)
        shift = 0.06 * (number - (len(lines) - 1) / 2)
        place = np.arange(len(ticks)) + shift
        axes[0].errorbar(
            place, ratio, yerr=np.maximum(spread, 0), capsize=3, linestyle="none", label=_line(mix, skipping), **look
        )
        axes[0].plot(place[:joined], ratio.iloc[:joined], color=look["color"])
        axes[1].plot(place, moved, linestyle="none", **look)
        axes[1].plot(place[:joined], moved.iloc[:joined], color=look["color"])
    axes[0].axhline(1.0, color="0.4", linestyle=":", linewidth=1.2)
    axes[0].set_ylabel("perplexity ratio to all-resident\n(95% interval over prompts)")
    axes[1].set_ylabel("expert bytes loaded (MB a prompt)")
    axes[1].set_ylim(0, 1.08 * float((summary["bytes_loaded"] / summary["prompts"]).max()) / MEGABYTE)
    say_n(axes[1], summary["prompts"].max())
    for axis in axes:
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlabel("prediction interval p (prompts)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def overhead_share(summary: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """Return what predicting and swapping cost, as a share of the time that requests took.

    Parameters
    ----------
    summary, requests : DataFrame
        Of a `Comparison`.

    Returns
    -------
    DataFrame
        One row a variant: ``label, prediction_s, swap_s, stall_s`` in all, ``request_s`` (time to score the prompts),
        ``overhead_share``: (prediction + swap) / request time. Waiting for swapped experts is a stall, listed apart.
    """
    spent = requests.groupby("label")["score_s"].sum()
    table = summary[["label", "prediction_s", "swap_s", "stall_s"]].copy()
    table["request_s"] = table["label"].map(spent)
    table["overhead_share"] = (table["prediction_s"] + table["swap_s"]) / table["request_s"]
    return table


def _line(mix: str, skipping: bool) -> str:
    return f"{mix} stream{', task skipping' if skipping else ''}"


def beside_paper(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Fig. 10, with this run's figures."""
    rows = []
    for (mix, skipping), group in summary.groupby(["mix", "skipping"]):
        line = _line(mix, skipping)
        fixed = group[group["interval"].astype(str).str.isdigit()].copy()
        fixed["interval"] = fixed["interval"].astype(int)
        fixed = fixed.sort_values("interval")
        here = ", ".join(f"p={row.interval}: {row.perplexity_ratio:.3f}" for row in fixed.itertuples())
        rise = (
            "a plan that is kept serves the mix of tasks of an interval, not the task of a prompt"
            if (group["replan"] == "interval").all()
            else "only the prediction is kept; every prompt gets a plan for its own task"
        )
        rows.append((f"Fig. 10, {line}, perplexity ratio", "flat up to p = 40, rises from 60", here, rise))
        adaptive = group[group["interval"].astype(str) == "adaptive"]
        if len(adaptive):
            one = adaptive.iloc[0]
            told = f"{one['perplexity_ratio']:.3f} with {one['predictions']:.0f} predictions"
            rows.append(
                (
                    f"adaptive interval, {line}",
                    "not in the paper",
                    told,
                    "predicts when the plan stops fitting",
                )
            )
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])
