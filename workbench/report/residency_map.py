"""Residency of a run, layer by layer: who was in memory, beside who was wanted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def residency_map(residency: pd.DataFrame) -> Figure:
    """Draw a run's residency.

    Parameters
    ----------
    residency : DataFrame
        Of `ResidencyWatch.frame`: ``layer``, ``expert``, ``resident_share``, ``wanted_share``.
    """
    resident = residency.pivot(index="layer", columns="expert", values="resident_share").to_numpy(dtype=float)
    wanted = residency.pivot(index="layer", columns="expert", values="wanted_share").to_numpy(dtype=float)
    layers, experts = resident.shape
    height = min(max(0.13 * layers, 1.6), 9.0) + 1.0
    figure = Figure(layout="constrained", figsize=(5.2, height))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, values, top, title in (
        (axes[0], resident, 1.0, "resident\n(share of prompts)"),
        (axes[1], wanted, float(np.nanmax(wanted)) or 1.0, "wanted\n(share of choices)"),
    ):
        mesh = axis.pcolormesh(values, cmap="cividis", vmin=0, vmax=top, rasterized=True)
        bar = figure.colorbar(mesh, ax=axis, location="bottom", format=PercentFormatter(1.0, decimals=0), pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("expert", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(min(experts, 8), integer=True))
        axis.grid(False)
    axes[0].set_ylabel("MoE layer", fontsize=9)
    axes[0].yaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes[0].invert_yaxis()
    for axis in axes:
        axis.tick_params(labelsize=8)
    return figure
