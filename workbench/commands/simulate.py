"""``emoe simulate``: what each cache policy would load, by replay of recorded routing."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.checkpoints import ModelArgument


def simulate(
    model: ModelArgument = "reference",
    budget: Annotated[list[str] | None, typer.Option(help="Memory for experts; may be given several times.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; may be given several times; all if none.")] = None,
    mix: Annotated[list[str] | None, typer.Option(help="Task order: 'sticky' or 'uniform'; both if none.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each stream.")] = 48,
    warm_prompts: Annotated[int, typer.Option(help="Earlier prompts, whose experts 'pinned' holds.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each recorded answer.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Prompts served together.")] = 1,
    source: Annotated[str, typer.Option(help="Prompts: 'embedded', 'fixture' or 'hub'.")] = "embedded",
    seed: Annotated[int, typer.Option(help="Seed of the streams, and of the policy 'random'.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Replay recorded routing through cache policies, between LRU and the best possible (records what is missing)."""
    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model
    from workbench.progress import stage_bars
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
    table = Table(title=f"{escape(model)}: {prompts} prompts a stream, {batch_size} at a time, seed {seed}")
    for column in ("stream", "budget", "slots a layer", "policy"):
        table.add_column(column)
    for column in ("misses", "over prompts", "hit rate", "loaded", "gap closed"):
        table.add_column(column, justify="right")
    for row in found.sort_values(["stream", "slots", "loads"], ascending=[True, True, False]).itertuples():
        gap = "" if row.gap_closed != row.gap_closed else f"{row.gap_closed:.0%}" if row.gap_closed >= 0 else "< 0"
        table.add_row(
            row.stream, row.size, f"{row.slots:.3g}", row.policy, f"{row.misses:,}", f"{row.prefill_misses:,}",
            f"{row.hit_rate:.1%}", show_bytes(row.loaded_bytes), gap,
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        "[dim]gap closed: from LRU's loads (0%) to those of Belady's MIN (hindsight, 100%); < 0 is worse than LRU.\n"
        "Loads count what 'pinned' holds from the start, misses do not. No time is simulated.[/]"
    )
