"""Figures of routing patterns (`replay/patterns.py`) and of the simulated cache (`replay/cache.py`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

FEWEST_TOKENS = 20
BOUNDS = {"lru": ("LRU", "o", "-"), "min": ("Belady's MIN (hindsight)", "^", "--"), "random": ("random", "x", ":")}


def share_maps(shares: Mapping[str, np.ndarray]) -> Figure:
    """Draw which expert each task uses in which layer; a dash of colour per (layer, expert), one scale for all."""
    columns = min(3, len(shares))
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.8, 2.4 * rows + 0.4), layout="constrained", dpi=96)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    top = max(float(values.max()) for values in shares.values())
    for axis in axes.ravel()[len(shares) :]:
        axis.set_visible(False)
    for axis, (task, values) in zip(axes.ravel(), shares.items(), strict=False):
        image = axis.imshow(values.T, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(task, fontsize=11)
        axis.grid(visible=False)
    figure.supxlabel("MoE layer", fontsize=11)
    figure.supylabel("expert", fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the task's choices", shrink=0.8)
    return figure


def transition_map(counts: Mapping[str, np.ndarray], layer: int) -> Figure:
    """Draw, per task, where tokens go from each expert of one layer; rows of few tokens are blank (compare Fig. 3)."""
    figure = Figure(figsize=(3.6 * len(counts) + 1.0, 3.6), layout="constrained", dpi=96)
    axes = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    shares = {}
    for task, values in counts.items():
        total = values.sum(axis=1, keepdims=True)
        shares[task] = np.where(total >= FEWEST_TOKENS, values / np.maximum(total, 1), np.nan)
    for axis, (task, values) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(task, fontsize=11)
        axis.set_xlabel(f"first choice in layer {layer + 1}")
        axis.grid(visible=False)
    axes[0].set_ylabel(f"first choice in layer {layer}")
    figure.colorbar(image, ax=axes, label="share of the row's tokens", shrink=0.8)
    return figure


def lag_figure(prompts: pd.DataFrame, tokens: pd.Series, chance: float) -> Figure:
    """Draw likeness over distance: of prompts (one line per column, by lag) and of decoded tokens.

    Parameters
    ----------
    prompts : DataFrame
        Index lag in prompts.
    tokens : Series
        Reuse, index lag in tokens.
    chance : float
        Reuse between tokens of different answers.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=96)
    axes = figure.subplots(1, 2)
    palette = sns.color_palette("colorblind")
    for place, name in enumerate(prompts.columns):
        axes[0].plot(prompts.index, prompts[name], marker="osD^vP"[place % 6], color=palette[place], label=name)
    axes[0].set_xlabel("distance in the stream (prompts)")
    axes[0].set_ylabel("mean correlation or cosine")
    axes[0].legend(frameon=False, fontsize=9)
    axes[1].plot(tokens.index, tokens, marker="o", color=palette[0], label="same answer")
    axes[1].axhline(chance, color="0.4", linestyle=":", linewidth=1.4, label="different answers")
    axes[1].set_xlabel("distance (tokens)")
    axes[1].set_ylabel("share of a token's experts used again")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].legend(frameon=False, fontsize=9)
    for axis in axes:
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def mass_figure(mass: pd.DataFrame) -> Figure:
    """Draw how much of a prompt's choices the best experts cover, by who chose them (`patterns.mass_of_best`)."""
    names = {
        "own": "best of the prompt itself",
        "task": "best of its task",
        "stream": "best of the stream",
        "even": "even routing",
    }
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=96)
    axis = figure.subplots()
    palette = sns.color_palette("colorblind")
    for place, (name, label) in enumerate(names.items()):
        look = {"color": "0.4"} if name == "even" else {"color": palette[place]}
        # Curves may coincide: each can be seen through the next one's line.
        look |= {"linestyle": ("-", "--", "-.", ":")[place], "marker": "osD."[place], "markersize": 9 - 2 * place}
        axis.plot(mass.index, mass[name], label=label, **look)
    axis.set_xlabel("experts kept in each layer")
    axis.set_ylabel("share of choices covered")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(0, 1.03)
    axis.legend(frameon=False)
    return figure


def miss_curves(found: pd.DataFrame, policies: list[str]) -> Figure:
    """Draw misses over slots, a panel a stream: some policies between LRU and the bound (`simulate.simulate`)."""
    streams = sorted(found["stream"].unique())
    figure = Figure(figsize=(5.4 * len(streams), 4.4), layout="constrained", dpi=96)
    axes = figure.subplots(1, len(streams), squeeze=False, sharey=True)[0]
    palette = sns.color_palette("colorblind")
    for axis, stream in zip(axes, streams, strict=True):
        for place, policy in enumerate(policies):
            part = found[(found["stream"] == stream) & (found["policy"] == policy)].sort_values("slots")
            label, marker, line = BOUNDS.get(policy, (policy.replace("_", " "), "s", "-"))
            axis.plot(
                part["slots"], part["misses"] / part["requests"], marker=marker, linestyle=line, color=palette[place],
                label=label,
            )  # fmt: skip
        axis.set_title(f"{stream} stream", fontsize=11)
        axis.set_xlabel("slots in each layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    # Panels share the axis, so its limits are set once all of them are drawn: a limit set earlier cuts later curves.
    axes[0].set_ylim(0, 1.05 * float((found["misses"] / found["requests"])[found["policy"].isin(policies)].max()))
    axes[0].set_ylabel("misses per expert request")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
