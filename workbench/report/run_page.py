"""One run as the site shows it: parameters, metrics by group, where it ran, its figures, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from workbench.metrics.catalogue import metric_of
from workbench.report.files import ID_LETTERS, RUNS, Download, copy_artifacts
from workbench.report.metric_tables import MetricTable, metric_tables
from workbench.report.parameters import parameter_text
from workbench.report.pictures import Picture, draw_picture
from workbench.report.provenance import provenance
from workbench.report.residency_map import residency_map
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import ERROR_TAG, PAGE_CACHE_TAG
from workbench.tracking.store import slug

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MOST_MAPS = 12


@dataclass(frozen=True)
class RunPage:
    """A run of the site.

    Attributes
    ----------
    metrics : list of MetricTable
    places : list of (heading, sentence)
        Where the metrics were measured.
    residency, figures : list of Picture
        Maps of who was resident, one a configuration; figures that the run recorded.
    hidden_maps : int
        Configurations whose map is left out; their rows are in the table ``residency``.
    """

    run_id: str
    name: str
    notebook: str
    sweep: str
    status: str
    error: str
    params: list[tuple[str, str]]
    metrics: list[MetricTable]
    places: list[tuple[str, str]]
    unjudged: bool
    page_cache: str
    provenance: list[tuple[str, str]]
    residency: list[Picture]
    figures: list[Picture]
    hidden_maps: int
    files: list[Download]

    @property
    def address(self) -> str:
        """Where the page lies in the site."""
        return f"{RUNS}/{self.run_id[:ID_LETTERS]}/index.html"


def read_run_page(client: MlflowClient, record: RunRecord, sweep: str, site: Path) -> RunPage:
    """Gather one run, and copy its files into the site."""
    files, images = copy_artifacts(client, record.run_id, site)
    maps, hidden = _residency(record, site)
    groups = {metric_of(name).group for name in record.metrics}
    environment = record.environment
    tables, places = metric_tables(record.metrics, record.params, environment)
    return RunPage(
        run_id=record.run_id,
        name=record.name,
        notebook=record.notebook_name,
        sweep=sweep,
        status=record.status.lower(),
        error=record.tags.get(ERROR_TAG, ""),
        params=[(name, parameter_text(value)) for name, value in record.params.items()],
        metrics=tables,
        places=places,
        unjudged="memory" in groups and "quality" not in groups,
        page_cache=record.tags.get(PAGE_CACHE_TAG, ""),
        provenance=provenance([environment] if environment else []),
        residency=maps,
        figures=[Picture(item.name, item.address) for item in images],
        hidden_maps=hidden,
        files=files,
    )


def _residency(record: RunRecord, site: Path) -> tuple[list[Picture], int]:
    table = record.table("residency")
    if table is None or table.empty:
        return [], 0
    labelled = table.assign(label="") if "label" not in table else table
    found = []
    parts = list(labelled.groupby("label", sort=False))
    for number, (label, part) in enumerate(parts[:MOST_MAPS]):
        title = "Who was resident, who was wanted" + (f": {label}" if label else "")
        picture = _map(title, part, site, f"residency-{slug(record.run_id[:ID_LETTERS])}-{number}")
        found += [picture] if picture else []
    return found, max(0, len(parts) - MOST_MAPS)


def _map(title: str, part: pd.DataFrame, site: Path, name: str) -> Picture | None:
    return draw_picture(title, lambda: residency_map(part), site, name)
