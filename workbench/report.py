"""One HTML page from the runs in MLflow: figures, tables and where the numbers come from.

The page stands alone: styles inline, images as data URIs, nothing is fetched. All text from the store is escaped. Every
memory figure of a run stands beside what it cost in quality, or beside the statement that quality was not measured.
What the figures show is decided in `figures`; this module gathers and lays out.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.figures import REPORT_FIGURES, set_style
from workbench.quantities import show, show_bytes, show_seconds, words_of
from workbench.results import frame_of
from workbench.store import decode, disk_errors, open_store, store_dir
from workbench.sweep_file import short
from workbench.sweep_state import NOTEBOOK_TAG, SWEEP_TAG, current_runs, find_parent, parents
from workbench.tracking import FIGURE_FOLDER

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

MAX_RUNS_WITH_FIGURES = 24
# In the order in which the columns of the table appear; a metric belongs to the first group that names a part of it.
GROUPS = {
    "memory": ("peak_bytes", "slot_bytes", "saved", "resident", "dense_bytes", "expert_bytes", "memory"),
    "quality": ("perplexity", "kl_", "_kl", "agreement", "similarity", "accuracy", "identical"),
    "time": ("_s", "per_s"),
}
PAGE_CACHE = {
    "direct": "Experts were read past the page cache (O_DIRECT): loads are the disk's.",
    "cached": "Experts were read through the page cache: loads may be the memory's speed, not the disk's.",
    "unknown": "The runs do not say whether experts were read through the page cache.",
}


@dataclass(frozen=True)
class Picture:
    """An image of the page: its title and its address as a data URI."""

    title: str
    address: str


@dataclass(frozen=True)
class Section:
    """The runs of one notebook in a sweep.

    Attributes
    ----------
    columns : list of (name, heading, group)
        Columns of the table; `group` is ``parameter``, ``memory``, ``quality``, ``time`` or ``other``.
    rows : list of dict
        One per run: ``status``, ``error``, ``cells`` (texts in the order of the columns), ``pictures``.
    unjudged : bool
        Whether runs report memory and no quality.
    """

    notebook: str
    columns: list[tuple[str, str, str]]
    rows: list[dict[str, Any]]
    pictures: list[Picture]
    fixed: list[tuple[str, str]]
    unjudged: bool
    kinds: str

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Return the groups of neighbouring columns with their widths."""
        return [(group, len(list(run))) for group, run in itertools.groupby(column[2] for column in self.columns)]


@dataclass(frozen=True)
class SweepPart:
    """One sweep of the page."""

    name: str
    description: str
    status: str
    last: str
    duration: str
    counts: dict[str, int]
    sections: list[Section]
    provenance: list[tuple[str, str]]
    page_cache: str


def write_report(out: Path, sweeps: Sequence[str] | None = None) -> Path:
    """Write the page and return its path.

    Parameters
    ----------
    out : Path
        File to write; its folder is made.
    sweeps : sequence of str, optional
        Names of sweeps; the newest run of every sweep when missing.

    Raises
    ------
    ExperimentError
        When the store has no sweep, or none of a given name.
    """
    client = open_store()
    chosen = parents(client) if sweeps is None else [_named(client, name) for name in sweeps]
    if not chosen:
        raise ExperimentError(f"the store at {store_dir()} holds no sweep. Run `emoe sweep FILE` first.")
    set_style()
    page = render([read_sweep_part(client, parent) for parent in chosen])
    with disk_errors():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    return out


def render(parts: Sequence[SweepPart]) -> str:
    """Return the page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workbench"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("report.html.j2").render(parts=parts, written=written)


def read_sweep_part(client: MlflowClient, parent: MlflowRun) -> SweepPart:
    """Gather one sweep from the store."""
    runs = current_runs(client, parent)
    counts: dict[str, int] = {}
    for item in runs:
        counts[item.info.status.lower()] = counts.get(item.info.status.lower(), 0) + 1
    names = list(dict.fromkeys(item.data.tags.get(NOTEBOOK_TAG, "?") for item in runs))
    groups = [[item for item in runs if item.data.tags.get(NOTEBOOK_TAG, "?") == name] for name in names]
    environments = [found for item in runs if (found := _environment(client, item.info.run_id))]
    ended_ms = max((item.info.end_time or 0 for item in runs), default=0)
    spent_s = sum((item.info.end_time - item.info.start_time) / 1000 for item in runs if item.info.end_time)
    return SweepPart(
        name=parent.data.tags[SWEEP_TAG],
        description=parent.data.tags.get("mlflow.note.content", ""),
        status=parent.info.status.lower(),
        last=_clock(ended_ms or parent.info.start_time),
        duration=show_seconds(spent_s),
        counts=counts,
        sections=[read_section(client, name, group) for name, group in zip(names, groups, strict=True)],
        provenance=provenance(environments),
        page_cache=page_cache_statement(runs),
    )


def read_section(client: MlflowClient, notebook: str, runs: list[MlflowRun]) -> Section:
    """Gather the runs of one notebook: what varies becomes columns, what does not is stated once."""
    frame = frame_of(runs)
    texts = [{name: short(decode(text)) for name, text in item.data.params.items()} for item in runs]
    names = list(dict.fromkeys(name for row in texts for name in row))
    axes = list(dict.fromkeys(a for item in runs for a in item.data.tags.get("emoe.axes", "").split(",") if a))
    varying = axes + [n for n in names if n not in axes and len({row.get(n, "") for row in texts}) > 1]
    fixed = [(name, next(row[name] for row in texts if name in row)) for name in names if name not in varying]
    metrics = sorted({name for item in runs for name in item.data.metrics}, key=lambda name: (_rank(name), name))
    columns = [(name, name.replace("_", " "), "parameter") for name in varying]
    columns += [(name, words_of(name), group_of(name)) for name in metrics]
    rows = []
    for position, (item, row) in enumerate(zip(runs, texts, strict=True)):
        cells = [row.get(name, "–") for name in varying] + [show(n, item.data.metrics.get(n)) for n in metrics]
        shown = position < MAX_RUNS_WITH_FIGURES
        rows.append(
            {
                "name": item.info.run_name,
                "status": item.info.status.lower(),
                "error": item.data.tags.get("emoe.error", ""),
                "cells": cells,
                "pictures": _run_pictures(client, item.info.run_id) if shown else [],
            }
        )
    groups = {group for _, _, group in columns}
    return Section(
        notebook=notebook,
        columns=columns,
        rows=rows,
        pictures=_cross_run_pictures(frame),
        fixed=fixed,
        unjudged="memory" in groups and "quality" not in groups,
        kinds=", ".join(sorted({item.data.tags.get("emoe.kind", "") for item in runs})),
    )


def group_of(metric: str) -> str:
    """Return the group of columns that a metric belongs to."""
    for group, parts in GROUPS.items():
        if any(metric.endswith(part) if part.startswith("_") else part in metric for part in parts):
            return group
    return "other"


def _rank(metric: str) -> int:
    return [*GROUPS, "other"].index(group_of(metric))


def provenance(environments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what the runs ran on as (term, text); differing values are all listed."""
    if not environments:
        return []

    def values(get: Any) -> str:
        found = list(dict.fromkeys(str(get(item)) for item in environments if get(item) not in (None, "", [], {})))
        return " / ".join(found) or "not recorded"

    def package(name: str) -> str:
        return values(lambda item: item["packages"].get(name))

    return [
        ("Processor", values(lambda item: item["cpu"])),
        ("Instruction sets", values(lambda item: ", ".join(item["cpu_flags"]))),
        ("Cores, threads", values(lambda item: f"{item['cores']}, {item['threads']}")),
        ("Memory", values(lambda item: show_bytes(item["ram_bytes"]))),
        ("GPU", values(lambda item: ", ".join(item["gpus"]) or "none")),
        ("Python", values(lambda item: item["python"])),
        ("torch", package("torch")),
        ("transformers", package("transformers")),
        ("System", values(lambda item: item["platform"])),
        ("Commit", values(lambda item: f"{item['commit'] or 'unknown'}{' (modified)' if item['dirty'] else ''}")),
        ("Model", values(lambda item: item["model_hash"])),
        ("Data", values(lambda item: item["data_hash"])),
        ("Seed", values(lambda item: item["seed"])),
        ("Data type", values(lambda item: item["dtype"])),
    ]


def page_cache_statement(runs: list[MlflowRun]) -> str:
    """Return what the runs' tag ``emoe.storage`` says about the page cache."""
    said = {item.data.tags.get("emoe.storage", "") for item in runs} - {""}
    if not said:
        return PAGE_CACHE["unknown"]
    return PAGE_CACHE["direct" if all("direct" in text.lower() for text in said) else "cached"]


def _named(client: MlflowClient, name: str) -> MlflowRun:
    parent = find_parent(client, name)
    if parent is None:
        known = ", ".join(item.data.tags[SWEEP_TAG] for item in parents(client)) or "none"
        raise ExperimentError(f"the store at {store_dir()} has no sweep named {name!r}. Sweeps: {known}.")
    return parent


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _environment(client: MlflowClient, run_id: str) -> dict[str, Any] | None:
    if not any(item.path == "environment.json" for item in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return dict(json.loads(Path(client.download_artifacts(run_id, "environment.json", scratch)).read_text()))


def _run_pictures(client: MlflowClient, run_id: str) -> list[Picture]:
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for item in client.list_artifacts(run_id, FIGURE_FOLDER):
            if item.path.endswith(".png"):
                content = Path(client.download_artifacts(run_id, item.path, scratch)).read_bytes()
                found.append(Picture(Path(item.path).stem.replace("_", " "), _data_uri(content)))
    return found


def _cross_run_pictures(frame: pd.DataFrame) -> list[Picture]:
    finished = frame[frame["status"] == "FINISHED"].reset_index(drop=True)
    drawn = [(title, draw(finished)) for title, draw in REPORT_FIGURES.items()] if len(finished) else []
    return [Picture(title, _data_uri(_png(figure))) for title, figure in drawn if figure is not None]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    import matplotlib.pyplot as plt

    plt.close(figure)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
