"""Which experts were in memory during a run, layer by layer, and what a cache of its size could have hit.

Terms: an expert is *resident* when it is in a slot, or on its way into one, after a prompt. Its *wanted share* is the
share of its layer's (token, choice) pairs that the all-resident model's router gave it over the run's prompts.

`replayed_hit_rates` are bounds on caching the same routing on demand (tolerance 0, token by token) in the run's slots.
They are counts of a replay (`cache.py`), not of the run: a plan that replaces experts is judged by its quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.replay.accesses import accesses_of_reference
from workbench.replay.cache import replay_policy
from workbench.replay.policies import BOUND

if TYPE_CHECKING:
    from emoe_core import Engine
    from workbench.replay.references import Reference

REPLAYED = {"lru": "lru", "belady": BOUND, "random": "random"}


class ResidencyWatch:
    """Counts, over the prompts of a run, after how many each expert was resident."""

    def __init__(self, engine: Engine) -> None:
        self._table = engine.loader.table
        self._experts = list(engine.plan.num_experts)
        self._seen = np.zeros((len(self._experts), max(self._experts)), dtype=np.int64)
        self._prompts = 0

    def after_prompt(self) -> None:
        """Take note of who is resident now."""
        self._prompts += 1
        for layer in range(len(self._experts)):
            self._seen[layer, sorted(self._table.resident(layer))] += 1

    def frame(self, wanted: np.ndarray) -> pd.DataFrame:
        """Return the run's residency.

        Parameters
        ----------
        wanted : np.ndarray
            (token, choice) pairs of each expert, [layers, experts].

        Returns
        -------
        DataFrame
            One row an expert: ``layer``, ``expert``, ``resident_share`` (of the prompts), ``wanted_share`` (of the
            layer's choices).
        """
        totals = np.maximum(wanted.sum(axis=1, keepdims=True), 1)
        rows = [(layer, expert) for layer, count in enumerate(self._experts) for expert in range(count)]
        at = tuple(np.array(rows).T)
        return pd.DataFrame(
            {
                "layer": at[0],
                "expert": at[1],
                "resident_share": self._seen[at] / max(self._prompts, 1),
                "wanted_share": (wanted / totals)[at],
            }
        )


def replayed_hit_rates(reference: Reference, slots_per_layer: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Return hits per lookup on demand as ``replayed_NAME_hit_rate``: LRU, Belady's MIN (the best possible), random.

    Parameters
    ----------
    reference : Reference
        The all-resident model's outputs, whose routing is replayed.
    slots_per_layer : sequence of int
        The run's slots.
    seed : int
        Of the random bound.
    """
    return dict(_replayed(reference, tuple(int(slots) for slots in slots_per_layer), seed))


@lru_cache(maxsize=16)
def _replayed(reference: Reference, slots_per_layer: tuple[int, ...], seed: int) -> dict[str, float]:
    """Replay once what all variants of a stream with equal slots have in common."""
    accesses = accesses_of_reference(reference)
    capacity = [min(slots, accesses.experts) for slots in slots_per_layer]
    found = {}
    for name, policy in REPLAYED.items():
        misses = int(replay_policy(accesses, policy, capacity, seed=seed).misses.sum())
        found[f"replayed_{name}_hit_rate"] = 1 - misses / accesses.lookups if accesses.lookups else 1.0
    return found
