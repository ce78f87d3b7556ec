"""What a person sees of a sweep: a live table below the lines of ended runs in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from workbench.machine.busy import busy_warning
from workbench.metrics.show import show, show_seconds, words_of
from workbench.sweep.points import Point

SHOWN_METRICS = 4
REDRAWS_PER_S = 2
SPARE_LINES = 6  # of the terminal's height: the table's frame, the totals and the prompt


class SweepScreen:
    """Tells how a sweep goes on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._running: dict[str, tuple[Point, float, float | None]] = {}
        self._counts: Counter[str] = Counter()
        self._total = 0
        self._left_s: float | None = 0.0
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self.console.print(text)

    def announce(self, total: int, expected_s: float | None) -> None:
        """Say how many runs there are to do, and how many seconds they are expected to take one after another."""
        self._total, self._left_s = total, expected_s
        about = "" if expected_s is None else f", about {show_seconds(expected_s)}"
        if total:
            self.say(f"{total} runs to do{about}.")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the table meanwhile, where there is a terminal to draw it on."""
        if not self.console.is_terminal:
            yield
            return
        live = Live(console=self.console, get_renderable=self.table, refresh_per_second=REDRAWS_PER_S, transient=True)
        with live:
            yield

    def began(self, run_id: str, point: Point, expected_s: float | None) -> None:
        """Show a run as running."""
        self._running[run_id] = (point, time.monotonic(), expected_s)
        if not self.console.is_terminal:
            # A terminal shows it in the table.
            self.say(f"started  {escape(point.label)}")

    def ended(self, run_id: str, outcome: str, error: str, metrics: dict[str, float]) -> None:
        """Show in one line how a run ended: as ``finished``, ``failed`` or ``lost``."""
        point, began, expected_s = self._running.pop(run_id)
        self._counts[outcome] += 1
        if outcome != "lost" and self._left_s is not None and expected_s is not None:
            self._left_s = max(0.0, self._left_s - expected_s)
        told = key_metrics(point, metrics) if outcome == "finished" else escape(error)
        colour = {"finished": "green", "failed": "red"}.get(outcome, "yellow")
        took = show_seconds(time.monotonic() - began)
        self.say(f"[{colour}]{outcome:<8}[/] {escape(point.label)}  [dim]{took}[/]  {told}")

    def left_s(self, now: float) -> float | None:
        """Return the seconds that the sweep may still take with as many runs at once as now; None when unknown."""
        if self._left_s is None or not self._running:
            return self._left_s
        known = [(now - began, expected or 0.0) for _, began, expected in self._running.values()]
        under_way = sum(min(spent, expected) for spent, expected in known)
        longest = max(max(0.0, expected - spent) for spent, expected in known)
        return max(longest, (self._left_s - under_way) / len(known))

    def table(self) -> Group:
        """Return the table of running runs and the line of totals."""
        now = time.monotonic()
        grid = Table(expand=False)
        for heading in ("run", "state", "for", "expected"):
            grid.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
        room = max(1, self.console.size.height - SPARE_LINES)
        shown = list(self._running.values())[:room]
        for point, began, expected in shown:
            about = show_seconds(expected) if expected else "unknown"
            grid.add_row(escape(point.label), "running", show_seconds(round(now - began)), about)
        hidden = len(self._running) - len(shown)
        done = self._counts["finished"] + self._counts["failed"]
        waiting = max(0, self._total - done - len(self._running))
        parts = [
            f"{done} of {self._total} done",
            f"{waiting} waiting",
            f"{show_seconds(round(now - self._began))} so far",
        ]
        if self._counts["failed"]:
            parts.insert(1, f"{self._counts['failed']} failed")
        if hidden:
            parts.insert(0, f"{hidden} more running")
        left = self.left_s(now)
        if left is not None:
            parts.append(f"about {show_seconds(round(left))} left")
        return Group(grid, Text(", ".join(parts)))


def key_metrics(point: Point, metrics: dict[str, float]) -> str:
    """Return the metrics that a run's line shows, and a warning where its times cannot be trusted."""
    names = [name for name in point.stage.metrics if name in metrics] or sorted(metrics)[:SHOWN_METRICS]
    told = ", ".join(f"{words_of(name)} {show(name, metrics[name])}" for name in names)
    warning = busy_warning(metrics.get("others_cpu_share"))
    return f"{told}  [yellow]{warning}[/]" if warning else told
