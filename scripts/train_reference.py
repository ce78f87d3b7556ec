"""Compute the recipe of a model that comes along anew; `emoe model build` applies it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from workbench.cli import run_script
from workbench.models.reference import EMBEDDED


def train(
    out: Annotated[Path, typer.Option(help="Folder for the recipe.")],
    model: Annotated[Literal["reference", "carved", "native"], typer.Argument(help="Which model.")] = "reference",
    seed: Annotated[int, typer.Option(help="Seed of the recipe.")] = 0,
) -> None:
    """Compute a recipe anew (reference and native: two hours, carved: ten minutes; goes on where it stopped)."""
    training = importlib.import_module(f"recipes.{EMBEDDED[model]}_training")
    recipe = training.train(out, seed)
    Console().print(f"Recipe: [bold]{escape(str(recipe))}[/]", soft_wrap=True)


if __name__ == "__main__":
    run_script(train)
