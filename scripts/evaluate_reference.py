"""Measure a model that comes along: what docs/models.md says of it, and its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from workbench.cli import run_script
from workbench.models.reference import EMBEDDED


def evaluate(
    model: Annotated[Literal["reference", "carved", "native"], typer.Argument(help="Which model.")] = "reference",
    path: Annotated[Path | None, typer.Option(help="Folder of the built model; the cache's if not given.")] = None,
) -> None:
    """Measure perplexity by domain beside the dense model, and how the routers choose."""
    from recipes import evaluation  # imports torch

    table = Table(title=f"Embedded model, {model}", show_header=False)
    for name, value in evaluation.evaluate(EMBEDDED[model], path).items():
        if isinstance(value, bool | int | float | str):
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    run_script(evaluate)
