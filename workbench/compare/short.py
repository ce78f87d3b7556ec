"""The part of a table of changes that is read first.

Left out: metrics that are equal in A and B and measured memory that is nearly so (both are named below the table), and
what says how far a metric scattered (``_low``, ``_high``, ``_spread_s``) where the metric is there itself. A verdict
that all rows share stands in the title. The interval of a ratio is left to the whole table: it says what that of the
difference says. Nothing is left out of JSON, of the page, and of what ``--all`` prints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workbench.compare.change import Change
from workbench.compare.texts import ChangeRow
from workbench.metrics.catalogue import metric_of
from workbench.metrics.show import BYTE_UNITS, column_texts

CLOSE = 0.01
# Of a metric's own noise: how its name ends, and how the metric's ends instead.
ENDS = {"_low": "", "_high": "", "_spread_s": "_s"}
SIZES = {unit: size for size, unit in BYTE_UNITS} | {"ms": 1e-3, "%": 1e-2}
METRIC, A, B, RATIO, VERDICT = 0, 1, 2, 4, 5


@dataclass(frozen=True)
class ShortTable:
    """A table with fewer rows and columns, and what is said below it."""

    title: str
    headings: tuple[str, ...]
    rows: list[ChangeRow]
    remarks: list[str]


def short_tables(tables: list[tuple[str, list[ChangeRow]]]) -> list[ShortTable]:
    """Shorten the tables of one comparison; a metric and the ends of its interval may stand in different ones."""
    there = {(row.variant, row.change.metric) for _, rows in tables for row in rows}
    return [_short_table(title, [row for row in rows if not _is_end(row, there)]) for title, rows in tables]


def _short_table(title: str, rows: list[ChangeRow]) -> ShortTable:
    equal = [row for row in rows if row.change.identical]
    close = [row for row in rows if _is_close_memory(row.change)]
    differ = [row for row in rows if row not in equal and row not in close]
    remarks = [
        f"{what}: {', '.join(f'{row.variant} {row.cells[METRIC]} {row.cells[A]}'.strip() for row in found)}."
        for what, found in (("Equal in both", equal), ("Measured memory, less than 1% apart (A is shown)", close))
        if found
    ]
    intervals = any(math.isfinite(row.change.low) for row in differ)
    verdicts = {row.cells[VERDICT] for row in differ}
    reasons = {row.change.verdict for row in differ}
    headings: tuple[str, ...] = ("metric", "A", "B", "B − A  [95%]" if intervals else "B − A", "B / A")
    if not intervals and len(reasons) == 1:
        shared = verdicts if len(verdicts) == 1 else reasons
        title = f"{title}: {shared.pop().removeprefix('one value each, ')}"
        last = ["doubtful" if row.doubtful else "" for row in differ] if len(verdicts) > 1 else None
        headings += ("",) if last else ()
    else:
        last = [row.cells[VERDICT] for row in differ]
        headings += ("verdict",)
    short = [
        ChangeRow(
            row.variant,
            (
                *(
                    row.cells[METRIC],
                    row.cells[A],
                    row.cells[B],
                    short_difference(row.change),
                    _ratio(row),
                ),
                *([last[place]] if last else []),
            ),
            row.tone if last else "",
            row.change,
            row.doubtful,
        )
        for place, row in enumerate(differ)
    ]
    return ShortTable(title, headings, short, remarks)


def short_difference(change: Change) -> str:
    """Return B - A and its interval in one unit: "-539 ms [-628, -459]"."""
    values = [change.difference, *([change.low, change.high] if math.isfinite(change.low) else [])]
    unit, _ = column_texts(change.metric, values)
    size = SIZES.get(unit.removesuffix("/s"), 1.0)
    texts = [_signed(value / size) for value in values]
    text = f"{texts[0]} {'points' if unit == '%' else unit}".strip()
    return text if len(texts) == 1 else f"{text} [{texts[1]}, {texts[2]}]"


def _is_end(row: ChangeRow, there: set[tuple[str, str]]) -> bool:
    name = row.change.metric
    return any(
        name.endswith(end) and (row.variant, name.removesuffix(end) + unit) in there for end, unit in ENDS.items()
    )


def _is_close_memory(change: Change) -> bool:
    # A single value that differs by less than the system's own measurement repeats (see `metrics.catalogue`).
    alone = change.pairs == 1 and not change.identical
    return alone and metric_of(change.metric).measured and abs(change.ratio - 1) < CLOSE


def _ratio(row: ChangeRow) -> str:
    return f"{row.change.ratio:.3g}" if 0 < row.change.ratio < CLOSE else row.cells[RATIO].split()[0]


def _signed(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"
