"""Figures of the bench, in one style.

A figure that compares runs is a function of the table that `results.runs_frame` returns (one row per run) and returns a
matplotlib figure, or None when the table does not hold what it shows. `REPORT_FIGURES` lists, by title, those that the
report draws for every sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import matplotlib as mpl
import seaborn as sns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REPORT_FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {}


def set_style() -> None:
    """Set the style of all figures: seaborn's colour-blind palette, a white ground, thin grid lines."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    mpl.rcParams.update(
        {"figure.figsize": (7.0, 4.2), "figure.dpi": 96, "axes.spines.top": False, "axes.spines.right": False}
    )
