"""Figure and closing table of a comparison of prediction intervals (Fig. 10 of the eMoE paper).

Nothing here measures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from emoe_core.predictor import FREQUENCY
from workbench.paper.figures import MEGABYTE, say_n
from workbench.paper.memory import WIDE_RATIO, arm_name, arms_of

MARKERS = "os^D"
Line = tuple[tuple[str, str, bool], pd.DataFrame]


def swept_intervals(runs: pd.DataFrame) -> Figure | None:
    """Draw the runs of a sweep that differ in interval and skipping alone; of several groups that with most intervals.

    Parameters
    ----------
    runs : DataFrame
        One row a run (`results.runs_frame`).

    Returns
    -------
    Figure or None
        None where no runs differ so.
    """
    if runs.empty or not {"interval", "skipping", "perplexity_ratio", "bytes_loaded", "prompts"} <= set(runs.columns):
        return None
    held = ("model", "budget", "tolerance", "on_miss", "strategy", "replan", "mix", "prompts", "seed")
    same = [name for name in held if name in runs]
    known = runs.dropna(subset=["perplexity_ratio", "interval"])
    groups = [group for _, group in known.groupby(same, dropna=False) if group["interval"].nunique() > 1]
    return interval_figure(max(groups, key=lambda group: group["interval"].nunique())) if groups else None


def interval_figure(summary: pd.DataFrame) -> Figure:
    """Draw quality and bytes moved over the prediction interval, a line for each arm, task order, skipping or not.

    Parameters
    ----------
    summary : DataFrame
        One row a run that differs from the others in ``interval``, arm, ``mix`` and ``skipping`` alone.
    """
    ticks = sorted(int(value) for value in summary["interval"].unique())
    figure = Figure(layout="constrained", dpi=96, figsize=(11, 4.2))
    axes = figure.subplots(1, 2)
    lines = _lines(summary.assign(mix=summary.get("mix", "uniform")))
    for number, ((arm, mix, skipping), group) in enumerate(lines):
        rows = group.sort_values("interval")
        look: dict[str, Any] = {
            "label": _line(arm, mix, skipping, lines),
            "color": sns.color_palette("colorblind")[number % 10],
            "marker": MARKERS[number % 4],
        }
        ratio = rows["perplexity_ratio"]
        spread = [ratio - rows["perplexity_ratio_low"], rows["perplexity_ratio_high"] - ratio]
        # Beside each other, so that no line's interval hides another's.
        place = [ticks.index(value) + 0.06 * (number - (len(lines) - 1) / 2) for value in rows["interval"]]
        axes[0].errorbar(place, ratio, yerr=np.maximum(spread, 0), capsize=3, **look)
        axes[1].plot(place, rows["bytes_loaded"] / rows["prompts"] / MEGABYTE, **look)
    axes[0].axhline(1.0, color="0.4", linestyle=":", linewidth=1.2)
    if summary["perplexity_ratio"].max() > WIDE_RATIO:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("perplexity ratio to all-resident\n(95% interval over prompts)")
    axes[1].set_ylabel("expert bytes loaded (MB a prompt)")
    axes[1].set_ylim(0, 1.08 * float((summary["bytes_loaded"] / summary["prompts"]).max()) / MEGABYTE)
    say_n(axes[1], summary["prompts"].max())
    for axis in axes:
        axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axis.set_xlabel("prediction interval p (prompts)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)), frameon=False)
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


def _lines(summary: pd.DataFrame) -> list[Line]:
    """Return the rows of each line by arm, task order, and whether tasks skip layers."""
    arm = arms_of(summary) if "strategy" in summary else FREQUENCY
    return list(summary.assign(arm=arm).groupby(["arm", "mix", "skipping"]))


def _line(arm: str, mix: str, skipping: bool, lines: list[Line]) -> str:
    """Name a line; its arm only where others are drawn beside it."""
    several = len({other for (other, *_), _ in lines}) > 1
    return f"{arm_name(arm) + ', ' if several else ''}{mix} stream{', task skipping' if skipping else ''}"


def beside_paper(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper, here, why they differ" for Fig. 10, with this run's figures."""
    rows = []
    lines = _lines(summary)
    for (arm, mix, skipping), group in lines:
        line = _line(arm, mix, skipping, lines)
        rows_of = group.sort_values("interval").itertuples()
        here = ", ".join(f"p={row.interval}: {row.perplexity_ratio:.3f}" for row in rows_of)
        rise = (
            "a plan that is kept serves the mix of tasks of an interval, not the task of a prompt"
            if (group["replan"] == "interval").all()
            else "only the prediction is kept; every prompt gets a plan for its own task"
        )
        paper = "flat up to p = 40, rises from 60" if arm == FREQUENCY else "not given"
        rows.append((f"Fig. 10, {line}, perplexity ratio", paper, here, rise))
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])
