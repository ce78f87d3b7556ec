"""What a metric is about, and which way is better, as the catalogue says it; and metrics in the order of tables.

What the catalogue does not know has no direction, and is a time where its name ends with a unit of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workbench.metrics.catalogue import GROUPS, MEMORY, NEITHER, OTHER, QUALITY, TIME, metric_of
from workbench.metrics.show import TIME_UNITS, unit_of


def group_of(metric: str) -> str:
    """Return the group that a metric belongs to."""
    row = metric_of(metric)
    if row is not None:
        return row.group
    return TIME if unit_of(metric) in TIME_UNITS else OTHER


def rank_of(metric: str) -> int:
    """Return the place of a metric's group in tables."""
    return GROUPS.index(group_of(metric))


def in_order(metrics: Iterable[str], named: Sequence[str]) -> list[str]:
    """Return metrics by group; within one, those that the sweep file names come first, in its order."""
    places = {name: place for place, name in enumerate(named)}
    return sorted(metrics, key=lambda name: (rank_of(name), places.get(name, len(named)), name))


def is_measured_memory(metric: str) -> bool:
    """Say whether a metric is memory as the operating system reports it."""
    row = metric_of(metric)
    return row is not None and row.measured


def better_direction(metric: str) -> int:
    """Return -1 where lower is better, 1 where higher is, 0 where neither can be said."""
    row = metric_of(metric)
    return NEITHER if row is None else row.better


def main_metrics(named: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the metrics of the main table, in the order of `every`.

    These are the ones that the sweep file named (all when it named none), and every quality metric when one of them is
    about memory and none about quality.
    """
    chosen = set(named) & set(every)
    if not chosen:
        return list(every)
    groups = {group_of(name) for name in chosen}
    if MEMORY in groups and QUALITY not in groups:
        chosen |= {name for name in every if group_of(name) == QUALITY}
    return [name for name in every if name in chosen]
