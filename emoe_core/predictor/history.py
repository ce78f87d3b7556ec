"""What a trained predictor gets to see: decayed means of past prompts' expert shares, per task and of the stream.

For a task and for the stream as a whole, the last prompt's shares and decayed means with the half-lives `HALF_LIVES`
(in prompts). The stream's part tells what is going on when a task is new or cannot be told. The longest half-life is
that of `FrequencyPredictor`, whose prediction is the *base* that a trained predictor corrects.
"""

from __future__ import annotations

import numpy as np

from emoe_core.predictor.frequency import shares_of

HALF_LIVES = (4.0, 20.0)
KINDS = 1 + len(HALF_LIVES)  # the last prompt, and each half-life
SCALARS = 2  # how many prompts of the task, and of the stream, were seen
ENOUGH = 64  # prompts beyond which more make no difference: decayed means have forgotten the earlier ones


class History:
    """Running means of one stream.

    Parameters
    ----------
    layers, experts : int
        MoE layers, and experts of the largest layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.shape = (layers, experts)
        self._decay = np.array([0.0, *(0.5 ** (1.0 / half_life) for half_life in HALF_LIVES)])
        self._stream = _Means(self.shape)
        self._tasks: dict[str, _Means] = {}

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Take one finished prompt; one without routed tokens is ignored."""
        shares = shares_of(counts)
        if shares is None:
            return
        for means in (self._tasks.setdefault(task, _Means(self.shape)), self._stream):
            means.add(shares, self._decay)

    def features(self, task: str) -> np.ndarray:
        """Return float32 [layers, 2 * KINDS * experts + SCALARS]; zeros where there is no history."""
        layers, _ = self.shape
        own = self._tasks.get(task, _Means(self.shape))
        parts = [means.values().transpose(1, 0, 2).reshape(layers, -1) for means in (own, self._stream)]
        seen = np.log1p(np.minimum([own.prompts, self._stream.prompts], ENOUGH)) / np.log1p(ENOUGH)
        return np.concatenate([*parts, np.tile(seen, (layers, 1))], axis=1).astype(np.float32)

    def base(self, task: str) -> np.ndarray:
        """Return the frequency predictor's shares [layers, experts], uniform without any history."""
        for means in (self._tasks.get(task), self._stream):
            if means is not None and means.prompts:
                return means.values()[-1]
        return np.full(self.shape, 1.0 / self.shape[1])


class _Means:
    """Decayed sums of shares, one per kind, and their weights."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.prompts = 0
        self._sums = np.zeros((KINDS, *shape))
        self._weights = np.zeros(KINDS)

    def add(self, shares: np.ndarray, decay: np.ndarray) -> None:
        self._sums = self._sums * decay[:, None, None] + shares
        self._weights = self._weights * decay + 1.0
        self.prompts += 1

    def values(self) -> np.ndarray:
        return self._sums / np.maximum(self._weights, 1e-12)[:, None, None]
