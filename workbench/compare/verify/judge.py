"""Recorded values against those of a second execution: bit-equal, within tolerance, or not.

Three kinds of metrics: *times* follow the clock and are only shown, unless they happen to be equal or a tolerance for
them is given; *measured memory* repeats within a few percent; everything else is computed, and what is computed should
be bit-equal on the same machine and differ by rounding on another. Tables are judged cell by cell in the same way; text
must be equal. Figures are not compared: they are drawn from these values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.metrics.catalogue import metric_of

if TYPE_CHECKING:
    import pandas as pd

EQUAL, WITHIN, DIFFERS, SHOWN, MISSING, NEW = (
    "bit-equal",
    "within tolerance",
    "differs",
    "not compared",
    "missing",
    "new",
)
FAILING = (DIFFERS, MISSING)
# Sentences made of the other tables' numbers, times among them.
PROSE_TABLES = ("beside_paper",)


@dataclass(frozen=True)
class Tolerances:
    """How far a value may be from the recorded one.

    Attributes
    ----------
    relative, absolute : float
        Of computed values; a value is within when it is off by at most ``absolute + relative * |recorded|``. The
        defaults let float32 sums be made in another order.
    memory : float
        Relative, of measured memory.
    times : float or None
        Relative, of times; None shows them without judging.
    """

    relative: float = 1e-4
    absolute: float = 1e-6
    memory: float = 0.05
    times: float | None = None

    def of(self, metric: str) -> tuple[float, float] | None:
        """Return the relative and the absolute tolerance of a metric, None where it is not judged."""
        if metric_of(metric).group == "time":
            return None if self.times is None else (self.times, 0.0)
        return (self.memory, 0.0) if metric_of(metric).measured else (self.relative, self.absolute)


@dataclass(frozen=True)
class Judgement:
    """One metric, or one column of a table.

    Attributes
    ----------
    name : str
    recorded, found : float or None
        Values of a metric; None for a column, or where there is no value.
    status : str
        One of the words of this module.
    relative : float
        Largest distance over the recorded value; infinite where that is 0, NaN where nothing can be told.
    cells, unequal : int
        Values compared, and how many of them are not bit-equal.
    """

    name: str
    recorded: float | None
    found: float | None
    status: str
    relative: float
    cells: int = 1
    unequal: int = 0


def judge_metrics(recorded: Mapping[str, float], found: Mapping[str, float], tolerances: Tolerances) -> list[Judgement]:
    """Return a judgement for every metric of either execution, in the order they were recorded."""
    judged = []
    for name in dict.fromkeys([*recorded, *found]):
        a, b = recorded.get(name), found.get(name)
        if a is None or b is None:
            judged.append(Judgement(name, a, b, NEW if a is None else MISSING, math.nan))
            continue
        status, relative, unequal = _judge(name, np.array([a]), np.array([b]), tolerances)
        judged.append(Judgement(name, a, b, status, relative, 1, unequal))
    return judged


def judge_table(name: str, recorded: pd.DataFrame, found: pd.DataFrame | None, tol: Tolerances) -> list[Judgement]:
    """Return a judgement for every column of a table, named ``table.column``."""
    if found is None:
        return [Judgement(name, None, None, MISSING, math.nan, 0)]
    if len(recorded) != len(found):
        return [Judgement(f"{name} rows", len(recorded), len(found), DIFFERS, math.nan)]
    judged = []
    for column in dict.fromkeys([*recorded, *found]):
        label = f"{name}.{column}"
        if column not in recorded or column not in found:
            judged.append(Judgement(label, None, None, MISSING if column in recorded else NEW, math.nan, len(recorded)))
            continue
        a, b = recorded[column], found[column]
        if a.dtype.kind in "fiub" and b.dtype.kind in "fiub":
            status, relative, unequal = _judge(str(column), a.to_numpy(float), b.to_numpy(float), tol)
        else:
            unequal = sum(_text(x) != _text(y) for x, y in zip(a, b, strict=True))
            status, relative = (DIFFERS if unequal else EQUAL), math.nan if unequal else 0.0
        judged.append(Judgement(label, None, None, status, relative, len(a), unequal))
    return judged


def _judge(metric: str, a: np.ndarray, b: np.ndarray, tolerances: Tolerances) -> tuple[str, float, int]:
    """Return status, largest relative distance and number of unequal values."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    unequal = int((~same).sum())
    if unequal == 0:
        return EQUAL, 0.0, 0
    off, size = np.abs(a - b)[~same], np.abs(a)[~same]
    relative = float(np.max(np.divide(off, size, out=np.full_like(off, np.inf), where=size > 0)))
    allowed = tolerances.of(metric)
    if allowed is None:
        return SHOWN, relative, unequal
    # A NaN on one side only is never within.
    within = bool((off <= allowed[1] + allowed[0] * size).all())
    return (WITHIN if within else DIFFERS), relative, unequal


def _text(value: Any) -> Any:
    return None if value is None or value != value else str(value)
