"""Predict with a Markov chain over prompts and layers, learned online.

Terms: P_0[i, j] is the share of the next prompt of a task that layer 0 routes to expert j, for tokens that its last
prompt routed to i; P_l[i, j], l > 0, the share of a prompt that layer l routes to j, for tokens that layer l - 1
routed to i. Histories hold shares a prompt, not single tokens, so tokens of a prompt count as if they chose
independently in the two layers: the matrices are sums of outer products of shares, with rows normalised.

A prediction starts from the last prompt's layer 0 and walks through the layers. Matrices are shared by all tasks; the
last prompt is the task's own (the stream's, for a task without history).
"""

from __future__ import annotations

import numpy as np

from emoe_core.predictor.frequency import shares_of
from workbench.predictors.last_prompt import LastPromptPredictor


class TransitionPredictor:
    """Expert transitions between consecutive layers, and between consecutive prompts in layer 0.

    Parameters
    ----------
    layers, experts : int
        MoE layers, and experts of the largest layer.
    """

    name = "transition"

    def __init__(self, layers: int, experts: int) -> None:
        # A little weight on staying keeps rows of experts that were never seen well defined.
        self._joint = np.stack([np.eye(experts) * 1e-3] * layers)
        self._last = LastPromptPredictor()

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request; one without routed tokens is ignored."""
        shares = shares_of(counts)
        if shares is None:
            return
        before = self._last.remember(task, shares)
        if before is not None:
            self._joint[0] += np.outer(before[0], shares[0])
        self._joint[1:] += shares[:-1, :, None] * shares[1:, None, :]

    def predict(self, task: str) -> np.ndarray | None:
        """Return the chain's shares [layers, experts], or None before the first prompt."""
        start = self._last.predict(task)
        if start is None:
            return None
        steps = self._joint / self._joint.sum(axis=2, keepdims=True)
        shares = np.zeros_like(start)
        current = start[0]
        for layer, step in enumerate(steps):
            shares[layer] = current = current @ step
        return shares
