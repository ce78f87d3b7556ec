"""Expert predictors: routing history in, per-layer expert frequencies out (paper, section 3.2).

A predictor never sees text, only how often each expert was chosen by past prompts and their task types. Adding one
is a class that satisfies `Predictor` and an entry in `PREDICTORS`. The trained one is a file (`transformer.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from emoe_core.errors import OptionError, PredictorError
from emoe_core.predictor.activation_map import ActivationMapPredictor
from emoe_core.predictor.frequency import FrequencyPredictor
from emoe_core.predictor.last_prompt import LastPromptPredictor
from emoe_core.predictor.oracle import OraclePredictor
from emoe_core.predictor.random_subset import RandomPredictor
from emoe_core.predictor.transition import TransitionPredictor


class Predictor(Protocol):
    """What the control loop asks of a predictor. Arrays are float64 [layers, experts]."""

    name: str

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request: how many of its tokens *chose* each expert, per layer."""

    def predict(self, task: str) -> np.ndarray | None:
        """Return expected shares of a task's tokens per expert (rows sum to 1), or None without any history."""


PREDICTORS: dict[str, Callable[[int, int, int], Predictor]] = {
    "activation_map": lambda layers, experts, seed: ActivationMapPredictor(),
    "frequency": lambda layers, experts, seed: FrequencyPredictor(layers, experts),
    "last_in_stream": lambda layers, experts, seed: LastPromptPredictor(same_task=False),
    "last_prompt": lambda layers, experts, seed: LastPromptPredictor(),
    "random": lambda layers, experts, seed: RandomPredictor(layers, experts, seed),
    "transition": lambda layers, experts, seed: TransitionPredictor(layers, experts),
}
TRAINED = "transformer"


def make_predictor(
    name: str | None,
    layers: int,
    experts: int,
    seed: int = 0,
    path: Path | None = None,
    model_hash: str | None = None,
) -> Predictor | None:
    """Return a predictor by name; None or "none" means on demand only.

    Parameters
    ----------
    name : str or None
        A name of `PREDICTORS`, or "transformer".
    layers, experts : int
        MoE layers, and experts of the largest layer.
    seed : int
        Of the random predictor.
    path : Path or None
        File of the trained predictor.
    model_hash : str or None
        Content hash of the model that it must have been trained for.

    Raises
    ------
    OptionError
        For an unknown name; the message lists the known ones.
    PredictorError
        When the trained predictor is missing, damaged or another model's.
    """
    if name is None or name == "none":
        return None
    if name == TRAINED:
        if path is None:
            raise PredictorError(
                f"predictor {TRAINED!r} needs predictor_path: train one with `emoe predictor train MODEL`"
            )
        from emoe_core.predictor.transformer import TransformerPredictor

        return TransformerPredictor.load(path, model_hash)
    if name not in PREDICTORS:
        known = ", ".join(sorted([*PREDICTORS, TRAINED, "none"]))
        raise OptionError(f"unknown predictor {name!r}: choose one of {known}")
    return PREDICTORS[name](layers, experts, seed)


__all__ = [
    "PREDICTORS",
    "TRAINED",
    "ActivationMapPredictor",
    "FrequencyPredictor",
    "LastPromptPredictor",
    "OraclePredictor",
    "Predictor",
    "RandomPredictor",
    "TransitionPredictor",
    "make_predictor",
]
