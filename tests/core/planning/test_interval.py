"""Promises of the prediction intervals: when a prediction is due, and how coverage is measured."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.errors import OptionError
from emoe_core.planning.interval import AdaptiveInterval, FixedInterval, coverage, make_interval
from emoe_core.planning.planner import Plan


def test_a_fixed_interval_is_due_at_multiples_of_p_whatever_is_covered() -> None:
    interval = FixedInterval(3)
    due = []
    for number in range(7):
        due.append(interval.due(number))
        interval.served(0.0)
    assert due == [True, False, False, True, False, False, True]


def test_an_adaptive_interval_is_due_until_a_plan_was_in_force() -> None:
    interval = AdaptiveInterval(0.9, span=2)
    assert interval.due(0) and interval.due(1)
    interval.served(1.0)
    assert not interval.due(2)


def test_an_adaptive_interval_is_due_when_mean_coverage_falls_below_the_threshold() -> None:
    interval = AdaptiveInterval(0.9, span=3)
    interval.served(1.0)
    for value in (1.0, 0.5):
        assert not interval.due(0)
        interval.served(value)
    assert interval.due(3), "a mean of 0.83 is below 0.9"
    interval.served(1.0)
    assert interval.due(4)
    interval.served(1.0)
    assert interval.due(5)
    interval.served(1.0)
    assert not interval.due(6), "the bad request has left the window"


def test_a_prediction_starts_a_new_mean() -> None:
    interval = AdaptiveInterval(0.9, span=2)
    for _ in range(2):
        interval.served(0.1)
    assert interval.due(2)
    interval.predicted()
    interval.served(0.1)
    assert not interval.due(3), "one request since the prediction is too few to judge it"
    interval.served(0.1)
    assert interval.due(4)


def test_coverage_is_relative_to_the_best_sets_of_the_same_sizes() -> None:
    counts = np.array([[6.0, 3.0, 1.0], [0.0, 5.0, 5.0], [1.0, 8.0, 1.0]])
    assert coverage(Plan(((0, 1), (1, 2), (1,)), counts), counts) == 1.0
    assert coverage(Plan(((2,), (1,), ()), counts), counts) == pytest.approx((1 + 5) / (6 + 5))
    assert coverage(Plan(((), (), ()), counts), counts) is None
    assert coverage(Plan(((0,), (1,), (2,)), counts), np.zeros((3, 3))) is None


def test_intervals_by_option() -> None:
    assert make_interval(8).span == 8
    assert isinstance(make_interval("adaptive", 0.8), AdaptiveInterval)
    for value in (0, -1, 2.5, True, "often"):
        with pytest.raises(OptionError, match="interval is"):
            make_interval(value)
    for threshold in (0.0, 1.5):
        with pytest.raises(OptionError, match="min_coverage"):
            make_interval("adaptive", threshold)
    with pytest.raises(OptionError, match="averages over"):
        AdaptiveInterval(0.9, span=0)
