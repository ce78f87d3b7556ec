"""``emoe model synth``: a checkpoint of a published shape with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from workbench.commands.options import OutFolder, Seed
from workbench.progress import progress_bar

if TYPE_CHECKING:
    from emoe_core.experts.trace import RoutingTrace
    from workbench.models.synthetic.shapes import Shape

Size = Annotated[int | None, typer.Option(show_default=False, help="In place of the shape's own.")]


def synth(
    like: Annotated[str, typer.Option(help="Shape: 'bench' (3.3 GB) or a published one, such as 'olmoe-1b-7b'.")],
    scale: Annotated[
        float, typer.Option(help="Share of the published bytes: widths and vocabulary times its square root.")
    ] = 1.0,
    routing: Annotated[
        str,
        typer.Option(
            help="'own' (random routers), or recorded routing to write into the weights: a model that comes along "
            "('reference', 'carved', 'native') or a file."
        ),
    ] = "own",
    layers: Size = None,
    experts: Size = None,
    top_k: Size = None,
    hidden: Size = None,
    intermediate: Size = None,
    vocab: Size = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the weights that are written.")
    ] = "bfloat16",
    seed: Seed = 0,
    out: OutFolder = None,
) -> None:
    """Write a checkpoint with random weights that loads like its model (goes on where it stopped)."""
    from workbench.metrics.show import show_bytes
    from workbench.models.synthetic.shapes import find_shape, overridden, scaled
    from workbench.models.synthetic.writer import cached_folder, label_of, write_synthetic
    from workbench.replay.recorded_routing import OWN, recorded_trace

    sizes = {"layers": layers, "experts": experts, "top_k": top_k, "hidden": hidden}
    sizes |= {"intermediate": intermediate, "vocab": vocab}
    shape = overridden(scaled(find_shape(like), scale), **sizes)
    changed = [f"{name.replace('_', '-')} {size}" for name, size in sizes.items() if size is not None]
    label = " ".join([like, f"at scale {scale:g}", *(["with", ", ".join(changed)] if changed else [])])
    trace, source = None, None
    if routing != OWN:
        with progress_bar("recording routing") as progress:
            trace, source = recorded_trace(routing, progress)
        trace = _laid_out(trace, shape)
    folder = out or cached_folder(label, routing, dtype, seed)
    with progress_bar("writing random weights") as progress:
        write_synthetic(
            folder, shape, label, trace=trace, trace_source=source, dtype=dtype, seed=seed, progress=progress
        )
    made = label_of(folder) or {}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"RANDOM WEIGHTS, {made['label']}: [bold]{escape(str(folder))}[/] ({show_bytes(size)})")
    console.print(f"[dim]routing: {_routing_line(made['routing'])}[/]")


def _laid_out(trace: RoutingTrace, shape: Shape) -> RoutingTrace:
    from workbench.models.synthetic.composed_trace import locality
    from workbench.models.synthetic.writer import laid_out

    composed = laid_out(trace, shape)
    console = Console(soft_wrap=True, highlight=False)
    for name, found in (("recorded", locality(trace)), ("written", locality(composed))):
        console.print(
            f"[dim]{name} routing: a token repeats {found.repeat_rate:.1%} of the last one's experts (even: "
            f"{found.even_rate:.1%}), the better half of experts gets {found.best_half_mass:.1%} of choices[/]"
        )
    return composed


def _routing_line(routing: dict[str, object]) -> str:
    if "source" not in routing:
        return str(routing["kind"])
    return (
        f"{routing['kind']}, from {routing['source']}; {routing['tokens']} tokens, weights alone reproduce "
        f"{routing['agreement']:.2%} of choices"
    )
