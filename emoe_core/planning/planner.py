"""Which experts each layer should hold (paper, section 3.4, Eq. 2).

For MoE layer l, task type T and expert i, the expected number of tokens routed to i is

    N_i = (sum over running requests j of task T of W_j  +  n_T * W_o) * s * f_i

with W_j the input tokens of request j, n_T the number of running requests of the task, W_o the task's expected output
tokens, s in {0, 1} the sensitivity of (T, l), and f_i the predicted frequency. N is summed over tasks and the top L
experts of the layer are kept, L being the layer's slots. A layer without demand keeps its residents.

The planner decides; it does not load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emoe_core.scheduler.requests import Request

DEFAULT_OUTPUT_TOKENS = 64.0


@dataclass(frozen=True)
class Plan:
    """Experts to hold, per layer in descending demand; an empty tuple keeps the layer as it is."""

    experts: tuple[tuple[int, ...], ...]
    demand: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether no layer has any demand."""
        return not any(self.experts)


def expected_tokens(
    running: Sequence[Request],
    frequencies: Mapping[str, np.ndarray],
    sensitive: Callable[[str, int], bool],
    output_tokens: Callable[[str], float],
) -> np.ndarray:
    """Return Eq. 2 summed over tasks: expected tokens [layers, experts].

    Parameters
    ----------
    running : sequence of Request
        Requests that run until the next plan.
    frequencies : mapping
        Predicted shares f [layers, experts] per task; tasks without a prediction add nothing.
    sensitive : callable
        s(task, layer).
    output_tokens : callable
        W_o(task).
    """
    if not frequencies:
        return np.zeros((0, 0))
    shape = next(iter(frequencies.values())).shape
    demand = np.zeros(shape)
    for task, shares in frequencies.items():
        inputs = [request.input_tokens for request in running if request.task == task]
        if not inputs:
            continue
        tokens = sum(inputs) + len(inputs) * output_tokens(task)
        mask = np.array([sensitive(task, layer) for layer in range(shape[0])])[:, None]
        demand += tokens * mask * shares
    return demand


def make_plan(demand: np.ndarray, capacity: Sequence[int]) -> Plan:
    """Keep the top ``capacity[layer]`` experts by demand; ties go to the lower expert id.

    Experts without any demand are never asked for: their slots keep whoever is resident.
    """
    if not demand.size:
        return Plan(((),) * len(capacity), demand)
    chosen = []
    for row, slots in zip(demand, capacity, strict=True):
        ranked = np.argsort(-row, kind="stable")[:slots]
        chosen.append(tuple(int(expert) for expert in ranked if row[expert] > 0))
    return Plan(tuple(chosen), demand)
