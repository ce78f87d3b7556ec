"""The engine that a command runs: loaded with progress, under the budget or target that its options describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from workbench.progress import progress_bar

if TYPE_CHECKING:
    from emoe_core import Engine


def open_engine(
    model: str, budget: str | None, max_quality_loss: float | None, console: Console, **options: Any
) -> Engine:
    """Load an engine with progress, and print the warning of its plan, if any; ``options`` as `emoe_core.load`."""
    import emoe_core
    from workbench.models.names import resolve_model

    checkpoint, memory = resolve_model(model), memory_options(model, budget, max_quality_loss)
    with progress_bar("loading the model", "writing experts to a pack, once") as progress:
        engine = emoe_core.load(checkpoint, progress=progress, **options, **memory)
    if engine.plan.warning:
        console.print(f"[yellow]{escape(engine.plan.warning)}[/]")
    return engine


def memory_options(model: str, budget: str | None, max_quality_loss: float | None) -> dict[str, Any]:
    """Return the options of `emoe_core.load` that a budget, a quality target or both come to."""
    if max_quality_loss is None:
        return {"budget": "40%" if budget is None else budget}
    from workbench.quality.profile.profiling import stored_profile

    return {"budget": budget, "max_quality_loss": max_quality_loss, "profile": stored_profile(model)}
