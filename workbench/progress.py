"""Progress: of a run's stages as text bars, in a terminal and in a notebook alike; of one step in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm


@contextmanager
def stage_bars(title: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (stage, done, total) that draws one bar per stage; a stage that is not reported draws none."""
    bars: dict[str, tqdm] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for earlier in bars.values():
                earlier.close()
            label = f"{title} {stage}".strip()
            bars[stage] = tqdm(total=total, desc=label, mininterval=1.0, ncols=88, position=0)
        bars[stage].update(done - bars[stage].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


@contextmanager
def progress_bar(what: str, counted: str | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a bar in the terminal while something counts up, and none afterwards; yields what to call with (done, all).

    ``counted`` is shown instead of ``what`` once something is counted.
    """
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total, description=counted or what)
