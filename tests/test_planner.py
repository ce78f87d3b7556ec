"""Equation 2 by hand, and what a plan keeps."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.planner import RunningRequest, expected_tokens, make_plan

SHARES = {
    "qa": np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.4, 0.4]]),
    "code": np.array([[0.0, 0.0, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]]),
}
RUNNING = [RunningRequest("qa", 10), RunningRequest("qa", 30), RunningRequest("code", 100)]


def always(task: str, layer: int) -> bool:
    return True


def test_equation_2_by_hand() -> None:
    lengths = {"qa": 5.0, "code": 20.0}
    demand = expected_tokens(RUNNING, SHARES, always, lengths.__getitem__)
    # qa: 10 + 30 + 2 * 5 = 50 tokens; code: 100 + 1 * 20 = 120 tokens.
    expected = [[25, 15, 10 + 60, 60], [5 + 120, 5, 20, 20]]
    np.testing.assert_allclose(demand, expected)
    assert make_plan(demand, [2, 3]).experts == ((2, 3), (0, 2, 3))


def test_insensitive_pairs_claim_no_memory() -> None:
    demand = expected_tokens(RUNNING, SHARES, lambda task, layer: (task, layer) != ("code", 0), lambda task: 0.0)
    np.testing.assert_allclose(demand[0], [20, 12, 8, 0])
    np.testing.assert_allclose(demand[1], [4 + 100, 4, 16, 16])


def test_a_task_without_running_requests_or_prediction_adds_nothing() -> None:
    only_qa = expected_tokens(RUNNING[:2], SHARES, always, lambda task: 5.0)
    np.testing.assert_allclose(only_qa, 50 * SHARES["qa"])
    unpredicted = expected_tokens(RUNNING, {"qa": SHARES["qa"]}, always, lambda task: 5.0)
    np.testing.assert_allclose(unpredicted, 50 * SHARES["qa"])


def test_a_request_with_shares_of_its_own_adds_its_expected_answer_by_them() -> None:
    own = np.array([[0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]])
    demand = expected_tokens([RUNNING[0], RunningRequest("qa", 30, own)], SHARES, always, lambda task: 5.0)
    np.testing.assert_allclose(demand, (10 + 5) * SHARES["qa"] + 5 * own)
    np.testing.assert_allclose(expected_tokens([RunningRequest("qa", 30, own)], {}, always, lambda task: 5.0), 5 * own)


def test_no_demand_keeps_the_residents() -> None:
    nothing = make_plan(np.zeros((2, 4)), [2, 2])
    assert nothing.is_empty
    assert make_plan(expected_tokens(RUNNING, {}, always, lambda task: 5.0), [2, 2]).is_empty
    partly = make_plan(np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), [2, 2])
    assert partly.experts == ((1,), ())
    assert not partly.is_empty


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_ties_go_to_the_lower_expert(slots: int) -> None:
    assert make_plan(np.ones((1, 5)), [slots]).experts == (tuple(range(slots)),)
