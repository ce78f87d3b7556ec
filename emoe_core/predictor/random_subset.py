"""Predict nothing: a fresh random ranking of experts at every call. The sanity bound of every comparison."""

from __future__ import annotations

import numpy as np


class RandomPredictor:
    """Random shares from a seed; ignores all history."""

    name = "random"

    def __init__(self, layers: int, experts: int, seed: int = 0) -> None:
        self.shape = (layers, experts)
        self._random = np.random.default_rng(seed)

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Do nothing."""

    def predict(self, task: str) -> np.ndarray:
        """Return random shares [layers, experts], each row summing to 1."""
        shares = self._random.random(self.shape)
        return shares / shares.sum(axis=1, keepdims=True)
