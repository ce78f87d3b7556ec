"""The runs of one notebook as the report shows them: a table, and figures across runs.

Terms: parameters that differ between runs become *columns*, the others are stated once. Metric columns are grouped into
memory, quality, time and other, in this order, so that a saving stands beside what it cost. The main table holds the
metrics that the sweep file names, and quality metrics whenever a memory metric is among them; a second table holds
everything. A column has one unit, in its heading.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.metrics.catalogue import metric_of
from workbench.metrics.show import column_texts, in_order, main_metrics, words_of
from workbench.paper.figures import served_shares
from workbench.paper.interval import swept_intervals
from workbench.report.parameters import parameter_text
from workbench.report.pictures import Picture, draw_picture
from workbench.report.run_page import RunPage
from workbench.tracking.results import frame_of
from workbench.tracking.runs import AXES_TAG, METRICS_TAG, listed_in
from workbench.tracking.store import decode, recorded_metrics

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow.entities import Run as MlflowRun


# What is drawn across the runs of every notebook, by title, where the runs hold it.
FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    "Prediction interval and task skipping": swept_intervals,
    "How expert lookups were served": served_shares,
}


@dataclass(frozen=True)
class Column:
    """A column: the metric's or parameter's name, its heading with unit, its group, and a text for each run.

    What a metric means may stand beside.
    """

    name: str
    heading: str
    group: str
    texts: list[str]
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Columns over the runs of a section."""

    columns: list[Column]

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Return the groups of neighbouring columns with their widths."""
        return [(group, len(list(run))) for group, run in itertools.groupby(item.group for item in self.columns)]


@dataclass(frozen=True)
class Section:
    """The runs of one notebook in a sweep.

    Attributes
    ----------
    main, full : Table
        The metrics worth a first look, and all of them; `full` is None when that is the same.
    fixed : list of (name, text)
        Parameters that all runs share.
    unjudged : bool
        Whether runs report memory and none reports quality.
    """

    notebook: str
    rows: list[RunPage]
    main: Table
    full: Table | None
    fixed: list[tuple[str, str]]
    pictures: list[Picture]
    unjudged: bool


def read_section(notebook: str, runs: list[MlflowRun], pages: list[RunPage], site: Path, name: str) -> Section:
    """Gather the runs of one notebook.

    Parameters
    ----------
    notebook : str
    runs : list of run
        As MLflow gave them.
    pages : list of RunPage
        The pages of the runs, in the same order.
    site : Path
        Folder of the site; figures are drawn into it under names that start with `name`.
    """
    texts = [{name: parameter_text(decode(text)) for name, text in item.data.params.items()} for item in runs]
    names = list(dict.fromkeys(name for row in texts for name in row))
    axes = listed_in(runs, AXES_TAG)
    # A run that was cut short has not said everything: what it lacks is no difference.
    varying = axes + [n for n in names if n not in axes and len({row[n] for row in texts if n in row}) > 1]
    parameters = [Column(n, n.replace("_", " "), "parameter", [row.get(n, "–") for row in texts]) for n in varying]
    named = listed_in(runs, METRICS_TAG)
    every = in_order({name for item in runs for name in item.data.metrics}, named)
    chosen = main_metrics(named, every)
    columns = {name: _metric_column(name, runs) for name in every}
    groups = {metric_of(name).group for name in every}
    return Section(
        notebook=notebook,
        rows=pages,
        main=Table(parameters + [columns[name] for name in chosen]),
        full=Table(parameters + list(columns.values())) if len(chosen) < len(every) else None,
        fixed=[(name, next(row[name] for row in texts if name in row)) for name in names if name not in varying],
        pictures=_pictures(runs, site, name),
        unjudged="memory" in groups and "quality" not in groups,
    )


def _metric_column(name: str, runs: list[MlflowRun]) -> Column:
    unit, texts = column_texts(name, [recorded_metrics(item).get(name) for item in runs])
    heading = f"{words_of(name)} ({unit})" if unit else words_of(name)
    return Column(name, heading, metric_of(name).group, texts, metric_of(name).meaning)


def _pictures(runs: list[MlflowRun], site: Path, name: str) -> list[Picture]:
    frame = frame_of(runs)
    finished = frame[frame["status"] == "FINISHED"].reset_index(drop=True)
    if finished.empty:
        return []
    drawn = [
        draw_picture(title, partial(draw, finished), site, f"{name}-{number}")
        for number, (title, draw) in enumerate(FIGURES.items(), start=1)
    ]
    return [picture for picture in drawn if picture is not None]
