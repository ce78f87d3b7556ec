"""``emoe model profile`` and ``emoe model costs``: what is measured of a model once, and kept."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.options import Device, Dtype, Model, OutFile, Seed, Source
from workbench.progress import stage_bars


def profile(
    model: Model = "reference",
    prompts: Annotated[int, typer.Option(help="Prompts of each task, for lengths and similarities.")] = 20,
    kl_prompts: Annotated[int, typer.Option(help="How many of these for the divergence of single layers.")] = 4,
    depths: Annotated[int, typer.Option(help="Numbers of disturbed leading layers to try.")] = 6,
    threshold: Annotated[float | None, typer.Option(help="Similarity below which a layer is sensitive.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answers that are compared.")] = 32,
    length_cap: Annotated[int, typer.Option(help="Tokens at most when the length of answers is measured.")] = 96,
    source: Source = "embedded",
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep the stored profile; measure what only quality targets need.")
    ] = False,
    out: OutFile = None,
) -> None:
    """Measure output lengths, and which layers' routing a task depends on (goes on where it stopped)."""
    from emoe_core.planning.tasks import DEFAULT_SIMILARITY_THRESHOLD
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
        found = extend_profile(stored_profile(model), config, progress) if extend else measure_profile(config, progress)
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


def costs(
    model: Model = "reference",
    budget: Annotated[str, typer.Option(help="Expert memory to serve under.")] = "60%",
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Prompt length to time; repeatable; 16, 64, 128 and 256 if not given.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size to time; repeatable; 1, 2, 3, 4, 6 and 8 if not given.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement.")] = 5,
    prompts: Annotated[int, typer.Option(help="Prompts of each task, for lengths and expert shares.")] = 8,
    source: Source = "embedded",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    out: OutFile = None,
) -> None:
    """Measure what serving costs: prompts, decode steps by batch size, loading experts (alone on the machine)."""
    from workbench.machine.busy import busy_warning
    from workbench.metrics.show import show_seconds
    from workbench.serving.costs.measure import CostsConfig, costs_path, measure_costs

    config = CostsConfig(
        model,
        budget,
        tuple(sorted(prompt_tokens or CostsConfig.prompt_tokens)),
        tuple(sorted(batch or CostsConfig.batches)),
        repeats=repeats,
        prompts=prompts,
        source=source,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    with stage_bars() as progress:
        found = measure_costs(config, progress)
    table = Table(title=escape(f"Serving costs of {model} at {budget}"), show_header=False)
    table.add_row("prompt", f"{show_seconds(found.prefill_fixed_s)} + {show_seconds(found.prefill_token_s)} a token")
    for size, seconds in zip(found.decode_batches, found.decode_step_s, strict=True):
        table.add_row(f"step of {size}", show_seconds(seconds))
    table.add_row("loading an expert", show_seconds(found.expert_load_s))
    table.add_row("a swap beside that", show_seconds(found.swap_s))
    table.add_row("a prediction", show_seconds(found.prediction_s))
    console = Console()
    console.print(table)
    if warning := busy_warning(found.environment["others_cpu_share"]):
        console.print(f"[yellow]{escape(warning)}[/]")
    console.print(f"Costs: [bold]{escape(str(found.save(out or costs_path(found.model_hash))))}[/]", soft_wrap=True)
