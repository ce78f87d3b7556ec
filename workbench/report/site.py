"""The site's folder: which sweeps it shows, its pages, and how it takes the place of the one before.

Everything is written into a folder beside it, which then takes its name: a report that fails halfway leaves the former
one as it was. A folder that is not a report is never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from emoe_core.files import whole_folder
from workbench.paper.figures import set_style
from workbench.report.files import as_tables, write_table
from workbench.report.front_part import HEADINGS
from workbench.report.page import render_page, write_page
from workbench.report.sweep_page import SweepPage, read_by_hand, read_sweep_page
from workbench.tracking.place import store_name
from workbench.tracking.runs import SWEEP_TAG, find_parent, parents
from workbench.tracking.store import open_store
from workbench.tracking.store_errors import store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

DEFAULT_FOLDER = Path("reports/report")
FIRST_PAGE = "index.html"
MARK = "report.json"
KIND = "emoe report"


def write_report(
    out: Path, sweeps: Sequence[str] | None = None, tell: Callable[[str], object] = lambda line: None
) -> Path:
    """Write the site and return its first page.

    Parameters
    ----------
    out : Path
        Folder of the site; a report that is there is replaced.
    sweeps : sequence of str, optional
        Names of sweeps; when missing, the newest run of every sweep and of every notebook that was run by hand.
    tell : callable, optional
        Called with a line as the work goes on.

    Raises
    ------
    ExperimentError
        When the store has nothing to show, or no sweep of a given name; when `out` is a file or a folder with
        something else in it.
    """
    _refuse_other(out)
    client = open_store()
    chosen = parents(client) if sweeps is None else [_named(client, name) for name in sweeps]
    with store_errors(), whole_folder(out) as scratch:
        set_style()
        pages = [read_sweep_page(client, parent, scratch, tell) for parent in chosen]
        by_hand = read_by_hand(client, scratch, tell) if sweeps is None else None
        pages += [by_hand] if by_hand else []
        if not pages:
            raise ExperimentError(
                f"the store at {store_name()} holds no sweep and no run of a notebook. Run `emoe sweep FILE` first."
            )
        write_pages(pages, scratch)
    return out / FIRST_PAGE


def write_pages(pages: Sequence[SweepPage], site: Path) -> None:
    """Write the pages of a site whose figures and files are there already."""
    paper = as_tables([page.paper for page in pages])
    downloads = write_table(site, "paper", paper, "the paper's figures beside ours") if len(paper) else []
    addresses = {run.run_id: run.address for page in pages for run in page.runs}
    rows = [row | {"run": addresses[row["run_id"]]} for row in paper.to_dict("records")]
    common: dict[str, Any] = {"pages": pages, "headings": HEADINGS, "has_paper": bool(rows)}
    write_page(site / FIRST_PAGE, render_page("report_index.html.j2", root="", paper_rows=len(rows), **common))
    if rows:
        page = render_page("report_paper.html.j2", root="", rows=rows, downloads=downloads, **common)
        write_page(site / "paper.html", page)
    for part in pages:
        write_page(site / part.address, render_page("report_sweep.html.j2", root="", part=part, **common))
        for run in part.runs:
            page = render_page("report_run.html.j2", root="../../", run=run, part=part, **common)
            write_page(site / run.address, page)
    mark = {"kind": KIND, "format": 1, "sweeps": [page.name for page in pages]}
    write_page(site / MARK, json.dumps(mark, indent=1))


def _refuse_other(out: Path) -> None:
    if out.suffix in (".html", ".htm") or out.is_file():
        raise ExperimentError(f"a report is a folder, not the file {out}: name a folder, such as {DEFAULT_FOLDER}.")
    if out.is_dir() and any(out.iterdir()):
        mark = out / MARK
        if not mark.is_file() or KIND not in mark.read_text(encoding="utf-8", errors="replace"):
            raise ExperimentError(f"{out} holds something else than a report: name another folder, or empty this one.")


def _named(client: MlflowClient, name: str) -> MlflowRun:
    parent = find_parent(client, name)
    if parent is None:
        known = ", ".join(item.data.tags[SWEEP_TAG] for item in parents(client)) or "none"
        raise ExperimentError(f"the store at {store_name()} has no sweep named {name!r}. Sweeps: {known}.")
    return parent
