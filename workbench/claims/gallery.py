"""Figures that are drawn from recorded results: SVG for light and dark pages, and a CSV of what each shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from emoe_core.files import write_whole
from workbench.claims.pooled import pooled_summary
from workbench.claims.register import Drawn, Results
from workbench.paper.figures import set_style
from workbench.paper.interval import interval_figure
from workbench.paper.memory import accuracy_figure
from workbench.report.pictures import draw_picture

FIGURES = "figures"
DRAW: dict[str, Callable[[pd.DataFrame], Figure]] = {"memory": accuracy_figure, "interval": interval_figure}


def draw_figures(figures: dict[str, Drawn], results: Results, folder: Path) -> list[Path]:
    """Draw figures into a folder's ``figures`` and return their tables; equal results give equal files."""
    set_style()
    tables = []
    for name, item in figures.items():
        runs = item.runs(results)
        summary = pooled_summary([run.tables for run in runs], item.labels)
        draw_picture(item.title, lambda item=item, summary=summary: DRAW[item.figure](summary), folder, name)  # type: ignore[misc]
        tables.append(write_whole(folder / FIGURES / f"{name}.csv", summary.to_csv(index=False)))
    return tables


def shown_figure(name: str, item: Drawn) -> str:
    """Return the Markdown that shows a figure on a page beside the folder ``figures``."""
    light, dark = (f"{FIGURES}/{name}-{ground}.svg" for ground in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{item.title}" src="{light}"></picture>\n\n{item.title} ([data]({FIGURES}/{name}.csv))'
    )
