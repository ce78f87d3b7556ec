"""Predictors that the engine's own are compared with, by name, and the training of the engine's transformer.

``frequency`` and ``recent`` are the engine's; ``last_prompt`` (of the task) and ``last_in_stream`` have the shortest
memory; ``transition`` is a Markov chain, ``activation_map`` looks for the most similar past prompts; ``random`` is the
sanity bound. The oracle is not here: it must be told the prompts to come (`bounds.py`).
"""

from __future__ import annotations

from emoe_core.predictor import FREQUENCY, HALF_LIVES, RECENT, PredictorFactory
from emoe_core.predictor.frequency import FrequencyPredictor
from workbench.predictors.activation_map import ActivationMapPredictor
from workbench.predictors.bounds import RandomPredictor
from workbench.predictors.last_prompt import LastPromptPredictor
from workbench.predictors.transition import TransitionPredictor

# Called with MoE layers, experts of the largest layer, and a seed.
PREDICTORS: dict[str, PredictorFactory] = {
    "activation_map": lambda layers, experts, seed: ActivationMapPredictor(),
    FREQUENCY: lambda layers, experts, seed: FrequencyPredictor(layers, experts),
    "last_in_stream": lambda layers, experts, seed: LastPromptPredictor(same_task=False),
    "last_prompt": lambda layers, experts, seed: LastPromptPredictor(),
    "random": RandomPredictor,
    RECENT: lambda layers, experts, seed: FrequencyPredictor(layers, experts, HALF_LIVES[RECENT], RECENT),
    "transition": lambda layers, experts, seed: TransitionPredictor(layers, experts),
}
