"""Predict from the past prompt whose expert map looks most like the last one's.

The idea of the activation maps of MoE-Infinity (arXiv 2401.14361) and FineMoE (arXiv 2502.05370), which match a
running prompt's partial map against a store of past ones. Before a prompt has run, only the prompts before it are
known, so here the task's last map is matched (cosine similarity) against the store, and the maps that *followed* the
nearest ones, in their own task, are averaged.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.predictor.frequency import shares_of
from workbench.predictors.last_prompt import LastPromptPredictor


class ActivationMapPredictor:
    """What followed the most similar past prompts.

    Parameters
    ----------
    neighbours : int
        Similar prompts to average over; 1 is the nearest alone.
    capacity : int
        Maps kept; the oldest leave first.
    """

    name = "activation_map"

    def __init__(self, neighbours: int = 4, capacity: int = 512) -> None:
        if neighbours < 1 or capacity < 1:
            raise OptionError(f"neighbours is {neighbours} and capacity {capacity}: give 1 or more of each")
        self.neighbours = neighbours
        self._pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=capacity)
        self._last = LastPromptPredictor()

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Store one finished request's map; one without routed tokens is ignored."""
        shares = shares_of(counts)
        if shares is None:
            return
        before = self._last.remember(task, shares)
        if before is not None:
            self._pairs.append((_direction(before), shares))

    def predict(self, task: str) -> np.ndarray | None:
        """Return mean shares [layers, experts] of what followed; the last map itself while nothing did, else None."""
        query = self._last.predict(task)
        if query is None or not self._pairs:
            return query
        similarity = np.stack([known for known, _ in self._pairs]) @ _direction(query)
        nearest = np.argsort(-similarity, kind="stable")[: self.neighbours]
        return np.mean([self._pairs[place][1] for place in nearest], axis=0)


def _direction(shares: np.ndarray) -> np.ndarray:
    flat = shares.ravel()
    return flat / np.linalg.norm(flat)
