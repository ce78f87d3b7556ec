"""``emoe costs`` and ``emoe simulate-serving``: what serving costs, and what a service would be like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from workbench.commands.checkpoints import ModelArgument

if TYPE_CHECKING:
    import pandas as pd

TIMES = {
    "TTFT\nmean": "ttft_mean_s",
    "TTFT\nP90": "ttft_p90_s",
    "TPOT\nmean": "tpot_mean_s",
    "latency\nmean": "latency_mean_s",
    "latency\nP99": "latency_p99_s",
}


def costs(
    model: ModelArgument = "reference",
    budget: Annotated[str, typer.Option(help="Expert memory to serve under.")] = "60%",
    prompt_tokens: Annotated[str, typer.Option(help="Prompt lengths to time.")] = "16,64,128,256",
    batches: Annotated[str, typer.Option(help="Batch sizes to time.")] = "1,2,3,4,6,8",
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement.")] = 5,
    prompts: Annotated[int, typer.Option(help="Prompts of each task, for lengths and expert shares.")] = 8,
    source: Annotated[str, typer.Option(help="Prompts: 'embedded', 'fixture' or 'hub'.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="'auto' is the checkpoint's own.")] = "auto",
    device: Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompts and swaps.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write; beside the profile when not given.")] = None,
) -> None:
    """Measure what serving costs: prompts, decode steps by batch size, loading experts (alone on the machine)."""
    from workbench.machine.busy import busy_warning
    from workbench.metrics.show import show_seconds
    from workbench.progress import stage_bars
    from workbench.serving.costs.measure import CostsConfig, costs_path, measure_costs

    config = CostsConfig(
        model,
        budget,
        _numbers(prompt_tokens),
        _numbers(batches),
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
    for batch, seconds in zip(found.decode_batches, found.decode_step_s, strict=True):
        table.add_row(f"step of {batch}", show_seconds(seconds))
    table.add_row("loading an expert", show_seconds(found.expert_load_s))
    table.add_row("a swap beside that", show_seconds(found.swap_s))
    table.add_row("a prediction", show_seconds(found.prediction_s))
    console = Console()
    console.print(table)
    if warning := busy_warning(found.environment["others_cpu_share"]):
        console.print(f"[yellow]{warning}[/]")
    console.print(f"Costs: [bold]{escape(str(found.save(out or costs_path(found.model_hash))))}[/]", soft_wrap=True)


def simulate_serving(
    model: ModelArgument = "reference",
    costs_file: Annotated[
        Path | None, typer.Option("--costs", help="Costs to use; the model's when not given.")
    ] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="Variant; may be given several times.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Rate, as a share of capacity; several times.")] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma, azure, azure_conv, azure_code, mooncake, or a trace's path.")
    ] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Variation of the gaps, for gamma.")] = 3.0,
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 500,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once, at most.")] = 8,
    kv_tokens: Annotated[int, typer.Option(help="Tokens of KV cache of a replica.")] = 16384,
    max_input_tokens: Annotated[int, typer.Option(help="Longer prompts of a trace are cut.")] = 1024,
    max_output_tokens: Annotated[int, typer.Option(help="Longer answers are cut.")] = 256,
    slots: Annotated[int | None, typer.Option(help="Experts a layer; as measured when not given.")] = None,
    interval: Annotated[int, typer.Option(help="Predict before every p-th admitted request.")] = 40,
    replan: Annotated[str, typer.Option(help="'admission' or 'interval'.")] = "admission",
    replicas: Annotated[int, typer.Option(help="Engines behind the router.")] = 1,
    router: Annotated[str, typer.Option(help="round_robin, least_loaded or affinity.")] = "round_robin",
    traces: Annotated[Path | None, typer.Option(help="Folder of the request traces; in the cache by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, tasks and lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Simulate a service under several schedulers and rates, by measured costs."""
    from emoe_core.scheduler.costs import ServingCosts
    from workbench.models.names import resolve_model
    from workbench.progress import stage_bars
    from workbench.serving.costs.measure import stored_costs
    from workbench.serving.simulation.comparison import compare_schedulers, variant
    from workbench.serving.simulation.experiment import ServingConfig

    names = scheduler or ["fcfs", "edf", "emoe", "emoe_oracle"]
    base = ServingConfig(
        arrivals=arrivals,
        burstiness=burstiness,
        n_requests=requests,
        max_batch=max_batch,
        kv_tokens=kv_tokens,
        max_input_tokens=max_input_tokens,
        max_output_tokens=max_output_tokens,
        slots=slots,
        interval=interval,
        replan=replan,
        replicas=replicas,
        router=router,
        trace_folder=None if traces is None else str(traces),
        seed=seed,
    )
    for name in names:
        variant(base, name)
    known = stored_costs(resolve_model(model)) if costs_file is None else ServingCosts.load(costs_file)
    with stage_bars() as progress:
        found, _ = compare_schedulers(base, known, names, load or [0.3, 0.6, 0.9], progress)
    if as_json:
        typer.echo(json.dumps(json.loads(found.to_json(orient="records")), indent=1))
        return
    from workbench.paper.scheduling import caveat

    place = f"{replicas} replicas, {router}" if replicas > 1 else "one engine"
    console = Console()
    console.print()
    console.print(f"{requests} requests, {escape(arrivals)}, {place}, batch {max_batch}, seed {seed}")
    table = _service_table(found)
    # A number that is cut would be another number: a narrow terminal wraps the lines.
    needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    Console(width=max(console.width, needed)).print(table)
    console.print(
        "[dim]load: share of what full batches could serve. TTFT: time to the first token. TPOT: time per further "
        "token. latency: until the last token. P90, P99: nine in ten requests, 99 in 100, took no longer. met: TTFT "
        "within 5x and TPOT within 2x of a task's unloaded median. goodput: requests a second that met both. Times are "
        "simulated; --json has every metric.[/]"
    )
    console.print(f"[dim]{escape(caveat(known, slots))}[/]")


def _service_table(found: pd.DataFrame) -> Table:
    from workbench.metrics.show import column_texts

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("scheduler")
    columns = [("load", [f"{value:.2f}" for value in found["load"]])]
    for heading, metric in TIMES.items():
        unit, texts = column_texts(metric, found[metric].tolist())
        columns.append((f"{heading}\n({unit})", texts))
    columns += [
        ("met", [f"{value:.0%}" for value in found["attainment_share"]]),
        ("goodput\n(1/s)", [f"{value:.3g}" for value in found["goodput_per_s"]]),
        ("swaps", [f"{value:.0f}" for value in found["swaps"]]),
    ]
    for heading, _ in columns:
        table.add_column(heading, justify="right", vertical="bottom")
    for row in zip(found["label"], *(texts for _, texts in columns), strict=True):
        table.add_row(*row)
    return table


def _numbers(text: str) -> tuple[int, ...]:
    from emoe_core.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{text!r} is no list of whole numbers, such as 1,2,4,8") from None
