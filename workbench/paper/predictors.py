"""Figures and the closing table of a comparison of predictors. Nothing here measures; `replay/prediction.py` does."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from workbench.paper.figures import MEGABYTE, say_n

# What bounds the others is drawn apart from them.
BOUNDS = ("oracle", "random")
# Points of one interval stand side by side, each by this factor further on the logarithmic axis.
DODGE = 1.04


def skill_figure(found: pd.DataFrame, prompts: int) -> Figure:
    """Draw each predictor's skill by stream, one point per number of slots.

    Parameters
    ----------
    found : DataFrame
        From `prediction.compare`, of one interval.
    prompts : int
        In each stream.
    """
    mixes = sorted(found["mix"].unique())
    columns = min(len(mixes), 2)
    rows = -(-len(mixes) // columns)
    size = (5.2 * columns + 1.4, (0.42 * found["predictor"].nunique() + 1.0) * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    order = found.groupby("predictor")["skill"].mean().sort_values(ascending=False).index.tolist()
    slots = sorted(found["slots"].unique())
    for axis in axes[len(mixes) :]:
        axis.set_axis_off()
    for axis, mix in zip(axes, mixes, strict=False):
        part = found[found["mix"] == mix]
        for place, kept in enumerate(slots):
            shown = part[part["slots"] == kept].set_index("predictor").reindex(order)
            look = {"marker": "osD^v"[place % 5], "color": sns.color_palette("colorblind")[place % 10]}
            beside = [row + 0.22 * (place - (len(slots) - 1) / 2) for row in range(len(order))]
            axis.plot(shown["skill"], beside, linestyle="none", label=f"{kept} slots a layer", **look)
        axis.set_yticks(range(len(order)), order)
        axis.axvline(0.7, color="0.4", linestyle=":", linewidth=1.2)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("skill (0: random subset, 1: hindsight; dotted: aim)")
        axis.set_title(f"{mix} stream", fontsize=11, loc="left")
    say_n(axes[len(mixes) - 1], prompts)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(slots), frameon=False)
    return figure


def interval_figure(found: pd.DataFrame, prompts: int) -> Figure:
    """Draw what a longer interval costs: mass covered, and bytes moved, of each predictor.

    Parameters
    ----------
    found : DataFrame
        From `prediction.compare`, of one number of slots and fixed intervals.
    prompts : int
        In each stream.
    """
    mixes = sorted(found["mix"].unique())
    figure = Figure(figsize=(11, 3.6 * len(mixes) + 0.6), layout="constrained")
    axes = figure.subplots(len(mixes), 2, squeeze=False)
    names = [name for name in found["predictor"].unique() if name != "random"]
    palette = sns.color_palette("colorblind", len(names))
    for row, mix in zip(axes, mixes, strict=True):
        for place, name in enumerate(names):
            part = found[(found["mix"] == mix) & (found["predictor"] == name)].sort_values("interval")
            look = {"color": palette[place], "marker": "osD^vP*X"[place % 8], "label": name}
            if name in BOUNDS:
                look |= {"color": "0.3", "linestyle": "--"}
            beside = part["interval"] * DODGE ** (place - (len(names) - 1) / 2)
            row[0].plot(beside, part["mass"], **look)
            row[1].plot(beside, part["moved_bytes"] / MEGABYTE, **look)
        for axis in row:
            ticks = sorted(int(value) for value in found["interval"].unique())
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set_xlabel("prediction interval p (prompts)")
            axis.set_title(f"{mix} stream", fontsize=11, loc="left")
        row[0].set_ylabel("routed mass covered")
        row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        row[1].set_ylabel("expert bytes moved per prompt (MB)")
    say_n(axes[0, 1], prompts)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def winner(found: pd.DataFrame) -> str:
    """Return the predictor with the highest mean skill, bounds left out; ties within 0.001 go to the faster one."""
    means = found[~found["predictor"].isin(BOUNDS)].groupby("predictor")[["skill", "prediction_median_s"]].mean()
    best = means[means["skill"] >= means["skill"].max() - 0.001]
    return str(best["prediction_median_s"].idxmin())


def beside_paper(found: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table "paper / here / why they differ".

    Parameters
    ----------
    found : DataFrame
        From `prediction.compare`.
    scores : DataFrame
        One row a predictor and stream, with `prediction.next_element_scores`.
    """

    def accuracy(name: str) -> str:
        part = scores[scores["predictor"] == name]["accuracy"]
        return f"{part.min():.0%} to {part.max():.0%}" if len(part) else "not trained"

    def seconds(name: str) -> str:
        part = found[found["predictor"] == name]["prediction_median_s"]
        return f"{part.median() * 1e3:.2g} ms" if len(part) else "not trained"

    best = winner(found)
    share = found[(found["predictor"] == best)]["of_oracle"].min()
    element = "an element here is the most used expert of a (prompt, layer); the paper does not define its own"
    overhead = "ours predicts shares, not token sequences, with a network of 73 thousand weights; moving is not in it"
    rows = [
        ("Table 2, accuracy of eMoE-A", "69 to 71%", accuracy("transformer A"), element),
        ("Table 2, accuracy of eMoE-L", "70 to 71%", accuracy("transformer L"), element),
        ("accuracy of decayed frequency", "not given", accuracy("frequency"), "no network: the measure to beat"),
        ("5.7, one prediction, A", "0.33 to 0.38 s with moving", seconds("transformer A"), overhead),
        ("5.7, one prediction, L", "1.39 to 4.2 s with moving", seconds("transformer L"), "one pass a layer"),
        ("one prediction, frequency", "not given", seconds("frequency"), "a division"),
        (
            "least mass relative to the oracle's",
            "not given",
            f"{share:.1%} ({best})",
            "oracle: best set of each prompt",
        ),
    ]
    return pd.DataFrame(rows, columns=["what", "paper", "here", "why they differ"])


def predictor_metrics(found: pd.DataFrame) -> dict[str, float]:
    """Return what each predictor covers and moves on each stream, of a table of one interval."""
    return {
        f"{row['predictor'].replace(' ', '_')}_{row['mix']}_{name}": row[name]
        for row in found.to_dict("records")
        for name in ("mass", "of_oracle", "skill", "moved_bytes")
    }
