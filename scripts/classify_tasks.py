"""Measure the classifier of task types on prompts whose type is known."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from workbench.cli import run_script
from workbench.workloads.classification import evaluate_classifier, rates


def classify(
    split: Annotated[Literal["test", "train", "profile"], typer.Option(help="Of the prompts.")] = "test",
    source: Annotated[Literal["embedded", "hub"], typer.Option(help="Where prompts come from.")] = "embedded",
) -> None:
    """Measure how often the classifier is right, wrong or undecided, with and without the templates' words."""
    for reading, confusion in evaluate_classifier(split, source).items():
        found = rates(confusion)
        table = Table(title=f"{reading}: {split} split, given type")
        for heading in ("task", *confusion.columns, "right", "wrong", "unknown"):
            table.add_column(str(heading), justify="left" if heading == "task" else "right")
        for task, row in found.iterrows():
            shares = (f"{row[name]:.1%}" for name in ("right", "wrong", "unknown"))
            table.add_row(str(task), *(str(count) for count in confusion.loc[task]), *shares)
        Console().print(table)


if __name__ == "__main__":
    run_script(classify)
