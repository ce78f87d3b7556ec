"""``emoe predictor train`` and ``emoe predictor evaluate``: learn a model's routing, and compare predictors on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.commands.groups import command_group
from workbench.commands.options import AnswerTokens, Model, OutFile, Seed, Source
from workbench.progress import stage_bars

app = command_group("Predictors of expert use.")


@app.command("train")
def train(
    model: Model = "reference",
    variant: Annotated[Literal["A", "L"], typer.Option(help="A: all layers at once; L: layer by layer.")] = "A",
    prompts: Annotated[int, typer.Option(help="Prompts of the profile split to learn from.")] = 240,
    max_new_tokens: AnswerTokens = 24,
    source: Source = "embedded",
    epochs: Annotated[int, typer.Option(help="Epochs at most; training stops when held-out loss rises.")] = 120,
    width: Annotated[int, typer.Option(help="Width of the network.")] = 64,
    depth: Annotated[int, typer.Option(help="Layers of the network.")] = 2,
    seed: Seed = 0,
    out: OutFile = None,
) -> None:
    """Train the transformer predictor of a model from recorded routing, made if missing."""
    from workbench.metrics.show import show_bytes
    from workbench.predictors.training import TrainingOptions
    from workbench.replay.predictor_training import predictor_path, train_predictor
    from workbench.replay.recording import RecordingConfig, record

    options = TrainingOptions(variant=variant, epochs=epochs, width=width, depth=depth, seed=seed)
    config = RecordingConfig(
        model, warm_prompts=prompts, n_prompts=0, source=source, max_new_tokens=max_new_tokens, seed=seed
    )
    with stage_bars() as progress:
        recording = record(config, progress)
        made = train_predictor(recording, options, lambda done, total, loss: progress("epochs", done, total))
    metrics = made.header.metrics
    table = Table(title=f"Predictor {variant}", show_header=False)
    table.add_row("held-out loss", f"{metrics['held_out_loss_nats']:.4f} nats")
    table.add_row("decayed frequency", f"{metrics['base_loss_nats']:.4f} nats")
    table.add_row("oracle", f"{metrics['entropy_nats']:.4f} nats")
    table.add_row("epochs", f"{metrics['epochs']:.0f}, best {metrics['best_epoch']:.0f}")
    share = made.parameter_bytes / recording.model_bytes
    table.add_row("size", f"{show_bytes(made.parameter_bytes)}, {share:.3%} of the model")
    Console().print(table)
    path = made.save(out or predictor_path(recording.model_hash, variant))
    Console().print(f"Predictor: [bold]{escape(str(path))}[/]", soft_wrap=True)


@app.command("evaluate")
def evaluate(
    model: Model = "reference",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Your own routing, from `engine.trace().save(FILE)` of an engine loaded with record=True, instead of "
            "prompts; the first half of its requests warms up."
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Order of the test prompts: sticky, uniform or drift (languages change under one label); repeatable; "
            "the first two if not given."
        ),
    ] = None,
    unlabelled: Annotated[
        list[str] | None, typer.Option(help="Also tell this one of the orders without task types; repeatable.")
    ] = None,
    slots: Annotated[
        list[int] | None, typer.Option(help="Slots a layer; repeatable; half of the experts if not given.")
    ] = None,
    interval: Annotated[int, typer.Option(help="p: predict before every p-th prompt.")] = 1,
    prompts: Annotated[int, typer.Option(help="Prompts of each test stream.")] = 120,
    warm_prompts: Annotated[int, typer.Option(help="Prompts that predictors observe first; 0 is a cold start.")] = 240,
    max_new_tokens: AnswerTokens = 24,
    source: Source = "embedded",
    seed: Seed = 0,
) -> None:
    """Compare all predictors by replay of recorded routing, made if missing, and say which one is best."""
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.errors import OptionError
    from emoe_core.experts.trace import RoutingTrace
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model
    from workbench.paper.predictors import winner
    from workbench.replay.prediction import compare, factories
    from workbench.replay.predictor_training import predictor_path
    from workbench.replay.recording import RecordingConfig, from_trace, record

    experts = min(layer.num_experts for layer in open_checkpoint(resolve_model(model)).layers)
    wrong = [number for number in slots or [] if not 1 <= number <= experts]
    if wrong:
        raise OptionError(f"--slots {wrong[0]}: a layer of this model has {experts} experts, so give 1 to {experts}")
    config = RecordingConfig(
        model,
        warm_prompts=warm_prompts,
        n_prompts=prompts,
        mixes=tuple(mix or RecordingConfig.mixes),
        unlabelled=tuple(unlabelled or ()),
        source=source,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    with stage_bars() as progress:
        if trace is None:
            recording = record(config, progress)
        else:
            recording = from_trace(model, RoutingTrace.load(trace), trace.name)
        found = compare(
            factories(*recording.shape, trained={v: predictor_path(recording.model_hash, v) for v in ("A", "L")}),
            recording.streams,
            slots=slots or [recording.shape[1] // 2],
            intervals=[interval],
            warm=recording.warm,
            expert_bytes=recording.expert_bytes,
            progress=lambda done, total: progress("replays", done, total),
        )
    columns = ("predictor", "stream", "slots", "mass", "of oracle", "skill", "moved a prompt", "wasted", "seconds")
    table = Table(*columns, title=f"Predictors, interval {interval}, {len(recording.warm)} prompts to warm up")
    for row in found.sort_values(["mix", "slots", "skill"], ascending=[True, True, False]).itertuples():
        shares = [f"{value:.1%}" for value in (row.mass, row.of_oracle)]
        moved = [show_bytes(value) for value in (row.moved_bytes, row.wasted_bytes)]
        seconds = f"{row.prediction_median_s:.2g}"
        table.add_row(row.predictor, row.mix, str(row.slots), *shares, f"{row.skill:.3f}", *moved, seconds)
    console = Console()
    console.print(table)
    for stream, rows in found.groupby("mix"):
        best = winner(rows)
        mass, of_oracle = rows[rows["predictor"] == best][["mass", "of_oracle"]].mean()
        console.print(f"Best on {stream}: [bold]{best}[/], {mass:.1%} of choices, {of_oracle:.1%} of the oracle's.")
