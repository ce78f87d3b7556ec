"""Predict that a task's next prompts use experts as its recent prompts did.

Per task, an exponentially decayed mean of each prompt's expert shares: a prompt's weight halves with every
``half_life`` later prompts of the same task. A task without history falls back to the decayed mean over all tasks.
"""

from __future__ import annotations

import numpy as np

from emoe_core.errors import OptionError


def shares_of(counts: np.ndarray) -> np.ndarray | None:
    """Return counts [layers, experts] as shares, rows summing to 1, or None when there are none.

    In shares prompts weigh alike, however long they are. A layer that no token reached is a row of zeros.
    """
    totals = counts.sum(axis=1, keepdims=True)
    if not totals.any():
        return None
    return np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)


class FrequencyPredictor:
    """Decayed expert frequencies per task.

    Parameters
    ----------
    layers, experts : int
        MoE layers, and experts of the largest layer.
    half_life : float
        Prompts of a task after which a past prompt counts half; > 0.
    name : str
    """

    def __init__(self, layers: int, experts: int, half_life: float = 20.0, name: str = "frequency") -> None:
        if not half_life > 0:
            raise OptionError(f"half_life is {half_life}: it must be above 0 prompts")
        self.name = name
        self.shape = (layers, experts)
        self.decay = 0.5 ** (1.0 / half_life)
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, float] = {}

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request; a request without routed tokens is ignored."""
        assert counts.shape == self.shape, (counts.shape, self.shape)
        shares = shares_of(counts)
        if shares is None:
            return
        for key in (f"task:{task}", "all"):
            self._sums[key] = self._sums.get(key, 0.0) * self.decay + shares
            self._weights[key] = self._weights.get(key, 0.0) * self.decay + 1.0

    def predict(self, task: str) -> np.ndarray | None:
        """Return the task's decayed shares [layers, experts], those of all tasks without history, or None."""
        for key in (f"task:{task}", "all"):
            if key in self._sums:
                return self._sums[key] / self._weights[key]
        return None
