"""Equation 2 by hand, and what a plan keeps."""

from __future__ import annotations

import numpy as np
import pytest

from emoe_core.planning.planner import expected_tokens, make_plan
from emoe_core.scheduler import Request

SHARES = {
    "qa": np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.4, 0.4]]),
    "code": np.array([[0.0, 0.0, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]]),
}
RUNNING = [Request("qa", 10), Request("qa", 30), Request("code", 100)]


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


def test_no_demand_keeps_the_residents() -> None:
    nothing = make_plan(np.zeros((2, 4)), [2, 2])
    assert nothing.is_empty
    assert make_plan(expected_tokens(RUNNING, {}, always, lambda task: 5.0), [2, 2]).is_empty
    partly = make_plan(np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), [2, 2])
    assert partly.experts == ((1,), ())
    assert not partly.is_empty


@pytest.mark.parametrize("slots", [1, 2, 3, 40])
def test_ties_go_to_the_lower_expert(slots: int) -> None:
    # Many, because short rows are sorted stably by any kind of sort.
    tied = np.tile([1.0, 2.0], 64)[None]
    best = [*range(1, 128, 2), *range(0, 128, 2)]
    assert make_plan(tied, [slots]).experts == (tuple(best[:slots]),)


def test_a_task_that_does_not_run_hides_no_other() -> None:
    only_code = expected_tokens(RUNNING[2:], SHARES, always, lambda task: 20.0)
    np.testing.assert_allclose(only_code, 120 * SHARES["code"])


def test_without_any_prediction_there_is_no_demand_and_the_plan_says_so() -> None:
    nothing = expected_tokens(RUNNING, {}, always, lambda task: 5.0)
    assert nothing.shape == (0, 0)
    plan = make_plan(nothing, [2, 2])
    assert plan.experts == ((), ())
    assert plan.demand is nothing


def test_any_demand_above_nothing_counts() -> None:
    assert make_plan(np.array([[0.0, 0.25, 0.5]]), [3]).experts == ((2, 1),)


def test_a_demand_for_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        make_plan(np.ones((2, 4)), [1])


def test_a_plan_keeps_the_demand_it_was_made_from() -> None:
    demand = np.array([[0.0, 3.0, 4.0], [0.0, 0.0, 0.0]])
    plan = make_plan(demand, [2, 2])
    assert plan.demand is demand
