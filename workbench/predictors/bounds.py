"""The bounds of every comparison of predictors: one that knows the prompts to come, and one that knows nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emoe_core.predictor.frequency import shares_of


class OraclePredictor:
    """The upper bound: true shares of the coming prompts. For evaluation only; no engine can have it.

    Its clock is `observe`: the prompt after the last observed one is next.

    Parameters
    ----------
    future : sequence of (str, np.ndarray)
        Task and counts [layers, experts] of every prompt of the stream, in order.
    window : int
        Prompts that a prediction must serve: shares are the mean over a task's prompts among the next ``window``,
        and of its next prompt where there is none among them.
    """

    name = "oracle"

    def __init__(self, future: Sequence[tuple[str, np.ndarray]], window: int = 1) -> None:
        self._future = [(task, shares_of(counts)) for task, counts in future]
        self.window = window
        self._next = 0

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Move on by one prompt."""
        self._next += 1

    def predict(self, task: str) -> np.ndarray | None:
        """Return the task's true shares [layers, experts] over the window, or None when it never comes again."""
        coming = [
            (place, shares)
            for place, (name, shares) in enumerate(self._future[self._next :])
            if name == task and shares is not None
        ]
        if not coming:
            return None
        within = [shares for place, shares in coming if place < self.window]
        return np.mean(within or [coming[0][1]], axis=0)


class RandomPredictor:
    """The lower bound: a fresh random ranking of experts at every call, from a seed; ignores all history."""

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
