"""Pareto fronts of operating points, with the bounds in grey: memory against quality, and memory against time.

An exact configuration loses nothing at any memory and pays in time, so it has its place in the second figure; in the
first it lies on the line of everything resident. Small figures, so that a phone shows them readably.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from workbench.machine.busy import busy_warning
from workbench.quality.configuration import ORACLE
from workbench.report.points import ALL_RESIDENT, BOUNDS, ON_DEMAND, RANDOM

MARKERS = "osDv^P*<>X"
BOUND_MARKERS = {ALL_RESIDENT: "h", ON_DEMAND: "s", RANDOM: "x", ORACLE: "*"}
SIZE = (4.7, 3.9)


def quality_front(points: pd.DataFrame) -> Figure | None:
    """Draw the perplexity ratio over expert memory; None where memory does not vary."""
    table = points.dropna(subset=["perplexity_ratio"])
    if table["memory_share"].nunique() < 2 or not (table["memory_share"] < 1).any():
        return None
    figure, axis = _axis()
    lossy = table[~table["bound"].isin([RANDOM, ORACLE, ON_DEMAND])]
    _front(axis, lossy, "memory_share", "perplexity_ratio", "Pareto front, lossy")
    for name, look, group in _series(table):
        mean = group.groupby("memory_share")[["perplexity_ratio"]].mean()
        axis.plot(mean.index, mean["perplexity_ratio"], label=name, **look)
        ratio = group["perplexity_ratio"]
        low, high = (group[f"perplexity_ratio_{end}"].astype(float).fillna(ratio) for end in ("low", "high"))
        spread = np.maximum([ratio - low, high - ratio], 0)
        axis.errorbar(group["memory_share"], ratio, yerr=spread, capsize=2.5, **{**look, "linestyle": ""})
    axis.axhline(1.0, color=rcParams["text.color"], linestyle=":", linewidth=1)
    axis.set_xlabel("expert memory, share of all experts in 16 bits")
    axis.set_ylabel("perplexity ratio to all resident")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(0, 1.05)
    return _finish(figure, axis)


def time_front(points: pd.DataFrame) -> Figure | None:
    """Draw time per token over measured memory, both as ratios to stock transformers; None where neither was measured.

    Beside each lossy point stands what it cost in perplexity.
    """
    table = points.dropna(subset=["memory_ratio", "tpot_ratio"])
    if table.empty:
        return None
    figure, axis = _axis()
    _front(axis, table[~table["bound"].isin([RANDOM, ORACLE])], "memory_ratio", "tpot_ratio")
    for name, look, group in _series(table):
        group = group.sort_values("memory_ratio")
        axis.plot(group["memory_ratio"], group["tpot_ratio"], label=name, **look)
        for x, y, ratio in group[["memory_ratio", "tpot_ratio", "perplexity_ratio"]].itertuples(index=False):
            if ratio != 1.0 and ratio == ratio:
                axis.annotate(f"{ratio - 1:+.1%}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.plot([1.0], [1.0], marker="h", linestyle="", color=rcParams["text.color"], label="stock transformers")
    axis.set_xlabel("measured memory while serving, ratio to stock")
    axis.set_ylabel("time per token, ratio to stock")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    worst = float(table["others_cpu_share"].astype(float).max())
    if warning := busy_warning(worst) if worst == worst else None:
        axis.set_title(warning, fontsize=8, loc="left", wrap=True)
    return _finish(figure, axis)


def hits_front(curves: pd.DataFrame) -> Figure | None:
    """Draw hits on demand over slots: LRU, random, and Belady's MIN, the best possible.

    Parameters
    ----------
    curves : DataFrame
        ``policy``, ``slot_share``, ``hit_rate``; rows of one policy and size are averaged.
    """
    curves = curves[curves["slot_share"] < 1]
    if curves["slot_share"].nunique() < 2:
        return None
    figure, axis = _axis()
    ink = rcParams["text.color"]
    looks: dict[str, dict[str, Any]] = {
        "min": {"color": ink, "marker": "*", "label": "Belady's MIN (best possible)", "linestyle": "--"},
        "lru": {"color": ink, "marker": "s", "label": "LRU", "linestyle": "-"},
        "random": {"color": ink, "marker": "x", "label": "random eviction", "linestyle": ":"},
    }
    for number, policy in enumerate(dict.fromkeys([*looks, *sorted(curves["policy"].unique())])):
        mean = curves[curves["policy"] == policy].groupby("slot_share")["hit_rate"].mean()
        if mean.empty:
            continue
        other = {"color": sns.color_palette("colorblind")[number % 10], "marker": MARKERS[number % len(MARKERS)]}
        axis.plot(mean.index, mean, **looks.get(policy, other | {"label": policy.replace("_", " ")}))
    axis.set_xlabel("slots, share of all experts")
    axis.set_ylabel("hits per lookup, on demand")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    return _finish(figure, axis)


def _axis() -> tuple[Figure, Any]:
    figure = Figure(layout="constrained", figsize=SIZE)
    return figure, figure.subplots()


def _front(axis: Any, table: pd.DataFrame, x: str, y: str, label: str = "Pareto front") -> None:
    """Draw the steps of the points that none beats in both, as a broad band behind the points."""
    best = float("inf")
    kept = []
    for place, value in table.sort_values([x, y])[[x, y]].itertuples(index=False):
        if value < best:
            kept.append((place, value))
            best = value
    if len(kept) > 1:
        places, values = zip(*kept, strict=True)
        color = sns.color_palette("colorblind")[9]
        axis.step(places, values, where="post", color=color, linewidth=6, alpha=0.35, zorder=0, label=label)


def _series(table: pd.DataFrame) -> list[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Return (name, look, rows) of every configuration, the bounds last and in grey."""
    names = sorted(table["configuration"].unique(), key=lambda name: (name in BOUNDS, name))
    found = []
    for number, name in enumerate(names):
        group = table[table["configuration"] == name].sort_values("memory_share")
        look: dict[str, Any] = {"markersize": 6, "linewidth": 1.5}
        if name in BOUNDS:
            look |= {"color": "0.55", "linestyle": "--", "marker": BOUND_MARKERS[name]}
        else:
            color = sns.color_palette("colorblind")[number % 8]
            look |= {"color": color, "linestyle": "-", "marker": MARKERS[number % len(MARKERS)]}
        found.append((str(name), look, group))
    return found


def _finish(figure: Figure, axis: Any) -> Figure:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    axis.tick_params(labelsize=9)
    axis.xaxis.label.set_size(9)
    axis.yaxis.label.set_size(9)
    return figure
