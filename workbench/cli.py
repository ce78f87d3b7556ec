"""The ``emoe`` command: what a user types, and how errors reach them.

Commands live in `workbench.commands`, a file for each group. They import what they need when they are called, so that
``emoe --help`` answers at once. Errors that a user can mend are one message on stderr and exit code 2, a traceback only
with ``--debug``; an interrupt is exit code 130. No work is done here.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from emoe_core.errors import EmoeError
from workbench.commands import (
    bench,
    checkpoints,
    compare,
    doctor,
    experiments,
    families,
    material,
    predictors,
    serve,
    serve_cluster,
    serving,
    simulate,
    soak,
    synthetic,
    tracking,
    verify,
)

DEBUG_OPTION = "--debug"
USER_ERROR_EXIT_CODE = 2

app = typer.Typer(
    name="emoe",
    help="Run Mixture-of-Experts models under a memory budget, and measure what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("emoe-workbench"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG_OPTION, help="Show the traceback of an error.")] = False,
) -> None:
    """Accept options that hold for every command; `main` reads them itself."""


app.command("run")(checkpoints.run)
app.command("pack")(checkpoints.pack)
app.command("estimate")(checkpoints.estimate)
app.command("cache")(checkpoints.cache)
app.command("doctor")(doctor.doctor)
app.command("models")(families.models)
material.model_app.command("synth")(synthetic.synth)
app.add_typer(material.model_app, name="model")
app.add_typer(material.data_app, name="data")
app.command("profile")(material.profile)
app.add_typer(predictors.predictor_app, name="predictor")
app.command("simulate")(simulate.simulate)
app.command("serve")(serve.serve)
app.command("serve-cluster")(serve_cluster.serve_cluster)
app.command("costs")(serving.costs)
app.command("simulate-serving")(serving.simulate_serving)
app.command("soak")(soak.soak)
app.command("bench")(bench.bench)
app.command("bench-systems")(bench.bench_systems)
app.command("sweep")(experiments.sweep)
app.command("report")(experiments.report)
app.command("compare")(compare.compare)
app.command("verify")(verify.verify)
app.command("ui")(tracking.ui)
app.command("tracking-server")(tracking.tracking_server)


def main() -> None:
    """Run the command line and turn `EmoeError` into a message."""
    debug = DEBUG_OPTION in sys.argv
    # Accepted before and after the command's name.
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG_OPTION]
    try:
        app(arguments, prog_name="emoe")
    except EmoeError as error:
        if debug:
            raise
        _refuse(str(error))
    except OSError as error:
        # What a person named cannot be read or written; anything else is a mistake of ours, and shows its traceback.
        if debug or error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}. Name another file or folder, or see to its permissions.")


def _refuse(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {message}", style="red"))
    sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
