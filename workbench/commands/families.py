"""``emoe model families``: which Mixture-of-Experts families are served, and how."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_core.errors import OptionError
from workbench.progress import progress_bar

if TYPE_CHECKING:
    from workbench.models.families import FamilyRow


def families(
    check: Annotated[
        list[str] | None,
        typer.Option(help="Prove this model type anew on a tiny random checkpoint; repeatable, or be 'all'."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="After '--check all': renew the record.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List model families: how their experts lie on disk, whether they are exact, and how they are rerouted."""
    from workbench.models.families import TOGETHER, as_markdown, recorded

    if write and check != ["all"]:
        raise OptionError("--write renews the whole record: give it with --check all.")
    rows = recorded() if check is None else _proven(check)
    if write:
        from workbench.models.families import write_record

        write_record(list(rows))
    if markdown:
        typer.echo(as_markdown(rows), nl=False)
        return
    console = Console(highlight=False)
    # What 80 columns hold; --markdown has the classes too, and why requests run one at a time.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("model type", "experts on disk", "rerouting", "requests"):
        table.add_column(column, no_wrap=column in ("model type", "rerouting"), overflow="fold")
    for row in rows:
        if not row.refused:
            requests = row.requests if row.requests == TOGETHER else "one at a time"
            table.add_row(row.model_type, ", ".join((row.on_disk, *row.layout)), row.rerouting, requests)
    if table.row_count:
        console.print(table)
        console.print("[dim]All are exact at tolerance 0. --markdown says more of each.[/]")
    for row in rows:
        if row.refused:
            console.print(f"[bold]{row.model_type}[/] is refused: {escape(row.refused)}", soft_wrap=True)


def _proven(wanted: list[str]) -> tuple[FamilyRow, ...]:
    from transformers import logging as transformers_logging

    from emoe_core.checkpoint.families import REFUSED
    from emoe_core.checkpoint.families import families as known_families
    from workbench.models.families import prove, refused

    known = [family.model_type for family in known_families()]
    unknown = sorted(set(wanted) - {*known, *REFUSED, "all"})
    if unknown:
        raise OptionError(f"--check {unknown[0]}: no such family; `emoe model families` lists them.")
    chosen = [*known, *REFUSED] if "all" in wanted else wanted
    rows = [row for row in refused() if row.model_type in chosen]
    served = [model_type for model_type in chosen if model_type not in REFUSED]
    transformers_logging.disable_progress_bar()
    with progress_bar("proving families") as progress:
        for done, model_type in enumerate(served):
            progress(done, len(served))
            with tempfile.TemporaryDirectory() as folder:
                rows.append(prove(model_type, Path(folder)))
    return tuple(sorted(rows, key=lambda row: row.model_type))
