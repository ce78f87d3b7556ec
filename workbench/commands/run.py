"""``emoe run`` and ``emoe estimate``: a checkpoint under a memory budget."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emoe_core.errors import OptionError
from workbench.commands.engine import memory_options, open_engine
from workbench.commands.options import (
    Budget,
    Device,
    Dtype,
    ExpertDtype,
    MaxQualityLoss,
    Model,
    OnMiss,
    TaskType,
    Tolerance,
)


def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    budget: Budget = None,
    max_quality_loss: MaxQualityLoss = None,
    tolerance: Tolerance = 0.0,
    on_miss: OnMiss = "reroute",
    task: Annotated[TaskType | None, typer.Option(help="Of the prompt; found from its words if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    expert_dtype: ExpertDtype = "auto",
) -> None:
    """Answer a prompt under a memory budget, and say what the budget did."""
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: give at least 1.")
    if not prompt.strip():
        raise OptionError("the prompt is empty: say what to ask.")
    console = Console(highlight=False)
    options: dict[str, Any] = {"tolerance": tolerance, "on_miss": on_miss}
    options |= {"device": device, "dtype": dtype, "expert_dtype": expert_dtype}
    with open_engine(model, budget, max_quality_loss, console, **options) as engine:

        def write(request: int, text: str) -> None:
            console.out(text, end="", highlight=False)

        answer = engine.generate([prompt], tasks=[task], max_new_tokens=max_new_tokens, on_token=write)[0]
        console.print()
        stats = engine.stats()
    from workbench.metrics.show import show

    counts = stats.counters
    lossy = f"{counts.reroutes} replaced by residents" if counts.reroutes else f"{counts.drops} dropped"
    exactness = f"[yellow]lossy[/]: {lossy}" if counts.reroutes or counts.drops else "none replaced"
    console.print(
        f"[dim]experts: {counts.hits} hits, {counts.loads} loads, {counts.reroutes} reroutes "
        f"({counts.hit_rate:.0%} hits); {exactness}\n"
        f"computing: {escape(stats.compute)}\n"
        f"memory: {show('slot_bytes', stats.slot_bytes)} for {show('expert_bytes', stats.expert_bytes)} of experts, "
        f"and {show('dense_bytes', stats.dense_bytes)} of dense weights\n"
        f"time: first token {show('ttft_s', answer.ttft_s)}, then {show('tpot_s', answer.tpot_s)} a token[/]"
    )


def estimate(
    model: Model,
    budget: Budget = None,
    max_quality_loss: MaxQualityLoss = None,
    max_tokens: Annotated[int, typer.Option(help="Longest sequence, prompt and answer together.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    expert_dtype: ExpertDtype = "auto",
) -> None:
    """Say what a budget buys and what memory the model needs, without loading it."""
    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.config import EngineConfig, open_device
    from emoe_core.footprint import memory_breakdown
    from emoe_core.planning.quality_target import plan_memory
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model

    index = open_checkpoint(resolve_model(model), dtype).with_expert_dtype(expert_dtype)
    wanted = EngineConfig(**memory_options(model, budget, max_quality_loss))
    plan, quality = plan_memory(index, wanted.budget, wanted.profile, wanted.max_quality_loss)
    least = plan_slots(index, "1 slot")
    console = Console()
    kind = "" if expert_dtype == "auto" else f", experts in {expert_dtype}"
    table = Table(title=f"{index.model_type}, {str(index.dtype).removeprefix('torch.')}{kind}", show_header=False)
    for term, value in [*plan.rows(), ("smallest exact budget", show_bytes(least.slot_bytes))]:
        table.add_row(term, value)
    if quality is not None:
        table.add_section()
        for term, value in quality.rows():
            table.add_row(term, value)
    table.add_section()
    for term, value in memory_breakdown(index, plan, max_tokens, batch, device=open_device(device)).rows():
        table.add_row(term, value)
    console.print(table)
    if plan.warning:
        console.print(f"[yellow]{escape(plan.warning)}[/]", soft_wrap=True)
