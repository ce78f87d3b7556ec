"""The ``emoe`` command: what a user types, and how errors reach them.

Commands live in `workbench.commands`, a file for each group. They import what they need when they are called, so that
``emoe --help`` answers at once. Errors that a user can mend are one line on stderr and exit code 2, a traceback only
with ``--debug``; an interrupt is exit code 130. No work is done here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from emoe_core.errors import EmoeError
from workbench.commands import (
    bench,
    cache,
    claims,
    compare,
    data,
    doctor,
    experiments,
    model,
    predictor,
    results,
    run,
    serve,
    simulate,
    verify,
)
from workbench.commands.groups import HELP_OPTIONS, command_group, flowing

DEBUG_OPTION = "--debug"
USER_ERROR_EXIT_CODE = 2

app = command_group("Run Mixture-of-Experts models under a memory budget, and measure what that costs.")


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


COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "A model under a memory budget": (run.run, run.estimate, serve.serve, doctor.doctor),
    "Measure and compare": (
        bench.bench,
        experiments.sweep,
        experiments.report,
        compare.compare,
        verify.verify,
        claims.reproduce,
        experiments.ui,
    ),
}
GROUPS = {
    "model": model.app,
    "predictor": predictor.app,
    "simulate": simulate.app,
    "data": data.app,
    "results": results.app,
    "cache": cache.app,
}
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel, help=flowing(command.__doc__))(command)
for name, group in GROUPS.items():
    app.add_typer(group, name=name, rich_help_panel="What is measured, and with what")


def main() -> None:
    """Run the command line."""
    execute(app, sys.argv[1:], "emoe")


def run_script(function: Callable[..., None]) -> NoReturn:
    """Run a function as a command of its own, with the errors of this one; for the programs in ``scripts``."""
    program = typer.Typer(add_completion=False, context_settings=HELP_OPTIONS)
    program.command()(function)
    execute(program, sys.argv[1:], Path(sys.argv[0]).name)


def execute(program: typer.Typer, arguments: Sequence[str], name: str) -> NoReturn:
    """Run a program of commands, turn what users can mend into a line, and end this process."""
    debug = DEBUG_OPTION in arguments
    # Accepted before and after the command's name.
    given = [argument for argument in arguments if argument != DEBUG_OPTION]
    try:
        sys.exit(program(given, prog_name=name, standalone_mode=False))
    except typer.Abort:
        Console(stderr=True).print("\nStopped.")
        sys.exit(1)
    except typer.TyperException as error:
        # A group without a command has shown its help, and has no message.
        if error.format_message():
            _refuse(_usage_message(error))
        sys.exit(error.exit_code)
    except EmoeError as error:
        if debug:
            raise
        _refuse(str(error))
    except OSError as error:
        # What a person named cannot be read or written; anything else is a mistake of ours, and shows its traceback.
        if debug or error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}. Name another file or folder, or see to its permissions.")


def _usage_message(error: typer.TyperException) -> str:
    """Return in a line what is wrong with the arguments, and where they are explained."""
    # "Value error" is pydantic's word for a choice that is none.
    said = " ".join(error.format_message().replace("Value error, ", "").split())
    context = getattr(error, "ctx", None)
    return f"{said} See `{context.command_path} --help`." if context else said


def _refuse(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {message}", style="red"))
    sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
