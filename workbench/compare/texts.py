"""Changes as people read them: values with units, intervals in brackets, a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.compare.change import Change
from workbench.compare.differences import Difference, is_doubtful
from workbench.metrics.catalogue import metric_of
from workbench.metrics.show import show, show_number, words_of

HEADINGS = ("metric", "A", "B", "B − A  [95%]", "B / A  [95%]", "verdict")


@dataclass(frozen=True)
class ChangeRow:
    """A line of a table of changes; ``tone`` is "better", "worse" or empty."""

    variant: str
    cells: tuple[str, ...]
    tone: str
    change: Change
    doubtful: bool


def change_row(change: Change, doubtful: bool) -> ChangeRow:
    """Return one change as texts, in the order of `HEADINGS`."""
    difference = _signed(change.metric, change.difference)
    if math.isfinite(change.low):
        difference += f"  [{_signed(change.metric, change.low)}, {_signed(change.metric, change.high)}]"
    ratio = _ratio(change.ratio)
    if math.isfinite(change.ratio_low):
        ratio += f"  [{_ratio(change.ratio_low)}, {_ratio(change.ratio_high)}]"
    verdict = change.verdict
    both = (show(change.metric, change.a), show(change.metric, change.b))
    tone = next((word for word in ("better", "worse") if verdict.endswith(word)), "")
    if doubtful and not change.identical:
        verdict, tone = f"{verdict} (doubtful)", ""
    return ChangeRow(
        change.variant, (words_of(change.metric), *both, difference, ratio, verdict), tone, change, doubtful
    )


def change_rows(changes: list[Change], differences: Iterable[Difference]) -> list[ChangeRow]:
    """Return changes as rows; those that one of the differences may have moved say so."""
    found = list(differences)
    return [change_row(change, is_doubtful(change, found)) for change in changes]


def _signed(metric: str, value: float) -> str:
    # A difference of shares is in points: "%" would read as a ratio.
    text = f"{100 * value:.3g} points" if metric_of(metric).unit == "%" else show(metric, value)
    return f"+{text}" if value > 0 else text


def _ratio(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= value < 100 else show_number(value) if math.isfinite(value) else "–"
