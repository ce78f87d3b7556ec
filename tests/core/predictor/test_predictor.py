"""Promises of the predictors: what each remembers, its fallback, and the two bounds."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.errors import OptionError
from emoe_core.predictor import (
    PREDICTORS,
    ActivationMapPredictor,
    FrequencyPredictor,
    LastPromptPredictor,
    OraclePredictor,
    RandomPredictor,
    TransitionPredictor,
    make_predictor,
)


def counts(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=float)


def test_shares_weigh_prompts_alike_however_long() -> None:
    predictor = FrequencyPredictor(1, 2, half_life=1e9)
    predictor.observe("qa", counts([1, 1]))
    predictor.observe("qa", counts([0, 1000]))
    np.testing.assert_allclose(predictor.predict("qa"), [[0.25, 0.75]], atol=1e-6)


def test_a_prompt_counts_half_after_its_half_life() -> None:
    predictor = FrequencyPredictor(1, 2, half_life=2)
    predictor.observe("qa", counts([4, 0]))
    predictor.observe("qa", counts([0, 4]))
    predictor.observe("qa", counts([0, 4]))
    old, newer = 0.5, 2**-0.5 + 1.0
    np.testing.assert_allclose(predictor.predict("qa"), [[old / (old + newer), newer / (old + newer)]])


def test_tasks_do_not_mix_and_a_new_task_falls_back_to_all() -> None:
    predictor = FrequencyPredictor(1, 2)
    assert predictor.predict("qa") is None
    predictor.observe("qa", counts([1, 0]))
    predictor.observe("code", counts([0, 1]))
    np.testing.assert_array_equal(predictor.predict("qa"), [[1, 0]])
    np.testing.assert_array_equal(predictor.predict("code"), [[0, 1]])
    assert predictor.predict("comparison")[0].min() > 0.4


def test_a_request_without_tokens_teaches_nothing() -> None:
    predictor = FrequencyPredictor(2, 3)
    predictor.observe("qa", np.zeros((2, 3)))
    assert predictor.predict("qa") is None


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
    predictor = make_predictor(name, 3, 5)
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


def test_predictors_by_name() -> None:
    assert make_predictor(None, 1, 2) is None
    assert make_predictor("none", 1, 2) is None
    with pytest.raises(OptionError, match=r"activation_map, frequency, .*none, random, transformer, transition"):
        make_predictor("oracle", 1, 2)
    with pytest.raises(OptionError, match="half_life"):
        FrequencyPredictor(1, 2, half_life=0)
