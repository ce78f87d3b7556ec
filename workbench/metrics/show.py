"""Metrics and their values as people read them: names as words, numbers with units, in the order of tables.

`show` formats one value, `column_texts` many in the same unit, `metric_table` a choice of metrics. Bytes are decimal
(1 MB = 1,000,000 bytes), as storage is sold and as budgets are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.metrics.catalogue import ENDINGS, MEMORY, QUALITY, metric_of

if TYPE_CHECKING:
    import pandas as pd

BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def words_of(name: str) -> str:
    """Return a metric's name as words, without its unit."""
    unit = metric_of(name).unit
    ending = next((ending for ending, said in ENDINGS.items() if said == unit), "")
    # "tokens per second" may be the whole name behind a label: LABEL/tokens_per_s.
    plain = name.removesuffix(ending).removesuffix(f"/{ending.removeprefix('_')}") if ending else name
    return plain.replace("_", " ")


def title_of(name: str) -> str:
    """Return a metric's name as words that stand alone: "slot bytes", because "slot" does not say what of it."""
    return name.replace("_", " ") if metric_of(name).unit == "bytes" else words_of(name)


def show(name: str, value: float | None) -> str:
    """Return a value as text with the unit of its name; a missing value is a dash."""
    if value is None or not math.isfinite(value):
        return _not_finite(value)
    unit = metric_of(name).unit
    if unit in ("bytes", "bytes/s"):
        return show_bytes(value) + unit.removeprefix("bytes")
    if unit == "s":
        return show_seconds(value)
    if unit == "1/s":
        return f"{show_number(value)}/s"
    if unit == "%":
        return f"{100 * value:.1f}%"
    return f"{show_number(value)} {unit}".strip()


def _not_finite(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else str(float(value))


def in_order(metrics: Iterable[str], named: Sequence[str]) -> list[str]:
    """Return metrics by group; within one, those that the sweep file names come first, in its order."""
    places = {name: place for place, name in enumerate(named)}
    return sorted(metrics, key=lambda name: (metric_of(name).rank, places.get(name, len(named)), name))


def main_metrics(named: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the metrics of the main table, in the order of `every`.

    These are the ones that the sweep file named (all when it named none), and every quality metric when one of them is
    about memory and none about quality.
    """
    chosen = set(named) & set(every)
    if not chosen:
        return list(every)
    groups = {metric_of(name).group for name in chosen}
    if MEMORY in groups and QUALITY not in groups:
        chosen |= {name for name in every if metric_of(name).group == QUALITY}
    return [name for name in every if name in chosen]


def metric_table(metrics: Mapping[str, float], names: Sequence[str]) -> pd.DataFrame:
    """Return some metrics as a table of words and values with units, for people; a missing one is a dash."""
    import pandas as pd

    return pd.DataFrame({"": [show(name, metrics.get(name)) for name in names]}, index=[title_of(n) for n in names])


def column_texts(name: str, values: Sequence[float | None]) -> tuple[str, list[str]]:
    """Return a unit and the values as texts in it, with the same number of decimals, so that they can be compared."""
    known = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(known, default=0.0)
    unit, scale = metric_of(name).unit, 1.0
    if unit in ("bytes", "bytes/s"):
        size, prefix = next(((size, prefix) for size, prefix in BYTE_UNITS if largest >= size), (1.0, "B"))
        unit, scale = prefix + unit.removeprefix("bytes"), 1 / size
    elif unit == "s" and 0 < largest < 1:
        unit, scale = "ms", 1000.0
    elif unit == "%":
        scale = 100.0
    whole = all(float(value * scale).is_integer() for value in known)
    digits = len(f"{largest * scale:.0f}")
    decimals = 0 if whole else max(0, 3 - digits) if unit in ("ms", "s") else 1 if unit == "%" else max(0, 4 - digits)
    return unit, [
        f"{value * scale:,.{decimals}f}" if value is not None and math.isfinite(value) else _not_finite(value)
        for value in values
    ]


def show_bytes(value: float) -> str:
    """Return a count of bytes with a decimal prefix."""
    for size, name in BYTE_UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}" if abs(value) < 1000 * size else f"{value / size:,.0f} {name}"
    return f"{value:.0f} B"


def show_seconds(value: float) -> str:
    """Return a duration in milliseconds, seconds, minutes or hours."""
    if 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    if abs(value) < 60:
        return f"{value:.3g} s"
    whole = round(value)
    hours, minutes, seconds = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def show_number(value: float) -> str:
    """Return a number with four significant digits, whole numbers in full."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show_count(number: int, noun: str) -> str:
    """Return ``1 thread`` or ``2 threads``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; a bar within a cell would end it, and becomes a slash."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
