"""Figures of the bench, in one style.

A figure that compares runs is a function of the table that `results.runs_frame` returns (one row per run) and returns a
matplotlib figure, or None when the table does not hold what it shows. Figures of a single run are functions of its
tables. Nothing here measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEGABYTE = 1e6


def set_style() -> None:
    """Set the style of all figures: seaborn's colour-blind palette, a white ground, thin grid lines."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    mpl.rcParams.update(
        {"figure.figsize": (7.0, 4.2), "figure.dpi": 96, "axes.spines.top": False, "axes.spines.right": False}
    )


def say_n(axis: Axes, n: float, unit: str = "prompts") -> None:
    """Write above the right end of an axis how many prompts its figure rests on."""
    axis.set_title(f"n = {n:,.0f} {unit}", loc="right", fontsize=9, color="0.35")


def served_shares(runs: pd.DataFrame) -> Figure | None:
    """Draw how each run served its expert lookups: hit, loaded on demand, rerouted, dropped."""
    if not _has(runs, "hits", "loads", "reroutes", "lookups", "strategy", "budget"):
        return None
    table = runs.dropna(subset=["lookups"])
    table = table[table["lookups"] > 0]
    if table.empty:
        return None
    names = _run_names(table)
    figure, axes = _subplots(1, 1, figsize=(8.5, 0.36 * len(table) + 1.6))
    given_up = table["drops"] if "drops" in table else 0 * table["lookups"]  # earlier runs never dropped
    parts = [*(table[part] for part in ("hits", "loads", "reroutes")), given_up.fillna(0)]
    _stacked(axes[0], names, [part / table["lookups"] for part in parts])
    axes[0].set_xlabel("share of expert lookups (one per forward pass, layer and expert)")
    return figure


def request_timeline(requests: pd.DataFrame) -> Figure:
    """Draw a run prompt by prompt: how its expert lookups were served, and its KL divergence."""
    figure, axes = _subplots(2, 1, figsize=(9, 5.2), sharex=True)
    place = np.arange(len(requests))
    axes[0].plot(place, requests["token_hit_rate"], marker="o", markersize=4, color=sns.color_palette("colorblind")[0])
    axes[0].set_ylabel("hit rate\n(token-weighted)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylim(0, 1.04)
    say_n(axes[0], len(requests))
    sns.scatterplot(x=place, y=requests["kl_nats"].to_numpy(), hue=requests["task"].to_numpy(), ax=axes[1], s=45)
    axes[1].set_ylabel("KL to all-resident\n(nats per token)")
    axes[1].set_xlabel("prompt in the stream")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_ylim(bottom=min(0.0, float(requests["kl_nats"].min())))
    sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1.01, 1.0), title="task", frameon=False)
    return figure


def memory_terms(terms: pd.DataFrame, prompts: int) -> Figure:
    """Draw stacked memory terms per configuration with the measured peak as a mark.

    Parameters
    ----------
    terms : DataFrame
        Columns ``name, dense_bytes, slot_bytes, measured_bytes``.
    prompts : int
        Answered while the peak was measured.
    """
    figure, axes = _subplots(1, 1, figsize=(8.5, 0.7 * len(terms) + 1.8))
    palette = sns.color_palette("colorblind")
    place = np.arange(len(terms))
    dense, slots = terms["dense_bytes"] / MEGABYTE, terms["slot_bytes"] / MEGABYTE
    axes[0].barh(place, dense, color=palette[7], label="dense weights (computed)")
    axes[0].barh(place, slots, left=dense, color=palette[0], label="expert slots (computed)")
    axes[0].scatter(
        terms["measured_bytes"] / MEGABYTE,
        place,
        color="black",
        marker="|",
        s=500,
        zorder=5,
        label="measured: process peak minus control",
    )
    axes[0].set_yticks(place, list(terms["name"]))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("memory (MB)")
    say_n(axes[0], prompts)
    _legend_below(figure, axes[0])
    return figure


def residency_heatmap(residency: pd.DataFrame, prompts: int) -> Figure:
    """Draw how often experts were wanted and, framed, which ones were resident for at least half of the prompts.

    Parameters
    ----------
    residency : DataFrame
        Of a `Result`: ``layer, expert, resident_share, wanted_share``.
    prompts : int
    """
    wanted = residency.pivot(index="expert", columns="layer", values="wanted_share")
    experts, layers = wanted.shape
    figure, axes = _subplots(1, 1, figsize=(0.32 * layers + 2.2, 0.36 * experts + 1.6))
    label = {"label": "share of routed tokens"}
    sns.heatmap(wanted, ax=axes[0], cmap="cividis", cbar_kws=label, vmin=0, xticklabels=1, yticklabels=1)
    for row in residency[residency["resident_share"] >= 0.5].itertuples():
        corner = (row.layer + 0.06, row.expert + 0.06)
        axes[0].add_patch(mpl.patches.Rectangle(corner, 0.88, 0.88, fill=False, ec="white", lw=1.4))
    say_n(axes[0], prompts)
    axes[0].set_xlabel("MoE layer")
    axes[0].set_ylabel("expert (framed: resident)")
    axes[0].tick_params(axis="both", labelsize=8, rotation=0)
    return figure


def _stacked(axis: Axes, names: list[str], shares: list[pd.Series]) -> None:
    palette = sns.color_palette("colorblind")
    looks = (
        *(("hit", palette[2], ""), ("loaded on demand", palette[1], "//"), ("rerouted", palette[4], "..")),
        ("dropped", palette[9], "--"),
    )
    left = np.zeros(len(names))
    for (label, color, hatch), share in zip(looks, shares, strict=True):
        if label == "dropped" and not share.any():
            continue
        axis.barh(names, share, left=left, color=color, hatch=hatch, edgecolor="white", linewidth=0.5, label=label)
        left += share.to_numpy()
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(0, 1)
    axis.tick_params(axis="y", labelsize=9)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _run_names(table: pd.DataFrame) -> list[str]:
    names = []
    for number, (_, row) in enumerate(table.iterrows(), start=1):
        lossy = f"t={row['tolerance']:g}" if "tolerance" in row else ""
        lossy += ", drop" if row.get("on_miss") == "drop" else ""
        interval = f", p={row['interval']:g}" if pd.notna(row.get("interval")) else ""
        skipping = ", skipping" if row.get("skipping") is True else ""
        names.append(f"{number}. {row['budget']}, {row['strategy']}, {lossy}{interval}{skipping}")
    return names


def _subplots(rows: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(layout="constrained", dpi=96, figsize=options.pop("figsize"))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=9)


def _has(runs: pd.DataFrame, *columns: str) -> bool:
    return not runs.empty and all(column in runs.columns for column in columns)
