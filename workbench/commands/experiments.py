"""``emoe sweep``, ``report`` and ``ui``: measure over notebooks, and read the result."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.options import RayAddress

if TYPE_CHECKING:
    from workbench.sweep.run import SweepResult
    from workbench.sweep.schema import Scalar


def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file, for example sweeps/quick.yaml.")],
    fresh: Annotated[bool, typer.Option(help="Do finished runs again, under a new parent run.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs at once in stages of kind quality; as many as cores, memory and GPUs hold if not given."
        ),
    ] = None,
    executor: Annotated[Literal["local", "ray"], typer.Option(help="Where runs are carried out.")] = "local",
    ray_address: RayAddress = None,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Go on with a sweep whose machine is gone though the server says it runs."),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE in place of what the file fixes, for example model=PATH; repeatable."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Only the stages with this label.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and the estimate; run nothing.")] = False,
) -> None:
    """Run notebooks over a grid of parameters, resuming where an earlier call stopped."""
    console = Console(stderr=True)
    given = _given(settings or [])
    if dry_run:
        _show_plan(file, given, stage)
        return
    from workbench.sweep.executors.choice import executor_maker
    from workbench.sweep.run import run_sweep
    from workbench.tracking.place import ui_command
    from workbench.tracking.store import open_store

    place = executor_maker(executor, ray_address)
    options = {"given": given, "stage": stage, "fresh": fresh, "jobs": jobs, "take_over": take_over}
    result = run_sweep(file, **options, console=console, executor=place)  # type: ignore[arg-type]
    console.print(_summary(result))
    experiment = open_store().get_run(result.parent_run_id).info.experiment_id
    console.print(f"Look at the runs: [bold]{escape(ui_command())}[/]\nthen {_view(experiment)}", soft_wrap=True)
    raise typer.Exit(result.exit_code)


def report(
    out: Annotated[Path, typer.Option(help="Folder to write; a report that is there is replaced.")] = Path(
        "reports/report"
    ),
    sweep: Annotated[list[str] | None, typer.Option(help="Only this sweep; repeatable.")] = None,
    hints: Annotated[bool, typer.Option("--hints", help="Also say how to open the notebooks and the runs.")] = False,
) -> None:
    """Write a static site from the newest run of every sweep, and of every notebook that was run by hand.

    It opens from the disk, without a server: fronts of memory, quality and time with their bounds, the paper's figures
    beside ours, who was resident in which layer, where every run comes from, and all data as files.
    """
    from workbench.report import write_report
    from workbench.tracking.place import project_root, ui_command

    with Console(stderr=True).status("Reading the store ...") as status:
        tell = lambda line: status.update(escape(line))  # noqa: E731
        path = write_report(out if out.is_absolute() else project_root() / out, sweeps=sweep or None, tell=tell)
    console = Console(soft_wrap=True)
    console.print(f"Report:      [bold]{escape(str(path))}[/]")
    if hints:
        console.print("Notebooks:   [bold]make lab[/]  (.venv/bin/jupyter lab notebooks)")
        console.print(f"MLflow runs: [bold]make ui[/]   ({escape(ui_command())})")
        for name, experiment in _sweeps(sweep):
            console.print(f"             {escape(name)}: {_view(experiment)}")


def ui(port: Annotated[int, typer.Option(help="Port to listen on, at loopback.")] = 5000) -> None:
    """Show the runs in MLflow's pages until interrupted.

    A store that MLflow cannot use is refused in a line, and one that was moved is set right before.
    """
    from emoe_core.errors import OptionError
    from workbench.tracking.place import server_uri, store_uri
    from workbench.tracking.store import open_store

    if not 0 < port <= 65535:
        raise OptionError(f"--port {port}: give 1 to 65535")
    if server := server_uri():
        raise OptionError(f"the runs are on a server, which shows them itself: open {server}")
    open_store()
    # Job execution starts a dozen idle worker processes that a local store has no use for.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri(), "--port", str(port)]
    os.execve(sys.executable, command, environment)


def _sweeps(names: list[str] | None) -> list[tuple[str, str]]:
    """Return (name, id of the experiment) of these sweeps, or of all, newest first."""
    from workbench.tracking.runs import SWEEP_TAG, parents
    from workbench.tracking.store import open_store

    found = [(item.data.tags[SWEEP_TAG], item.info.experiment_id) for item in parents(open_store())]
    return [(name, experiment) for name, experiment in found if not names or name in names]


def _view(experiment: str) -> str:
    """Return the address in the MLflow interface where a sweep's runs are arranged for comparison."""
    from workbench.tracking.place import server_uri
    from workbench.tracking.view import view_address

    server = server_uri()
    return view_address(experiment, server) if server else view_address(experiment)


def _summary(result: SweepResult) -> str:
    parts = [f"{len(result.finished)} finished"]
    if result.skipped:
        parts.append(f"{len(result.skipped)} were finished before")
    if result.failed:
        parts.append(f"[red]{len(result.failed)} failed[/]; the same command tries them again")
    return ", ".join(parts) + "."


def _given(settings: list[str]) -> dict[str, Scalar]:
    from emoe_core.errors import OptionError
    from workbench.sweep.yaml_file import unquoted

    found: dict[str, Scalar] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise OptionError(f"--set {text}: give NAME=VALUE, for example --set model=path/to/model")
        # Notebooks run in a folder of their own, so a path has to be whole.
        path = Path(value).expanduser()
        found[name] = str(path.resolve()) if name == "model" and path.exists() else unquoted(value)
    return found


def _show_plan(file: Path, given: dict[str, Scalar], stage: str | None) -> None:
    """Print the runs of a sweep with their state, and how long the rest may take."""
    from workbench.metrics.show import show_seconds
    from workbench.sweep.plan import describe_plan

    preview = describe_plan(file, given, stage)
    runs = preview.runs
    table = Table(title=f"Sweep {preview.file.name}", caption=escape(preview.file.description) or None)
    for heading in ("run", "kind", "state", "expected"):
        table.add_column(heading, justify="right" if heading == "expected" else "left")
    for run in runs:
        expected = show_seconds(run.expected_s) if run.expected_s else "unknown"
        table.add_row(escape(run.label), run.kind, "finished" if run.finished else "to do", expected)
    console = Console()
    console.print(table)
    left = [run.expected_s for run in runs if not run.finished]
    known = [seconds for seconds in left if seconds]
    more = "" if len(known) == len(left) else f", not counting {len(left) - len(known)} of unknown duration"
    about = f"about {show_seconds(sum(known))} one after another{more}" if known or not left else "of unknown duration"
    console.print(f"{len(left)} of {len(runs)} runs to do, {about}.")
    for warning in preview.warnings:
        console.print(f"[yellow]{escape(warning)}[/]")
