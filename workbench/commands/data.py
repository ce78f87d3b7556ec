"""``emoe data``: the prompts that experiments run on."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from workbench.commands.groups import command_group

app = command_group("Prompts of six task types.")

# The fixture lies in the repository and needs no preparing.
Source = Annotated[Literal["embedded", "hub"], typer.Option(help="Prompts: of packages, or data sets of the hub.")]


@app.command("prepare")
def prepare_data(
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this task; repeatable.")] = None,
    force: Annotated[bool, typer.Option(help="Prepare again what is there.")] = False,
    source: Source = "embedded",
) -> None:
    """Fetch and prepare the prompts, and the model that compares answers (once; checksums are verified)."""
    from emoe_core.planning.tasks import TASK_TYPES
    from workbench import workloads
    from workbench.quality import similarity
    from workbench.workloads.embedded import LANGUAGES

    everything = (*TASK_TYPES, *LANGUAGES) if source == "embedded" else TASK_TYPES
    ready = workloads.prepare(tasks or everything, force=force, source=source)
    if source == "embedded":
        similarity.prepare()
    counts = ", ".join(f"{task} {sum(len(split) for split in splits.values())}" for task, splits in ready.items())
    Console().print(f"Prompts: {counts}.")


@app.command("describe")
def describe_data(source: Source = "embedded") -> None:
    """Show how many prompts there are and how long they are."""
    from workbench import workloads

    Console().print(workloads.summary_tables(source=source))
