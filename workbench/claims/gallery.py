"""Figures that are drawn from recorded results: SVG for light and dark pages, and a CSV of what each shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from emoe_core.files import write_whole
from workbench.claims.pooled import pooled_summary
from workbench.claims.register import Drawn, Results
from workbench.paper.figures import set_style
from workbench.paper.interval import interval_figure
from workbench.paper.memory import accuracy_figure
from workbench.paper.predictors import skill_figure
from workbench.report.pictures import draw_picture
from workbench.tracking.findings import PROMPTS_TAG
from workbench.tracking.recorded import RecordedRun

FIGURES = "figures"


def render_figures(figures: dict[str, Drawn], results: Results, folder: Path, *, write: bool) -> list[Path]:
    """Return which tables of figures in a folder's ``figures`` are not as the results have them; draw all if asked.

    Tables have six digits, so that another processor's sums come out the same.
    """
    set_style()
    changed = []
    for name, item in figures.items():
        gather, draw = KINDS[item.figure]
        shown = gather(item.runs(results), item.labels)
        file, table = folder / FIGURES / f"{name}.csv", shown.to_csv(index=False, float_format="%.6g")
        if not file.is_file() or file.read_text(encoding="utf-8") != table:
            changed.append(file)
        if write:
            draw_picture(item.title, partial(draw, shown), folder, name)
            write_whole(file, table)
    return changed


def shown_figure(name: str, item: Drawn) -> str:
    """Return the Markdown that shows a figure on a page beside the folder ``figures``."""
    light, dark = (f"{FIGURES}/{name}-{ground}.svg" for ground in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{item.title}" src="{light}"></picture>\n\n{item.title} ([data]({FIGURES}/{name}.csv))'
    )


def _pooled(runs: Sequence[RecordedRun], labels: Sequence[str]) -> pd.DataFrame:
    return pooled_summary([run.tables for run in runs], labels)


def _skills(runs: Sequence[RecordedRun], labels: Sequence[str]) -> pd.DataFrame:
    """Return what predictors covered at the shortest interval, of runs that differ in their slots."""
    every = pd.concat([run.tables["predictors"].assign(prompts=int(run.tags[PROMPTS_TAG])) for run in runs])
    return every[every["interval"] == every["interval"].min()]


def _draw_skills(found: pd.DataFrame) -> Figure:
    return skill_figure(found, int(found["prompts"].iloc[0]))


Kind = tuple[Callable[[Sequence[RecordedRun], Sequence[str]], pd.DataFrame], Callable[[pd.DataFrame], Figure]]
# What a figure shows, of its runs and labels, and how it is drawn.
KINDS: dict[str, Kind] = {
    "memory": (_pooled, accuracy_figure),
    "interval": (_pooled, interval_figure),
    "skill": (_skills, _draw_skills),
}
