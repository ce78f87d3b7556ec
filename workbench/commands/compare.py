"""``emoe compare``: two recorded runs or sweeps against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from emoe_core.errors import ExperimentError
from workbench.commands.options import AsJson

if TYPE_CHECKING:
    from workbench.compare.differences import Difference
    from workbench.compare.texts import ChangeRow

# Columns of a terminal below which an interval stands under its value, not beside it.
NARROW = 110
WORDS = ("metric", "verdict", "")
TONES = {"better": "green", "worse": "red", "": ""}
TargetHelp = "Run id or the start of it, run name, or sweep name."


def compare(
    a: Annotated[str, typer.Argument(help=TargetHelp, metavar="A")],
    b: Annotated[str, typer.Argument(help="The other one, of the same kind.", metavar="B")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Only this metric, by name or as tables show it; repeatable."),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every metric with all columns, what is equal and ends of intervals too.")
    ] = False,
    without_times: Annotated[
        bool, typer.Option("--without-times", help="Leave out times; warm and cold runs may then be compared.")
    ] = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Also write a page (HTML) to this file.")] = None,
) -> None:
    """Compare two recorded runs or sweeps: paired differences and ratios with 95% bootstrap intervals.

    Runs are paired prompt by prompt, sweeps run by run. What differs beside the parameters is listed, and what that
    makes doubtful is marked. Times of a run that read experts from memory are not compared with one that read the disk.
    """
    from workbench.compare.runs import compare_runs
    from workbench.compare.short import short_tables
    from workbench.compare.sweeps import compare_sweeps
    from workbench.compare.texts import HEADINGS
    from workbench.compare.view import view_runs, view_sweeps
    from workbench.report.page import write_page
    from workbench.tracking.run_lookup import find_runs
    from workbench.tracking.store import open_store

    client = open_store()
    first, second = find_runs(client, a), find_runs(client, b)
    if first.is_sweep != second.is_sweep:
        raise ExperimentError(f"{first.title} and {second.title}: compare two runs or two sweeps, not one of each.")
    options = {"metrics": metric or None, "without_times": without_times}
    if first.is_sweep:
        sweeps = compare_sweeps(first, second, **options)  # type: ignore[arg-type]
        content, view = sweeps.to_dict(), view_sweeps(sweeps)
    else:
        runs = compare_runs(first.runs[0], second.runs[0], **options)  # type: ignore[arg-type]
        content, view = runs.to_dict(), view_runs(runs)
    if out is not None:
        write_page(out, view.page())
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    console = Console(highlight=False)
    console.print(Text(f"A: {view.a}\nB: {view.b}"))
    for title, differences in (("Parameters that differ", view.parameters), ("What else differs", view.others)):
        if differences:
            console.print(_differences(title, differences))
    narrow = console.width < NARROW
    # Who asks for metrics by name sees them, equal or not.
    whole = show_all or bool(metric)
    for title, rows in view.tables if whole else ():
        console.print(_changes(title, HEADINGS, rows, narrow))
    for short in () if whole else short_tables(view.tables):
        if short.rows:
            console.print(_changes(short.title, short.headings, short.rows, narrow))
        else:
            console.print(Text(short.title, style="italic"))
        for remark in short.remarks:
            console.print(Text(remark))
    remarks = [*view.remarks, *([] if whole else ["--all shows every row and column."])]
    console.print(Text("\n".join(remarks), style="dim"))
    if out is not None:
        console.print(f"Page: [bold]{escape(str(out))}[/]", soft_wrap=True)


def _table(title: str) -> Table:
    # Without lines between columns: 80 columns hold most rows on one line.
    return Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False
    )


def _differences(title: str, found: list[tuple[Difference, int]]) -> Table:
    table = _table(title)
    counted = any(count for _, count in found)
    doubtful = ["doubtful"] if any(item.doubt for item, _ in found) else []
    for heading in ("what", "A", "B", *(["pairs"] if counted else []), *doubtful):
        table.add_column(heading, overflow="fold")
    for item, count in found:
        row = [item.what, item.a, item.b, *([str(count)] if counted else [])]
        table.add_row(*map(Text, row), *([Text(item.doubt, style="yellow")] if doubtful else []))
    return table


def _changes(title: str, headings: tuple[str, ...], rows: list[ChangeRow], narrow: bool) -> Table:
    table = _table(title)
    varied = any(row.variant for row in rows)
    if varied:
        table.add_column("variant", overflow="fold")
    with_intervals = {heading for heading in headings if "[95%]" in heading}
    for heading in headings:
        # The one interval is not broken; words give way.
        whole = narrow and with_intervals == {heading}
        table.add_column(heading, justify="left" if heading in WORDS else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        cells = [Text(cell.replace(" [", "\n[") if narrow else cell) for cell in row.cells]
        cells[-1].stylize(TONES[row.tone])
        table.add_row(*([Text(row.variant)] if varied else []), *cells)
    return table
