"""Progress of a run's stages as text bars, in a terminal and in a notebook alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
