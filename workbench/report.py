"""One HTML page from the runs in MLflow: figures, tables and where the numbers come from.

The page stands alone: styles inline, images as data URIs, nothing is fetched. All text from the store is escaped. Every
memory figure of a run stands beside what it cost in quality, or beside the statement that quality was not measured.
What the figures show is decided in `figures`, how runs become tables in `report_section`; this module gathers sweeps
and lays out the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.figures import set_style
from workbench.page import render_page, write_page
from workbench.quantities import show_bytes, show_seconds
from workbench.report_section import Section, read_section
from workbench.run_record import RunRecord
from workbench.store import open_store, store_name
from workbench.sweep_state import NOTEBOOK_TAG, PAGE_CACHE_TAG, SWEEP_TAG, current_runs, find_parent, parents

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient


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
        raise ExperimentError(f"the store at {store_name()} holds no sweep. Run `emoe sweep FILE` first.")
    set_style()
    page = render([read_sweep_part(client, parent) for parent in chosen])
    return write_page(out, page)


def render(parts: Sequence[SweepPart]) -> str:
    """Return the page as HTML."""
    return render_page("report.html.j2", parts=parts)


def read_sweep_part(client: MlflowClient, parent: MlflowRun) -> SweepPart:
    """Gather one sweep from the store."""
    runs = current_runs(client, parent)
    counts: dict[str, int] = {}
    for item in runs:
        counts[item.info.status.lower()] = counts.get(item.info.status.lower(), 0) + 1
    names = list(dict.fromkeys(item.data.tags.get(NOTEBOOK_TAG, "?") for item in runs))
    groups = [[item for item in runs if item.data.tags.get(NOTEBOOK_TAG, "?") == name] for name in names]
    environments = [found for item in runs if (found := RunRecord.of(client, item).environment)]
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
    """Return how timed runs read experts: through the page cache, a load is the memory's speed and not the disk's."""
    said = sorted({item.data.tags.get(PAGE_CACHE_TAG, "") for item in runs} - {""})
    if not said:
        return "No run of this sweep says how experts were read; take no load time from it."
    return f"Page cache in timed runs: {' / '.join(said)}."


def _named(client: MlflowClient, name: str) -> MlflowRun:
    parent = find_parent(client, name)
    if parent is None:
        known = ", ".join(item.data.tags[SWEEP_TAG] for item in parents(client)) or "none"
        raise ExperimentError(f"the store at {store_name()} has no sweep named {name!r}. Sweeps: {known}.")
    return parent


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
