"""Expert predictors: routing history in, per-layer expert frequencies out (paper, section 3.2).

A predictor never sees text, only how often each expert was chosen by past prompts and their task types. Three are
known by name: ``frequency``; ``recent``, the same with a short memory, for requests that drift while their label stays;
and ``transformer``, which is trained for a model and rests in a file (`transformer.py`). Any other is a class that
satisfies `Predictor`, given to the engine by a function that makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from emoe_core.errors import OptionError, PredictorError
from emoe_core.predictor.frequency import FrequencyPredictor

FREQUENCY, RECENT, TRAINED, NO_PREDICTOR = "frequency", "recent", "transformer", "none"
# Prompts of a task that the predictors of past use remember, by name; the short memory was chosen by replay of `native`
# on a stream whose languages change (docs/results/predictors.md).
HALF_LIVES = {FREQUENCY: 20.0, RECENT: 2.0}


class Predictor(Protocol):
    """What the control loop asks of a predictor. Arrays are float64 [layers, experts]."""

    name: str

    def observe(self, task: str, counts: np.ndarray) -> None:
        """Learn from one finished request: how many of its tokens *chose* each expert, per layer."""

    def predict(self, task: str) -> np.ndarray | None:
        """Return expected shares of a task's tokens per expert (rows sum to 1), or None without any history."""


# Makes a predictor without history for a number of MoE layers, of experts of the largest layer, and a seed.
PredictorFactory = Callable[[int, int, int], Predictor]


def make_predictor(
    wanted: str | PredictorFactory | None,
    layers: int,
    experts: int,
    seed: int = 0,
    path: Path | None = None,
    model_hash: str | None = None,
) -> Predictor | None:
    """Return a predictor without history; None or "none" means on demand only.

    Parameters
    ----------
    wanted : str, callable or None
        "frequency", "recent", "transformer", or what makes another.
    layers, experts : int
        MoE layers, and experts of the largest layer.
    seed : int
        For what draws at random.
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
    if wanted is None or wanted == NO_PREDICTOR:
        return None
    if callable(wanted):
        return wanted(layers, experts, seed)
    if wanted in HALF_LIVES:
        return FrequencyPredictor(layers, experts, HALF_LIVES[wanted], wanted)
    if wanted != TRAINED:
        known = ", ".join((*HALF_LIVES, NO_PREDICTOR, TRAINED))
        raise OptionError(f"unknown predictor {wanted!r}: choose one of {known}, or give a function that makes one")
    if path is None:
        raise PredictorError(f"predictor {TRAINED!r} needs predictor_path: train one with `emoe predictor train MODEL`")
    from emoe_core.predictor.transformer import TransformerPredictor

    return TransformerPredictor.load(path, model_hash)
