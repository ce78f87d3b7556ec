"""``emoe soak``: hours of arrivals, compressed, against a real server process."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from emoe_core.errors import OptionError
from workbench.commands.checkpoints import ModelArgument
from workbench.extras import require_extra


def soak(
    model: ModelArgument = "tiny",
    budget: Annotated[str, typer.Option(help="Expert memory to serve under.")] = "60%",
    hours: Annotated[float, typer.Option(help="Length of the arrivals.")] = 1.0,
    minutes: Annotated[float, typer.Option(help="Time that they are sent in.")] = 10.0,
    rate: Annotated[float, typer.Option(help="Arrivals in a second of these hours.")] = 0.5,
    distinct: Annotated[int, typer.Option(help="Different requests, sent in turn; every second one is sampled.")] = 48,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once.")] = 4,
    max_output_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and requests.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Send hours of requests in minutes to a real server: nobody lost, memory flat, answers as offline generation."""
    require_extra("serve", "a soak", "fastapi", "uvicorn", "prometheus_client", "httpx", "scipy")
    if not (hours > 0 and minutes > 0):
        raise OptionError("hours and minutes must be more than 0")
    import emoe_core
    from workbench.models.names import resolve_model
    from workbench.progress import stage_bars
    from workbench.serving.checks.soak import SoakConfig, memory_slope, questions
    from workbench.serving.checks.soak import soak as run_soak
    from workbench.serving.checks.soak_check import judge

    config = SoakConfig(
        str(resolve_model(model)),
        budget,
        simulated_s=3600 * hours,
        compression=60 * hours / minutes,
        rate_per_s=rate,
        distinct=distinct,
        max_batch=max_batch,
        max_output_tokens=max_output_tokens,
        seed=seed,
    )
    with emoe_core.load(config.model, budget=config.budget) as engine, stage_bars() as progress:
        asked = questions(engine.model.config.get_text_config().vocab_size, config)
        found = run_soak(config, asked, progress)
        verdicts = judge(engine, asked, found.replies)
    slope, half = memory_slope(found.memory)
    figures = {
        "sent": found.sent,
        "lost": found.lost,
        "doubled": found.doubled,
        "failed": found.failed,
        "finished_by_server": found.finished_by_server,
        **verdicts,
        "memory_slope_bytes_per_min": 60 * slope,
        "memory_slope_half_interval_bytes_per_min": 60 * half,
        "memory_bytes": found.memory[-1][1],
        "seconds": found.memory[-1][0],
    }
    broken = found.lost or found.doubled or found.failed or verdicts["wrong"] or found.finished_by_server != found.sent
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        raise typer.Exit(1 if broken else 0)
    table = Table(title=f"{found.sent} requests in {figures['seconds']:.0f} s", show_header=False)
    table.add_row("lost, answered twice, failed", f"{found.lost}, {found.doubled}, {found.failed}")
    table.add_row("finished, by the server's count", str(found.finished_by_server))
    table.add_row("equal to offline generation", str(verdicts["equal"]))
    table.add_row("parted from it at a close call", str(verdicts["near"]))
    table.add_row("wrong", str(verdicts["wrong"]))
    table.add_row("memory at the end", f"{found.memory[-1][1] / 1e6:.1f} MB")
    table.add_row("its slope, 95% interval", f"{60 * slope / 1e3:+.1f} ± {60 * half / 1e3:.1f} kB a minute")
    Console().print(table)
    raise typer.Exit(1 if broken else 0)
