"""``emoe simulate``: what each cache policy would load, and what a service would be like; nothing runs for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from workbench.commands.groups import command_group
from workbench.commands.options import AnswerTokens, AsJson, KvTokens, MaxBatch, Model, RouterName, Seed, Source
from workbench.progress import stage_bars

if TYPE_CHECKING:
    import pandas as pd

TIMES = {
    "TTFT\nmean": "ttft_mean_s",
    "TTFT\nP90": "ttft_p90_s",
    "TPOT\nmean": "tpot_mean_s",
    "latency\nmean": "latency_mean_s",
    "latency\nP99": "latency_p99_s",
}

app = command_group("Caches and services, simulated from recorded routing and measured costs.")


@app.command("cache")
def simulate_cache(
    model: Model = "reference",
    budget: Annotated[
        list[str] | None, typer.Option(help="Memory for experts; repeatable; 25%, 50% and 75% if not given.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; repeatable; all if not given.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="Order: sticky, uniform or drift; repeatable; sticky and uniform if not given."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each stream.")] = 48,
    warm_prompts: Annotated[int, typer.Option(help="Earlier prompts, whose experts 'pinned' holds.")] = 96,
    max_new_tokens: AnswerTokens = 24,
    batch_size: Annotated[int, typer.Option(help="Prompts served together.")] = 1,
    source: Source = "embedded",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Replay recorded routing, made if missing, through cache policies, between LRU and the best possible."""
    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model
    from workbench.replay.accesses import record_accesses
    from workbench.replay.cache import simulate as replay_all
    from workbench.replay.policies import POLICY_NAMES, require_policy
    from workbench.replay.recording import RecordingConfig

    # What can be refused is refused before minutes of recording.
    for name in policy or ():
        require_policy(name)
    config = RecordingConfig(
        model,
        warm_prompts=warm_prompts,
        n_prompts=prompts,
        mixes=tuple(mix or ("sticky", "uniform")),
        source=source,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    for name in config.mixes:
        config.stream(name)
    index = open_checkpoint(resolve_model(model))
    capacities = {size: plan_slots(index, size).slots_per_layer for size in budget or ("25%", "50%", "75%")}
    chosen = policy or [name for name in POLICY_NAMES if name != "pinned" or warm_prompts]
    with stage_bars() as progress:
        recorded = record_accesses(config, batch_size=batch_size, progress=progress)
        found = replay_all(
            recorded.streams,
            capacities,
            chosen,
            warm=recorded.warm,
            expert_bytes=recorded.expert_bytes,
            seed=seed,
            progress=lambda done, total: progress("replays", done, total),
        )
    if as_json:
        # Through pandas, which writes a gap that does not exist as null.
        typer.echo(json.dumps(json.loads(found.to_json(orient="records")), indent=1))
        return
    console = Console()
    for stream, rows in found.groupby("stream"):
        table = Table(title=f"{escape(model)}: {prompts} {stream} prompts, {batch_size} at a time, seed {seed}")
        for column in ("budget", "slots", "policy"):
            table.add_column(column, no_wrap=True)
        for column in ("misses", "of prompts", "hits", "loaded", "gap closed"):
            table.add_column(column, justify="right")
        for row in rows.sort_values(["slots", "loads"], ascending=[True, False]).itertuples():
            gap = "" if row.gap_closed != row.gap_closed else f"{row.gap_closed:.0%}" if row.gap_closed >= 0 else "< 0"
            table.add_row(
                row.size, f"{row.slots:.3g}", row.policy, f"{row.misses:,}", f"{row.prefill_misses:,}",
                f"{row.hit_rate:.1%}", show_bytes(row.loaded_bytes), gap,
            )  # fmt: skip
        console.print(table)
    console.print(
        "[dim]gap closed: from LRU's loads (0%) to those of Belady's MIN (hindsight, 100%); < 0 is worse than LRU.\n"
        "slots: a layer's; of prompts: misses while prompts were read. Loads count what 'pinned' holds from the\n"
        "start, misses do not. No time is simulated.[/]"
    )


@app.command("serving")
def simulate_serving(
    model: Model = "reference",
    costs_file: Annotated[Path | None, typer.Option("--costs", help="Costs to use; the model's if not given.")] = None,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Variant; repeatable; fcfs, edf, emoe and emoe_oracle if not given.")
    ] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(help="Rate, as a share of capacity; repeatable; 0.3, 0.6 and 0.9 if not given."),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma, azure, azure_conv, azure_code, mooncake, or a trace's path.")
    ] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Variation of the gaps, for gamma.")] = 3.0,
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 500,
    max_batch: MaxBatch = 8,
    kv_tokens: KvTokens = 16384,
    max_input_tokens: Annotated[int, typer.Option(help="Longer prompts of a trace are cut.")] = 1024,
    max_output_tokens: Annotated[int, typer.Option(help="Longer answers are cut.")] = 256,
    slots: Annotated[int | None, typer.Option(help="Experts a layer; as measured if not given.")] = None,
    interval: Annotated[int, typer.Option(help="Predict before every p-th admitted request.")] = 40,
    replan: Annotated[Literal["admission", "interval"], typer.Option(help="When residents are planned.")] = "admission",
    replicas: Annotated[int, typer.Option(help="Engines behind the router.")] = 1,
    router: Annotated[RouterName, typer.Option(help="Which engine gets a request.")] = "round_robin",
    traces: Annotated[
        Path | None, typer.Option(help="Folder of the request traces; in the cache if not given.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate a service under several schedulers and rates, by measured costs."""
    from emoe_core.scheduler.costs import ServingCosts
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
    known = stored_costs(model) if costs_file is None else ServingCosts.load(costs_file)
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
