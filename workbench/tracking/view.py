"""How MLflow's interface shows a sweep: which runs, columns and charts, in which order.

Left alone the interface shows one folded row a sweep and no number. A *shared view*, as its own button "Share" makes
them, is a tag of the experiment that an address names: current runs only, one below the other, the parameters that vary
and the metrics that the sweep file names as columns, and charts in sections: what is saved beside what it costs, then
memory, quality, time and the rest. The tag's format is the interface's own (MLflow 3); a version that does not know it
says so and shows its default.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from workbench.metrics.catalogue import GROUPS, OTHER, QUALITY, metric_of
from workbench.metrics.show import in_order, main_metrics
from workbench.tracking.run import PARENT_TAG
from workbench.tracking.runs import AXES_TAG, METRICS_TAG, NOTEBOOK_TAG, SUPERSEDED_TAG, current_runs, listed_in

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

KEY = "emoe"
VIEW_TAG = f"mlflow.sharedViewState.{KEY}"
COSTS, PATHS = "saved and paid", "all settings of a notebook"
# Where both are known: what is saved beside what it costs.
PAIRS = (
    ("memory_ratio", "perplexity_ratio"),
    ("memory_ratio", "tpot_ratio"),
    ("slot_share", "perplexity_ratio"),
    ("slot_share", "kl_nats"),
    ("tpot_ratio", "perplexity_ratio"),
)
NAME_COLUMN = "attributes.`Run Name`"
MOST_BARS = 24  # a section
MOST_LETTERS = 5000  # of a tag, in every database that MLflow writes to
SHOW_ALL_RUNS = 100


def arrange_view(client: MlflowClient, parent: MlflowRun) -> None:
    """Give the experiment of a sweep the view of its current runs."""
    runs = current_runs(client, parent)
    if runs:
        client.set_experiment_tag(parent.info.experiment_id, VIEW_TAG, encoded_view(runs, parent.info.run_id))


def view_address(experiment: str, server: str = "http://127.0.0.1:5000") -> str:
    """Return the address of an experiment's view in the interface."""
    return f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={KEY}"


def encoded_view(runs: Sequence[MlflowRun], parent_id: str) -> str:
    """Return the view of some runs as the interface reads it: deflated JSON, shortened until it fits a tag."""
    for bars in range(MOST_BARS, -1, -4):
        text = json.dumps(view_of(runs, parent_id, bars), separators=(",", ":"))
        packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
        if len(packed) <= MOST_LETTERS:
            break
    return packed


def view_of(runs: Sequence[MlflowRun], parent_id: str, most_bars: int = MOST_BARS) -> dict[str, Any]:
    """Return the view of some runs as the interface's state."""
    named, axes = listed_in(runs, METRICS_TAG), listed_in(runs, AXES_TAG)
    metrics = in_order({name for item in runs for name in item.data.metrics}, named)
    shown = [name for name in main_metrics(named, metrics) if name in named or metric_of(name).group == QUALITY]
    columns = [f"params.`{name}`" for name in axes] + [f"metrics.`{name}`" for name in shown or metrics[:8]]
    pairs = [pair for pair in PAIRS if set(pair) <= set(metrics)]
    charts = [_scatter(*pair) for pair in pairs]
    charts += [chart for notebook in _notebooks(runs) if (chart := _paths(notebook, runs))]
    sections = [_section(COSTS), _section(PATHS)]
    for group in GROUPS:
        own = [name for name in metrics if metric_of(name).group == group][:most_bars]
        sections.append(_section(group, folded=group == OTHER))
        charts += [_bar(name, group) for name in own]
    used = {chart["metricSectionId"] for chart in charts}
    return {
        "searchFilter": f"tags.`{SUPERSEDED_TAG}` = 'false' and tags.`{PARENT_TAG}` = '{parent_id}'",
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": [NAME_COLUMN, *columns],
        "columnWidths": {NAME_COLUMN: 380},
        "compareRunCharts": charts,
        "compareRunSections": [section for section in sections if section["uuid"] in used],
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
    }


def _notebooks(runs: Iterable[MlflowRun]) -> list[str]:
    return list(dict.fromkeys(item.data.tags.get(NOTEBOOK_TAG, "") for item in runs))


def _paths(notebook: str, runs: Sequence[MlflowRun]) -> dict[str, Any] | None:
    """Return parallel coordinates of a notebook's runs: what varies, then what came of it."""
    own = [item for item in runs if item.data.tags.get(NOTEBOOK_TAG, "") == notebook]
    axes = listed_in(own, AXES_TAG)
    known = [name for name in listed_in(own, METRICS_TAG) if any(name in item.data.metrics for item in own)]
    if len(own) < 2 or not axes or not known:
        return None
    settings = {"selectedParams": axes, "selectedMetrics": known, "showAllRuns": True}
    return _chart("PARALLEL", f"paths-{notebook}", PATHS, notebook) | settings


def _scatter(x: str, y: str) -> dict[str, Any]:
    ends = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"}}
    return _chart("SCATTER", f"{x}-{y}", COSTS, f"{y} over {x}") | ends


def _bar(metric: str, group: str) -> dict[str, Any]:
    return _chart("BAR", f"bar-{metric}", group, metric) | {"metricKey": metric}


def _chart(kind: str, name: str, section: str, title: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": name,
        "runsCountToCompare": SHOW_ALL_RUNS,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "displayName": title,
    }


def _section(name: str, *, folded: bool = False) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": not folded, "isReordered": True}
