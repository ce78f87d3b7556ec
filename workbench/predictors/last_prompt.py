"""Predict that the next prompt uses experts as the last one did: the shortest memory there is.

The last prompt is that of the same task, or with ``same_task=False`` that of the whole stream, which is all that a
predictor without task types can know. A task without history falls back to the stream's last prompt.
"""

from __future__ import annotations

import numpy as np

from emoe_core.predictor.frequency import shares_of


class LastPromptPredictor:
    """The expert shares of the last prompt.

    Parameters
    ----------
    same_task : bool
        Remember the last prompt of each task, not only the stream's.
    """

    def __init__(self, same_task: bool = True) -> None:
        self.name = "last_prompt" if same_task else "last_in_stream"
        self.same_task = same_task
        self._of_task: dict[str, np.ndarray] = {}
        self._last: np.ndarray | None = None

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Remember one finished request; one without routed tokens is ignored."""
        shares = shares_of(counts)
        if shares is not None:
            self.remember(task, shares)

    def remember(self, task: str, shares: np.ndarray) -> np.ndarray | None:
        """Take a prompt's shares [layers, experts]; return those of the task's prompt before it, or None."""
        before = self._of_task.get(task)
        self._last = self._of_task[task] = shares
        return before

    def predict(self, task: str) -> np.ndarray | None:
        """Return the last prompt's shares [layers, experts], or None before the first prompt."""
        return self._of_task.get(task, self._last) if self.same_task else self._last
