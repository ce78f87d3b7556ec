"""From how many tokens chose each expert to shares, in which prompts weigh alike however long they are."""

from __future__ import annotations

import numpy as np


def shares_of(counts: np.ndarray) -> np.ndarray | None:
    """Return counts [layers, experts] as shares, rows summing to 1, or None when there are none.

    A layer that no token reached is a row of zeros.
    """
    totals = counts.sum(axis=1, keepdims=True)
    if not totals.any():
        return None
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
