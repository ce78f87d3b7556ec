"""``emoe bench``: systems side by side under one hard memory limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from workbench.commands.options import Dtype, Model, Seed

if TYPE_CHECKING:
    import pandas as pd

    from workbench.bench.plan import BenchPlan
    from workbench.bench.runner import Step


# Headings of the table of costs, and the columns under them.
READ_RATIOS = {"amplif.": "read_amplification", "/Belady": "reads_over_belady", "/replay": "reads_over_replay"}


def show_systems(wanted: bool) -> None:
    """Print the systems that can be compared, which can run here, and why the others cannot, and end."""
    if not wanted:
        return
    from emoe_core.errors import LimitError
    from workbench.machine.control_groups import find_controller
    from workbench.systems.systems import NO_LIMIT, SYSTEMS

    table = Table("system", Column("what runs", overflow="fold"), "runs here", box=SIMPLE_HEAD)
    for name, system in SYSTEMS.items():
        table.add_row(name, system.what, "[red]no[/]" if system.obstacle else "yes")
    console = Console(highlight=False)
    console.print(table)
    for name, system in SYSTEMS.items():
        if system.obstacle:
            console.print(f"[yellow]{name} cannot run here: {escape(system.obstacle)}[/]", soft_wrap=True)
    try:
        console.print(f"A memory limit can be set (--limit): {find_controller().description}")
    except LimitError as error:
        console.print(f"[yellow]No memory limit can be set (--limit): {escape(str(error))}[/]", soft_wrap=True)
    console.print(
        f"NAME{NO_LIMIT} runs a system without the memory limit; NAME{escape('[key=value;key=value]')} changes its "
        "options. All run on the processor.",
        soft_wrap=True,
    )
    raise typer.Exit


def bench(
    model: Model,
    limit: Annotated[
        str | None, typer.Option(help="Hard memory limit of each process, such as '2.2GB'; none if not given.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory for experts of the emoe systems; what the limit leaves if not given.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="System to measure (--list-systems); repeatable; all that can run if not given."),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="System that ratios are to; the first if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Processes of each system; figures need 5 or more.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens decoded and timed in each process.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 32,
    warm_tokens: Annotated[int, typer.Option(help="Tokens decoded before, untimed.")] = 16,
    max_seconds: Annotated[float, typer.Option(help="A process stops decoding after this long.")] = 600.0,
    threads: Annotated[
        int | None, typer.Option(help="Computing threads of every system; the cores if not given.")
    ] = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    track: Annotated[bool, typer.Option(help="Log the bench to MLflow.")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results; the same command goes on there. Under reports/bench if not given."),
    ] = None,
    listing: Annotated[
        bool,
        typer.Option(
            "--list-systems",
            help="Show the systems, and which can run here.",
            callback=show_systems,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Measure systems side by side: same tokens, fresh processes in turn, cold page cache, one hard memory limit."""
    from workbench.bench.plan import BenchPlan, open_folder
    from workbench.bench.prepare import prepare
    from workbench.bench.runner import run_bench
    from workbench.machine.control_groups import find_controller
    from workbench.machine.environment import available_cores
    from workbench.models.names import require_model
    from workbench.systems.systems import find_systems
    from workbench.tracking.place import project_root

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    plan = BenchPlan(
        model, limit, budget, _systems(system, console), repeats, tokens, prompt_tokens, warm_tokens, dtype,
        threads or available_cores(), max_seconds, seed,
    )  # fmt: skip
    if reference is not None:
        find_systems([reference])
    # A limit that cannot be set, and what is no model, are refused before anything is prepared.
    limited = any(plan.is_limited(one) for one in plan.found_systems())
    controller = find_controller() if limited else None
    require_model(model)
    out = out or project_root() / "reports" / "bench" / plan.folder_name
    open_folder(out, plan)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        prepared = prepare(plan, out, controller, report)

        def on_result(step: Step, row: dict[str, Any] | None, done: int, total: int) -> None:
            name = f"{step.system.name}, repeat {step.repeat + 1} of {plan.repeats}"
            bar.update(task, description=escape(name), completed=done, total=total)
            if row is not None:
                bar.console.print(f"[dim]{escape(f'{name}: {_line(row)}')}[/]")

        results = run_bench(plan, prepared, out, controller, on_result)
    table, notes = _summarised(plan, prepared, results, reference, out)
    shown = Console(highlight=False)
    # Into a file or a pipe, the tables need not be cut to a terminal that is not there.
    shown.width = shown.width if shown.is_terminal else max(shown.width, 120)
    for part in _tables(table, plan):
        shown.print(part)
    _print_notes(shown, notes, plan)
    if track:
        _track(plan, prepared.index.source_hash, results, table, notes, out)
    console.print(f"Results: [bold]{escape(str(out))}[/]")
    if any(row["outcome"] == "failed" for row in results):
        raise typer.Exit(1)


def _systems(names: list[str] | None, console: Console) -> tuple[str, ...]:
    """Return the systems asked for; all that can run here if none were."""
    from workbench.systems.systems import DEFAULT_SYSTEMS, find_systems

    if names:
        return tuple(names)
    obstacles = {system.name: system.obstacle for system in find_systems(DEFAULT_SYSTEMS)}
    for name, obstacle in obstacles.items():
        if obstacle:
            console.print(f"[yellow]{escape(f'{name} is left out: {obstacle}')}[/]")
    return tuple(name for name, obstacle in obstacles.items() if not obstacle)


def _line(row: dict[str, Any]) -> str:
    if row["outcome"] != "measured":
        return f"{row['outcome']} {row['error']}".strip()
    tokens, seconds = row["decoded_tokens"], sum(row["token_s"])
    return f"{tokens / seconds:.3g} tokens/s over {tokens} tokens, loaded in {row['load_s']:.3g} s"


def _summarised(
    plan: BenchPlan, prepared: Any, results: list[dict[str, Any]], reference: str | None, out: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    from workbench.bench.figure import bench_figure
    from workbench.bench.plan import SUMMARY_FILE
    from workbench.bench.summary import summarise

    table, notes = summarise(plan, prepared, results, reference)
    table.to_csv(out / "table.csv", index=False)
    content = {"notes": notes, "systems": json.loads(table.to_json(orient="records"))}
    (out / SUMMARY_FILE).write_text(json.dumps(content, indent=1))
    bench_figure(table, notes, _title(plan)).savefig(out / "speed.png", dpi=120)
    return table, notes


def _title(plan: BenchPlan) -> str:
    from workbench.metrics.show import show_count

    limit = f"hard limit {plan.limit}" if plan.limit else "no memory limit"
    threads = show_count(plan.threads, "thread")
    return f"{Path(plan.model).name}, {limit}, {show_count(plan.tokens, 'token')}, {threads}"


def _tables(table: pd.DataFrame, plan: BenchPlan) -> tuple[Table, Table]:
    """Return the speeds, and what was read and held for them."""
    from workbench.metrics.show import show

    speeds, costs = Table(title=_title(plan)), Table(title="What it took")
    for shown, headings in (
        (speeds, ("tokens/s", "range", "ratio", "bound", "of it", "TTFT", "load")),
        (costs, ("peak", "charged", "read/token", *READ_RATIOS, "hits", "stalls", "wasted", "agrees")),
    ):
        shown.add_column("system", overflow="fold")
        for heading in headings:
            shown.add_column(heading, justify="right")
    for row in table.to_dict("records"):
        name = escape(row["system"] if row["limited"] or not plan.limit else f"{row['system']} *")
        if row["processes"] == 0:
            speeds.add_row(name, "–", row["outcome"])
            continue
        speeds.add_row(
            name,
            f"{row['tokens_per_s']:.3g}",
            f"{row['tokens_per_s_low']:.3g}–{row['tokens_per_s_high']:.3g}",
            f"{row['speed_ratio']:.2f}",
            f"{row['bound_tokens_per_s']:.3g}",
            f"{row['share_of_bound']:.0%}",
            show("ttft_s", row["ttft_s"]),
            show("load_s", row["load_s"]),
        )
        costs.add_row(
            name,
            show("peak_bytes", row["peak_bytes"]),
            show("peak_bytes", row["group_peak_bytes"]),
            show("read_bytes", row["read_bytes_per_token"]),
            *(_ratio(row[name]) for name in READ_RATIOS.values()),
            *(show(figure, row[figure]) for figure in ("hit_rate", "stall_share", "wasted_bytes")),
            show("top1_agreement", row["agreement"]),
        )
    return speeds, costs


def _ratio(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def _print_notes(console: Console, notes: dict[str, Any], plan: BenchPlan) -> None:
    from workbench.metrics.show import show, show_bytes

    bandwidths, slots = notes["bandwidths"], notes["slots_per_layer"]
    lines = [
        f"Tokens from {notes['tokens_from']}. Median over fresh processes run in turn, page cache dropped before each.",
        f"A token routes to {show_bytes(notes['routed_bytes_per_token'])} of experts; with {min(slots)} slots a layer "
        f"Belady loads {show_bytes(notes['belady_bytes_per_token'])}, so at most "
        f"{notes['ideal_tokens_per_s']:.3g} tokens/s exactly (disk {show_bytes(bandwidths['disk_bytes_per_s'])}/s, "
        f"memory {show_bytes(bandwidths['memory_bytes_per_s'])}/s).",
        "bound: 1 / max(own reads / disk bandwidth, time per token with all resident). amplif.: bytes read / bytes "
        "routed; /Belady, /replay: bytes read over what Belady, and this system's own policy replayed, would load. "
        "agrees: own likeliest token is the exact system's. peak: resident memory, shared libraries and mapped files "
        "included; charged: what the limit counted at most, page cache included.",
    ]
    if plan.limit:
        lines.append(f"Limit by {notes['limit_by'] or 'none'}; * ran without it.")
    if notes["routing_agreement"] is not None:
        lines.append(
            f"Recorded routing was followed in {show('top1_agreement', notes['routing_agreement'])} of choices."
        )
    console.print("[dim]" + "\n".join(lines) + "[/]", soft_wrap=True)
    for warning in notes["warnings"]:
        console.print(f"[yellow]Warning: {escape(warning)}[/]", soft_wrap=True)


def _track(
    plan: BenchPlan,
    model_hash: str,
    results: list[dict[str, Any]],
    table: pd.DataFrame,
    notes: dict[str, Any],
    out: Path,
) -> None:
    from dataclasses import asdict

    from workbench.bench.figure import bench_figure
    from workbench.bench.summary import as_metrics
    from workbench.tracking import run as tracking

    name = f"{Path(plan.model).name}, {plan.limit or 'no limit'}"
    with tracking.run("bench", name, params=asdict(plan), model_hash=model_hash) as run:
        run.log_metrics(as_metrics(table, notes))
        run.log_frame("systems", table)
        run.log_text("results.jsonl", "\n".join(json.dumps(row) for row in results))
        run.log_text("notes.json", json.dumps(notes, indent=1))
        run.log_figure("speed", bench_figure(table, notes, _title(plan)))
        run.log_tags({"emoe.folder": str(out)})
