"""``emoe results``: recorded runs that ship, out of the store and into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.claims import render
from workbench.commands.groups import command_group, flowing
from workbench.metrics.show import show, show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from workbench.tracking.recorded import RecordedRun

app = command_group("Recorded results: those that ship with the project, and your own to pass on.")
Folder = Annotated[Path | None, typer.Option("--folder", help="Where results lie, if not in the project's `results`.")]


@app.command("export")
def export(
    sweeps: Annotated[list[str], typer.Argument(help="Names of sweeps in the store.", metavar="SWEEP...")],
    folder: Folder = None,
) -> None:
    """Write the finished runs of sweeps to Parquet files: runs with all that is known of them, and their tables' rows.

    Equal runs give equal files, whoever writes them.
    """
    from workbench.results.export import export_sweep
    from workbench.tracking.results_file import RESULTS
    from workbench.tracking.store import open_store

    client, console = open_store(), Console(soft_wrap=True, highlight=False)
    for sweep in sweeps:
        with Console(stderr=True).status(f"Reading the runs of {escape(sweep)} ..."):
            found, files = export_sweep(client, sweep, folder or RESULTS)
        size = show_bytes(sum(file.stat().st_size for file in files))
        console.print(f"{show_count(len(found.runs), 'run')} of {escape(sweep)}, {size}: {escape(str(files[0]))}")


@app.command("import")
def take(
    path: Annotated[
        Path | None, typer.Argument(help="Folder of results, or of runs that `make gpu` recorded.", metavar="[FOLDER]")
    ] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="Only this sweep; repeatable.")] = None,
    join: Annotated[
        bool, typer.Option("--join", help="As runs of the sweep itself, which then has no need to make them.")
    ] = False,
) -> None:
    """Take recorded runs into the store, where report, compare and verify take them like others.

    Results that ship become sweeps NAME-recorded, beside your own runs of NAME. What `make gpu` recorded joins its
    sweep. A run is taken once.
    """
    from workbench.results.taking import take_results
    from workbench.tracking.results_file import RESULTS
    from workbench.tracking.store import open_store

    folder = path or RESULTS
    with Console(stderr=True).status(f"Reading {escape(str(folder))} ..."):
        taken = take_results(open_store(), folder, sweep or (), join=join)
    console = Console(soft_wrap=True, highlight=False)
    for each in taken:
        before = f", {each.known} were here before" if each.known else ""
        console.print(f"{escape(each.sweep)}: {show_count(each.new, 'run')} taken{before}.")


@app.command("show")
def look(
    sweep: Annotated[str | None, typer.Argument(help="One of the recorded sweeps; all of them if not given.")] = None,
    folder: Folder = None,
) -> None:
    """List what is recorded: sweeps with machine, commit and duration, or the runs of one with their main metrics."""
    from workbench.tracking.results_file import RESULTS, read_results, recorded_sweeps

    place, console = folder or RESULTS, Console(soft_wrap=False, highlight=False)
    if sweep is not None:
        console.print(_runs(read_results(sweep, place).runs))
        return
    table = Table(title=f"Results in {escape(str(place))}")
    for heading in ("sweep", "runs", "commit", "machine", "took", "size"):
        table.add_column(heading, justify="right" if heading in ("runs", "took", "size") else "left")
    for name in recorded_sweeps(place):
        found = read_results(name, place)
        size = sum(file.stat().st_size for file in place.glob(f"{name}.*.parquet"))
        took = show_seconds(sum(run.duration_s for run in found.runs))
        commits = {str(run.environment.get("commit") or "unknown")[:10] for run in found.runs}
        machines = {str(run.environment.get("cpu") or "unknown") for run in found.runs}
        rows = (
            name,
            str(len(found.runs)),
            ", ".join(sorted(commits)),
            ", ".join(sorted(machines)),
            took,
            show_bytes(size),
        )
        table.add_row(*(escape(cell) for cell in rows))
    console.print(table)


app.command("render", help=flowing(render.__doc__))(render)


def _runs(runs: Sequence[RecordedRun]) -> Table:
    from workbench.tracking.runs import METRICS_TAG

    named = dict.fromkeys(name for run in runs for name in run.tags.get(METRICS_TAG, "").split(",") if name)
    metrics = [name for name in named if any(name in run.metrics for run in runs)]
    table = Table()
    for heading in ("run", "id", *metrics):
        table.add_column(heading, justify="left" if heading in ("run", "id") else "right")
    for run in runs:
        cells = [show(name, run.metrics.get(name)) for name in metrics]
        table.add_row(escape(run.name), run.run_id[:8], *cells)
    return table
