"""Expert predictors: routing history in, per-layer expert frequencies out (paper, section 3.2).

A predictor never sees text, only how often each expert was chosen by past prompts and their task types. Adding one
is a class that satisfies `Predictor` and an entry in `PREDICTORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..errors import OptionError
from .frequency import FrequencyPredictor
from .random_subset import RandomPredictor


class Predictor(Protocol):
    """What the control loop asks of a predictor. Arrays are float64 [layers, experts]."""

    name: str

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request: how many of its tokens *chose* each expert, per layer."""

    def predict(self, task: str) -> np.ndarray | None:
        """Return expected shares of a task's tokens per expert (rows sum to 1), or None without any history."""


PREDICTORS: dict[str, Callable[[int, int, int], Predictor]] = {
    "frequency": lambda layers, experts, seed: FrequencyPredictor(layers, experts),
    "random": lambda layers, experts, seed: RandomPredictor(layers, experts, seed),
}


def make_predictor(name: str | None, layers: int, experts: int, seed: int = 0) -> Predictor | None:
    """Return a predictor by name; None or "none" means on demand only. OptionError names the known ones."""
    if name is None or name == "none":
        return None
    if name not in PREDICTORS:
        known = ", ".join(sorted([*PREDICTORS, "none"]))
        raise OptionError(f"unknown predictor {name!r}: choose one of {known}")
    return PREDICTORS[name](layers, experts, seed)


__all__ = ["PREDICTORS", "FrequencyPredictor", "Predictor", "RandomPredictor", "make_predictor"]
