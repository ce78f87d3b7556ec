"""One sweep as the site shows it: fronts, tables and figures over its runs, where it ran, and its data.

Notebooks that were opened by hand have a page of the same form: the newest finished run of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.metrics.show import show_seconds, words_of
from workbench.report.files import Download, as_tables, write_table
from workbench.report.front_part import FrontPart, read_fronts, read_points
from workbench.report.paper import paper_rows
from workbench.report.provenance import page_cache_statement, provenance
from workbench.report.run_page import RunPage, read_run_page
from workbench.report.section import Section, read_section
from workbench.tracking.record import RunRecord
from workbench.tracking.results import frame_of
from workbench.tracking.run import EXPERIMENT_TAG, PARENT_TAG
from workbench.tracking.runs import DRIFT_LIMIT, NOTEBOOK_TAG, SWEEP_TAG, current_runs, drift_of, search
from workbench.tracking.store import slug

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

BY_HAND = "notebooks run by hand"


@dataclass(frozen=True)
class SweepPage:
    """One sweep of the site; `paper` holds what its runs say beside the paper (`paper_rows`)."""

    name: str
    address: str
    description: str
    status: str
    last: str
    duration: str
    counts: dict[str, int]
    fronts: list[FrontPart]
    sections: list[Section]
    provenance: list[tuple[str, str]]
    page_cache: str
    drift: str
    drifted: bool
    downloads: list[Download]
    paper: pd.DataFrame

    @property
    def runs(self) -> list[RunPage]:
        """Return the pages of its runs."""
        return [row for section in self.sections for row in section.rows]

    @property
    def unjudged(self) -> bool:
        """Whether some of its runs report memory and no quality."""
        return any(section.unjudged for section in self.sections)


def read_sweep_page(
    client: MlflowClient, parent: MlflowRun, site: Path, tell: Callable[[str], object] = lambda line: None
) -> SweepPage:
    """Gather one sweep from the store, its figures and files written into the site."""
    about = (parent.data.tags[SWEEP_TAG], parent.data.tags.get("mlflow.note.content", ""), parent.info.status.lower())
    drift = drift_of(parent)
    return _page(client, current_runs(client, parent), *about, parent.info.start_time, site, tell, drift)


def read_by_hand(
    client: MlflowClient, site: Path, tell: Callable[[str], object] = lambda line: None
) -> SweepPage | None:
    """Gather the newest finished run of each notebook that no sweep ran; None where there is none."""
    newest: dict[str, MlflowRun] = {}
    for item in search(client, f"tags.`{EXPERIMENT_TAG}` != '' and attributes.status = 'FINISHED'"):
        if PARENT_TAG not in item.data.tags:
            newest.setdefault(item.data.tags[EXPERIMENT_TAG], item)
    if not newest:
        return None
    runs = [newest[name] for name in sorted(newest)]
    about = (BY_HAND, "The newest finished run of each notebook that was opened outside a sweep.", "finished")
    return _page(client, runs, *about, runs[0].info.start_time, site, tell)


def _page(
    client: MlflowClient,
    runs: list[MlflowRun],
    name: str,
    description: str,
    status: str,
    started_ms: int,
    site: Path,
    tell: Callable[[str], object],
    drift: tuple[str, float] | None = None,
) -> SweepPage:
    file = _free_name(site, slug(name))
    records, pages = [], []
    for number, item in enumerate(runs, start=1):
        tell(f"{name}: run {number} of {len(runs)}")
        record = RunRecord.of(client, item)
        records.append(record)
        pages.append(read_run_page(client, record, name, site))
    sections = []
    for number, notebook in enumerate(dict.fromkeys(_notebook(item) for item in runs), start=1):
        group = [place for place, item in enumerate(runs) if _notebook(item) == notebook]
        chosen = [runs[place] for place in group], [pages[place] for place in group]
        sections.append(read_section(notebook, *chosen, site, f"{file}-{number}"))
    counts: dict[str, int] = {}
    for item in runs:
        counts[item.info.status.lower()] = counts.get(item.info.status.lower(), 0) + 1
    points = read_points(records)
    ended_ms = max((item.info.end_time or 0 for item in runs), default=0)
    environments = [found for record in records if (found := record.environment)]
    return SweepPage(
        name=name,
        address=f"sweep-{file}.html",
        description=description,
        status=status,
        last=_clock(ended_ms or started_ms),
        duration=show_seconds(sum((i.info.end_time - i.info.start_time) / 1000 for i in runs if i.info.end_time)),
        counts=counts,
        fronts=read_fronts(points, records, pages, site, file),
        sections=sections,
        provenance=provenance(environments),
        page_cache=page_cache_statement([item.data.tags for item in runs]),
        drift="" if drift is None else f"{words_of(drift[0])} {drift[1]:+.1%} from the first control to the last",
        drifted=drift is not None and abs(drift[1]) > DRIFT_LIMIT,
        downloads=[
            *write_table(site, f"{file}-runs", _runs_table(runs, records), "runs: parameters, metrics, environment"),
            *(write_table(site, f"{file}-points", points, "operating points") if len(points) else []),
        ],
        paper=as_tables([paper_rows(record, name) for record in records if record.status == "FINISHED"]),
    )


def _notebook(item: MlflowRun) -> str:
    return str(item.data.tags.get(NOTEBOOK_TAG) or item.data.tags.get(EXPERIMENT_TAG, "?"))


def _runs_table(runs: list[MlflowRun], records: list[RunRecord]) -> pd.DataFrame:
    """Return the runs as `results.frame_of` has them, with where each ran."""
    described: list[dict[str, Any]] = []
    for record in records:
        found = record.environment
        flat = {f"env_{key}": value for key, value in found.items() if isinstance(value, str | int | float | bool)}
        described.append(flat | {f"env_{key}": value for key, value in found.get("packages", {}).items()})
    return pd.concat([frame_of(runs), pd.DataFrame(described, index=range(len(runs)))], axis=1)


def _free_name(site: Path, name: str) -> str:
    """Return a file name that no other sweep of the site has: names that differ may have the same slug."""
    number, free = 1, name
    while (site / "data" / f"{free}-runs.csv").exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
