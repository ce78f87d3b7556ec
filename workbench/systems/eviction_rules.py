"""Eviction rules that the engine's own are compared with; `emoe_core.load` takes one as ``policy=``.

A rule chooses who leaves a layer among those that may, and None where it lets nobody go.
"""

from __future__ import annotations

from collections.abc import Sequence

from emoe_core.loader.eviction import lru
from emoe_core.loader.slots import Entry, Policy


def lfu(candidates: Sequence[Entry], forward: int) -> Entry | None:
    """Evict the expert that served the fewest requests since it was loaded; ties go to the least recent."""
    return min(candidates, key=lambda entry: (entry.uses, entry.touched), default=None)


def least_stale(candidates: Sequence[Entry], forward: int) -> Entry | None:
    """Evict stale experts (untouched in this forward pass) first, oldest first; of the fresh ones, the newest.

    Our reading of the Least-Stale policy (arXiv 2602.03921) for per-layer partitions: what this pass has already
    used is kept for the next pass, and a long streamed prefill replaces its own last arrival, not the whole layer.
    """
    stale = [entry for entry in candidates if entry.forward != forward]
    return lru(stale, forward) if stale else max(candidates, key=lambda entry: entry.touched, default=None)


def static(candidates: Sequence[Entry], forward: int) -> Entry | None:
    """Never evict on demand: only a plan changes the residents."""
    return None


RULES: dict[str, Policy] = {rule.__name__: rule for rule in (lfu, least_stale, static)}
