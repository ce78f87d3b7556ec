"""Which experts a simulated engine holds: the plan of Eq. 2 for whoever runs, and what each swap loads.

The rules are the engine's own (`emoe_core.planning.control`, `emoe_core.planning.planner`), over whole arrays because a
simulation plans thousands of times; a test holds the two together. Predicted frequencies are each task's mean shares
and do not change: what is simulated is who gets the slots, not how well they were predicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.planning.control import REPLANS
from emoe_core.scheduler import Request


class Residents:
    """The experts in slots.

    Parameters
    ----------
    shares : mapping of str to array
        Predicted shares f of each task, [layers, experts].
    capacity : sequence of int, length = layers
        Slots of each layer.
    output_tokens : mapping of str to float
        W_o of each task.
    interval : int
        p: a prediction is due before every p-th admitted request.
    replan : str
        "admission": a plan for those who run, whenever requests are admitted. "interval": one for the mix of the last p
        requests, only when a prediction is due.

    Attributes
    ----------
    held : np.ndarray
        Bool [layers, experts].
    admitted, predictions, swaps, loads : int
        Counts since the start.
    """

    def __init__(
        self,
        shares: Mapping[str, Sequence[Sequence[float]] | np.ndarray],
        capacity: Sequence[int],
        output_tokens: Mapping[str, float],
        interval: int = 40,
        replan: str = "admission",
    ) -> None:
        if replan not in REPLANS or interval < 1:
            raise OptionError("replan is 'admission' or 'interval', and the interval 1 request or more")
        self._tasks = {task: place for place, task in enumerate(sorted(shares))}
        self._shares = np.array([shares[task] for task in sorted(shares)], dtype=float)
        self._expected = np.array([output_tokens[task] for task in sorted(shares)], dtype=float)
        self._slots = np.array(capacity)[:, None]
        self._interval = interval
        self._replan = replan
        self._recent: deque[Request] = deque(maxlen=interval)
        self.held = np.zeros(self._shares.shape[1:], dtype=bool)
        self.admitted = self.predictions = self.swaps = self.loads = 0

    def admit(self, new: Sequence[Request], running: Sequence[Request]) -> tuple[int, int]:
        """Admit requests beside those that run; return (experts loaded, predictions made: 0 or 1)."""
        due = any((self.admitted + place) % self._interval == 0 for place in range(len(new)))
        self.admitted += len(new)
        self._recent.extend(new)
        self.predictions += due
        loads = 0
        if due or self._replan == "admission":
            whom = list(self._recent) if self._replan == "interval" else [*running, *new]
            target = self._target(self._weights(whom))
            loads = int((target & ~self.held).sum())
            if loads:
                self.swaps += 1
                self.loads += loads
                self.held = target
        return loads, int(due)

    def loads_for(self, task: str, input_tokens: float, running: Sequence[Request]) -> int:
        """Return how many experts would be loaded if a request of a task were admitted now (dE of Eq. 3)."""
        new = Request(task, round(input_tokens))
        if self._replan == "admission":
            whom = [*running, new]
        elif self.admitted % self._interval == 0:
            whom = [*list(self._recent)[-(self._interval - 1) :], new] if self._interval > 1 else [new]
        else:
            return 0
        return int((self._target(self._weights(whom)) & ~self.held).sum())

    def missing_for(self, task: str) -> int:
        """Return how many experts of a task's own best set are absent: how badly the residents fit it."""
        weights = np.zeros(len(self._tasks))
        weights[self._tasks[task]] = 1.0
        return int((self._target(weights) & ~self.held).sum())

    def mass(self, task: str) -> float:
        """Return the share of a task's routed choices that the residents cover, mean over layers, in [0, 1]."""
        shares = self._shares[self._tasks[task]]
        return float((shares * self.held).sum(axis=1).mean())

    def _weights(self, requests: Sequence[Request]) -> np.ndarray:
        """Return Eq. 2's tokens of each task: inputs, and expected outputs."""
        weights = np.zeros(len(self._tasks))
        for request in requests:
            place = self._tasks[request.task]
            weights[place] += request.input_tokens + self._expected[place]
        return weights

    def _target(self, weights: np.ndarray) -> np.ndarray:
        """Return who is held after a swap: the top of the demand; free slots keep residents. Ties: the lower id."""
        demand = np.tensordot(weights, self._shares, axes=1)
        # Without demand, a resident goes before one who is absent, who is not asked for at all.
        order = np.argsort(np.where(demand > 0, -demand, np.where(self.held, 1.0, 2.0)), axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        return np.asarray((rank < self._slots) & ((demand > 0) | self.held))
