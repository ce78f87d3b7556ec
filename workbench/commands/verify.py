"""``emoe verify``: make a recorded run again, and say what came out the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from workbench.commands.options import AsJson

if TYPE_CHECKING:
    from workbench.compare.verify.judge import Judgement
    from workbench.compare.verify.verification import Verification

STYLES = {"differs": "red", "missing": "red", "bit-equal": "green", "within tolerance": "green"}
SHOWN_FAILURES = 10


def verify(
    run: Annotated[str, typer.Argument(help="Run id or the start of it, or its name.", metavar="RUN")],
    source: Annotated[
        Literal["recorded", "current"],
        typer.Option(help="The notebook as it was executed, or as it is in the working tree."),
    ] = "recorded",
    notebook: Annotated[
        Path | None, typer.Option(help="Take this notebook: for runs made by hand, which kept none.")
    ] = None,
    relative: Annotated[float, typer.Option(help="Relative tolerance of computed values.")] = 1e-4,
    absolute: Annotated[float, typer.Option(help="Absolute tolerance of computed values.")] = 1e-6,
    memory: Annotated[float, typer.Option(help="Relative tolerance of memory that was measured.")] = 0.05,
    times: Annotated[float | None, typer.Option(help="Also judge times, by this relative tolerance.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Run even if model or data are not as recorded.")] = False,
    as_json: AsJson = False,
) -> None:
    """Execute a recorded run again from its own artifacts and compare it, metric by metric and table by table.

    First says what of machine, libraries, model and data is not as recorded; runs on the recorded number of threads.
    Outputs of the all-resident model come from the cache if they are there. Exit code 1 when something is not
    reproduced, 2 when the run cannot be executed.
    """
    from emoe_core.errors import OptionError
    from workbench.compare.verify.judge import Tolerances
    from workbench.compare.verify.plan import plan_rerun
    from workbench.compare.verify.verification import verify_run
    from workbench.metrics.show import show_count, show_seconds
    from workbench.tracking.run_lookup import find_run
    from workbench.tracking.store import open_store

    for name, value in (("relative", relative), ("absolute", absolute), ("memory", memory), ("times", times)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise OptionError(f"--{name} {value}: a tolerance is 0 or more.")
    client = open_store()
    recorded = find_run(client, run)
    plan = plan_rerun(recorded, source=source, notebook=notebook)
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    screen.print(Text(f"{recorded.describe()}\nexecuting {plan.origin}"))
    threads = "" if plan.threads is None else f", {show_count(plan.threads, 'thread')} as recorded"
    screen.print(Text(f"with {show_count(len(plan.parameters), 'parameter')} as recorded{threads}"))
    for remark in plan.remarks:
        screen.print(Text(remark, style="yellow"))
    took_ms = (client.get_run(recorded.run_id).info.end_time or recorded.started_ms) - recorded.started_ms
    with Progress(
        SpinnerColumn(),
        TextColumn(f"running the notebook (recorded: {show_seconds(took_ms / 1000)})"),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as bar:
        bar.add_task("")
        found = verify_run(
            client,
            recorded,
            plan,
            tolerances=Tolerances(relative, absolute, memory, times),
            anyway=anyway,
            tell=lambda text: screen.print(Text(text, style="yellow" if text.startswith("differs") else "")),
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found)
    raise typer.Exit(1 if found.failures else 0)


def _show(found: Verification) -> None:
    from workbench.metrics.show import show

    console = Console(highlight=False)
    if found.metrics:
        table = Table(title="Metrics", title_justify="left")
        for heading in ("metric", "recorded", "now", "off by", "result"):
            table.add_column(heading, justify="left" if heading in ("metric", "result") else "right")
        for item in found.metrics:
            values = [show(item.name, value) for value in (item.recorded, item.found)]
            table.add_row(Text(item.name), *values, _off(item), Text(item.status, style=STYLES.get(item.status, "")))
        console.print(table)
    if found.tables:
        table = Table(title="Columns of tables", title_justify="left")
        for heading in ("column", "values", "not bit-equal", "off by", "result"):
            table.add_column(heading, justify="left" if heading in ("column", "result") else "right")
        for item in found.tables:
            status = Text(item.status, style=STYLES.get(item.status, ""))
            table.add_row(Text(item.name), str(item.cells), str(item.unequal), _off(item), status)
        console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in found.counts().items())
    console.print(Text(counts, style="dim"))
    for failure in found.failures[:SHOWN_FAILURES]:
        console.print(Text(f"not reproduced: {failure}", style="red"))
    if len(found.failures) > SHOWN_FAILURES:
        console.print(f"[red]and {len(found.failures) - SHOWN_FAILURES} more.[/]")
    if not found.failures:
        console.print("[green]Reproduced.[/] Times are shown, not judged, unless --times says so.")
    console.print(Text(f"Recorded as run {found.again.run_id}, experiment verify.", style="dim"))


def _off(item: Judgement) -> str:
    if math.isnan(item.relative):
        return "–"
    return "0" if item.relative == 0 else f"{item.relative:.2g}" if math.isfinite(item.relative) else "from 0"
