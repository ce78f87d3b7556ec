"""Promises of the predictors that the engine's are compared with: what each remembers, and the two bounds."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.errors import OptionError
from workbench.predictors import PREDICTORS
from workbench.predictors.activation_map import ActivationMapPredictor
from workbench.predictors.bounds import OraclePredictor, RandomPredictor
from workbench.predictors.last_prompt import LastPromptPredictor
from workbench.predictors.transition import TransitionPredictor


def counts(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=float)


def test_random_shares_follow_their_seed_only() -> None:
    first, second, other = (RandomPredictor(2, 5, seed) for seed in (1, 1, 2))
    first.observe("qa", np.ones((2, 5)))
    mine = first.predict("qa")
    np.testing.assert_array_equal(mine, second.predict("code"))
    assert not np.array_equal(mine, other.predict("qa"))
    np.testing.assert_allclose(mine.sum(axis=1), 1)
    assert not np.array_equal(mine, first.predict("qa")), "every call ranks anew"


def test_the_last_prompt_is_the_tasks_own_or_the_streams() -> None:
    for same_task, expected in ((True, [[1, 0]]), (False, [[0.25, 0.75]])):
        predictor = LastPromptPredictor(same_task)
        predictor.observe("qa", counts([0, 5]))
        predictor.observe("qa", counts([5, 0]))
        predictor.observe("code", counts([1, 3]))
        np.testing.assert_array_equal(predictor.predict("qa"), expected)
        np.testing.assert_array_equal(predictor.predict("comparison"), [[0.25, 0.75]])


def test_transitions_follow_the_layers_of_the_next_prompt() -> None:
    predictor = TransitionPredictor(2, 3)
    # Layer 0 goes round 0, 1, 2; layer 1 takes the expert after layer 0's.
    for first in (0, 1, 2, 0, 1, 2, 0):
        predictor.observe("qa", 4.0 * np.eye(3)[[first, (first + 1) % 3]])
    found = predictor.predict("qa")
    np.testing.assert_array_equal(found.argmax(axis=1), [1, 2])
    assert found.max(axis=1).min() > 0.99


def test_the_activation_map_returns_what_followed_the_most_similar_prompt() -> None:
    predictor = ActivationMapPredictor(neighbours=1)
    for row in ([9, 1, 0, 0], [0, 0, 1, 0], [0, 9, 1, 0], [0, 0, 0, 1], [8, 2, 0, 0]):
        predictor.observe("qa", counts(row))
    np.testing.assert_array_equal(predictor.predict("qa"), [[0, 0, 1, 0]])


def test_an_activation_map_without_a_successor_is_its_own_prediction() -> None:
    predictor = ActivationMapPredictor()
    predictor.observe("qa", counts([1, 3]))
    np.testing.assert_array_equal(predictor.predict("qa"), [[0.25, 0.75]])
    predictor.observe("code", counts([1, 0]))
    # Another task's prompt did not follow it.
    np.testing.assert_array_equal(predictor.predict("qa"), [[0.25, 0.75]])
    with pytest.raises(OptionError, match="neighbours"):
        ActivationMapPredictor(neighbours=0)


def test_the_oracle_tells_the_coming_prompts_of_a_task_within_its_window() -> None:
    future = [("qa", counts([1, 0])), ("code", counts([0, 1])), ("qa", counts([1, 1])), ("qa", counts([0, 1]))]
    oracle = OraclePredictor(future)
    np.testing.assert_array_equal(oracle.predict("qa"), [[1, 0]])
    # Beyond the window it is the task's next prompt.
    np.testing.assert_array_equal(oracle.predict("code"), [[0, 1]])
    oracle.observe(*future[0])
    np.testing.assert_array_equal(oracle.predict("qa"), [[0.5, 0.5]])
    np.testing.assert_array_equal(OraclePredictor(future, window=3).predict("qa"), [[0.75, 0.25]])
    for prompt in future[1:]:
        oracle.observe(*prompt)
    assert oracle.predict("qa") is None


@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_every_predictor_gives_shares_and_ignores_empty_requests(name: str) -> None:
    predictor = PREDICTORS[name](3, 5, 0)
    assert predictor.name == name
    predictor.observe("qa", np.zeros((3, 5)))
    assert name == "random" or predictor.predict("qa") is None
    generator = np.random.default_rng(0)
    for task in ("qa", "code", "qa", "code"):
        predictor.observe(task, generator.integers(0, 9, size=(3, 5)).astype(float))
    for task in ("qa", "comparison"):
        found = predictor.predict(task)
        assert found.shape == (3, 5) and found.min() >= 0
        np.testing.assert_allclose(found.sum(axis=1), 1)
