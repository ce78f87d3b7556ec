"""The fewest misses that any cache of the same slots could have: Belady's MIN for passes that need several experts.

After a pass, a layer may hold any C (its slots) of the experts that were resident or needed; MIN keeps those whose
next use is nearest. A needed expert may pass through the staging slot without staying, so streamed passes (more needed
experts than slots) and policies that refuse newcomers are covered: no policy on the engine's table can miss less,
whatever it knows. Keeping an expert between two uses is an interval; at most C may overlap; dropping the one that ends
last keeps the most of them.

Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def next_uses(needed: np.ndarray) -> np.ndarray:
    """Return the next later step that needs each expert, S when none does, int32 [S, L, E]."""
    steps = len(needed)
    found = np.empty(needed.shape, dtype=np.int32)
    ahead = np.full(needed.shape[1:], steps, dtype=np.int32)
    for step in range(steps - 1, -1, -1):
        found[step] = ahead
        ahead = np.where(needed[step], np.int32(step), ahead)
    return found


def fewest_misses(needed: np.ndarray, capacity: Sequence[int]) -> np.ndarray:
    """Return MIN's misses of each step and layer, int64 [S, L].

    Parameters
    ----------
    needed : np.ndarray
        Bool [S, L, E].
    capacity : sequence of int
        Slots of each layer. The cache starts empty.
    """
    steps, layers, experts = needed.shape
    slots = np.asarray(capacity)[:, None]
    ahead = next_uses(needed)
    misses = np.zeros((steps, layers), dtype=np.int64)
    resident = np.zeros((layers, experts), dtype=bool)
    for step in range(steps):
        misses[step] = (needed[step] & ~resident).sum(axis=1)
        there = resident | needed[step]
        rank = np.where(there, ahead[step], steps + 1).argsort(axis=1, kind="stable").argsort(axis=1)
        resident = there & (rank < slots)
    return misses
