"""``emoe run``, ``pack``, ``estimate`` and ``cache``: a checkpoint under a memory budget."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from emoe_core.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emoe_core import Engine

MODEL_HELP = (
    "Folder of a Hugging Face checkpoint, a hub id, or an embedded model: 'reference' or 'carved' (built on first use)."
)
ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
BudgetOption = Annotated[
    str | None,
    typer.Option(help="Memory for experts: '40%', '300MB' or '3 slots'; 40% if missing, or as the target asks."),
]
ExpertDtypeOption = Annotated[
    str, typer.Option(help="'auto' keeps experts as they are; 'int8' rounds them: half the memory, not exact.")
]
QualityOption = Annotated[
    float | None, typer.Option(help="Allowed rise of perplexity, 0.01 for 1%; needs the model's task profile.")
]


def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    budget: BudgetOption = None,
    max_quality_loss: QualityOption = None,
    tolerance: Annotated[
        float, typer.Option(help="0 is exact; 1 loads only while slots are empty, then replaces.")
    ] = 0.0,
    task: Annotated[str | None, typer.Option(help="Task type of the prompt; found from its words if missing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    device: Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")] = "auto",
    dtype: Annotated[str, typer.Option(help="'auto' (the checkpoint's), 'float32' or 'bfloat16'.")] = "auto",
    expert_dtype: ExpertDtypeOption = "auto",
) -> None:
    """Answer a prompt under a memory budget, and say what the budget did."""
    if max_new_tokens < 1:
        raise OptionError(f"--max-new-tokens {max_new_tokens}: give at least 1.")
    if not prompt.strip():
        raise OptionError("the prompt is empty: say what to ask.")
    from emoe_core.planning.tasks import TASK_TYPES
    from workbench.models.names import resolve_model

    if task is not None and task not in TASK_TYPES:
        raise OptionError(f"--task {task}: the task types are {', '.join(TASK_TYPES)}.")
    checkpoint = resolve_model(model)
    console = Console(highlight=False)
    options = {"tolerance": tolerance, "device": device, "dtype": dtype, "expert_dtype": expert_dtype}
    with open_engine(checkpoint, budget, max_quality_loss, console, **options) as engine:

        def write(request: int, text: str) -> None:
            console.out(text, end="", highlight=False)

        answer = engine.generate([prompt], tasks=[task], max_new_tokens=max_new_tokens, on_token=write)[0]
        console.print()
        stats = engine.stats()
    from workbench.metrics.show import show

    counts = stats.counters
    console.print(
        f"[dim]experts: {counts.hits} hits, {counts.loads} loads, {counts.reroutes} reroutes "
        f"({counts.hit_rate:.0%} hits); {escape(stats.compute)}\n"
        f"memory: {show('slot_bytes', stats.slot_bytes)} for {show('expert_bytes', stats.expert_bytes)} of experts, "
        f"and {show('dense_bytes', stats.dense_bytes)} of dense weights\n"
        f"time: first token {show('ttft_s', answer.ttft_s)}, then {show('tpot_s', answer.tpot_s)} a token[/]"
    )


def pack(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option(help="File to write; the cache when not given.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every expert back and compare its checksum.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write the pack again even if there is one.")] = False,
    dtype: Annotated[str, typer.Option(help="'auto' (the checkpoint's), 'float32' or 'bfloat16'.")] = "auto",
) -> None:
    """Write a checkpoint's experts into one file that they are read from quickly."""
    if out is not None and out.is_dir():
        raise OptionError(f"--out {out} is a folder: name the file to write, such as {out / 'experts.emoe'}")
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.loader.pack import Pack, ensure_pack, write_pack
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model

    index = open_checkpoint(resolve_model(model), dtype)
    with progress_bar("writing experts") as progress:
        if out is not None:
            if force or not out.exists():
                write_pack(index, out, progress)
            made = Pack.open(out, index)
        else:
            made = ensure_pack(index, pack_dir(), progress)
            if force:
                made = Pack.open(write_pack(index, made.path, progress), index)
    if verify:
        with progress_bar("verifying experts") as progress:
            made.verify(progress)
    checked = ", every checksum verified" if verify else ""
    Console().print(f"Pack: [bold]{escape(str(made.path))}[/] ({show_bytes(made.file_bytes)}{checked})", soft_wrap=True)


def estimate(
    model: ModelArgument,
    budget: BudgetOption = None,
    max_quality_loss: QualityOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest sequence, prompt and answer together.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="'auto' (the checkpoint's), 'float32' or 'bfloat16'.")] = "auto",
    expert_dtype: ExpertDtypeOption = "auto",
) -> None:
    """Say what a budget buys and what memory the model needs, without loading it."""
    from emoe_core.budget import plan_slots
    from emoe_core.checkpoint.index import open_checkpoint
    from emoe_core.config import EngineConfig
    from emoe_core.engine import plan_engine
    from emoe_core.footprint import memory_breakdown
    from workbench.metrics.show import show_bytes
    from workbench.models.names import resolve_model

    checkpoint = resolve_model(model)
    index = open_checkpoint(checkpoint, dtype).with_expert_dtype(expert_dtype)
    plan, quality = plan_engine(index, EngineConfig(**memory_options(checkpoint, budget, max_quality_loss)))
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
    for term, value in memory_breakdown(index, plan, max_tokens, batch).rows():
        table.add_row(term, value)
    console.print(table)
    if plan.warning:
        console.print(f"[yellow]{escape(plan.warning)}[/]", soft_wrap=True)


def cache(
    action: Annotated[str, typer.Argument(help="'list' or 'clear'.")] = "list",
    yes: Annotated[bool, typer.Option("--yes", help="Clear without asking.")] = False,
) -> None:
    """Show or empty the cache: downloaded packages, built models, packs, prompts. All of it can be made again."""
    from emoe_core.loader.cache_folder import cache_dir
    from workbench.metrics.show import show_bytes

    console = Console()
    folder = cache_dir()
    entries = sorted(folder.iterdir())
    sizes = {entry: _size_bytes(entry) for entry in entries}
    if action == "list":
        table = Table(title=escape(str(folder)))
        table.add_column("entry")
        table.add_column("size", justify="right")
        for entry in entries:
            table.add_row(escape(entry.name), show_bytes(sizes[entry]))
        table.add_row("[bold]all[/]", f"[bold]{show_bytes(sum(sizes.values()))}[/]")
        console.print(table)
    elif action == "clear":
        if not yes:
            typer.confirm(f"Remove {show_bytes(sum(sizes.values()))} in {folder}?", abort=True)
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        console.print(f"Removed {show_bytes(sum(sizes.values()))}.")
    else:
        raise OptionError(f"emoe cache {action}: give 'list' or 'clear'.")


def open_engine(
    checkpoint: str | Path, budget: str | None, max_quality_loss: float | None, console: Console, **options: Any
) -> Engine:
    """Load an engine with progress, and print the warning of its plan, if any; ``options`` as `emoe_core.load`."""
    import emoe_core

    with progress_bar("loading the model", "writing experts to a pack, once") as progress:
        engine = emoe_core.load(
            checkpoint, progress=progress, **options, **memory_options(checkpoint, budget, max_quality_loss)
        )
    if engine.plan.warning:
        console.print(f"[yellow]{escape(engine.plan.warning)}[/]")
    return engine


def memory_options(checkpoint: str | Path, budget: str | None, max_quality_loss: float | None) -> dict[str, Any]:
    """Return the options of `emoe_core.load` that a budget, a quality target or both come to."""
    if max_quality_loss is None:
        return {"budget": "40%" if budget is None else budget}
    from workbench.quality.profile.profiling import stored_profile

    return {"budget": budget, "max_quality_loss": max_quality_loss, "profile": stored_profile(checkpoint)}


def pack_dir() -> Path:
    """Return the folder of the cache that packs lie in."""
    from emoe_core.loader.cache_folder import cache_dir

    return cache_dir() / "packs"


@contextlib.contextmanager
def progress_bar(what: str, counted: str | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while something counts up; yields the function to call with (done, all).

    ``counted`` is shown instead of ``what`` once something is counted.
    """
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total, description=counted or what)


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(item.stat().st_size for item in files if item.is_file() and not item.is_symlink())
