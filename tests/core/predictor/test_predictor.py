"""Promises of the engine's predictor: what it remembers, its fallback, and how another takes its place."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.errors import OptionError
from emoe_core.predictor import make_predictor
from emoe_core.predictor.frequency import FrequencyPredictor


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


def test_the_recent_one_follows_a_change_behind_a_label_that_the_default_has_hardly_noticed() -> None:
    before, after = np.array([[8.0, 0.0]]), np.array([[0.0, 8.0]])
    found = {}
    for name in ("frequency", "recent"):
        predictor = make_predictor(name, 1, 2)
        for counts in [before] * 20 + [after] * 3:
            predictor.observe("qa", counts)
        found[name] = predictor.predict("qa").argmax()
    assert found == {"frequency": 0, "recent": 1}


def test_predictors_by_name() -> None:
    assert make_predictor(None, 1, 2) is None
    assert make_predictor("none", 1, 2) is None
    with pytest.raises(OptionError, match="frequency, recent, none, transformer, or give a function"):
        make_predictor("oracle", 1, 2)
    with pytest.raises(OptionError, match="half_life"):
        FrequencyPredictor(1, 2, half_life=0)
