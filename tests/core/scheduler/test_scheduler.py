"""Promises of the schedulers: who goes first, which promises are kept, and that nobody starves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_bench import make_costs, make_request

from emoe_core.errors import OptionError
from emoe_core.scheduler import (
    BatchLimits,
    Objective,
    RequestTooLargeError,
    ServiceRequest,
    Situation,
    WaitingQueue,
)
from emoe_core.scheduler.latency import DecodeForecast
from workbench.serving.orders import SCHEDULERS, make_scheduler
from workbench.serving.printed_latency import expected_latency_s

ROOMY = BatchLimits(8, 10**6)


def choose(
    name: str,
    waiting: list[ServiceRequest],
    running: list[ServiceRequest] | None = None,
    *,
    now_s: float = 0.0,
    limits: BatchLimits = ROOMY,
    loading_s: Callable[[str], float] = lambda task: 0.0,
    max_bypassed: int = 100,
    **costs: object,
) -> list[int]:
    """Return the numbers that a scheduler admits."""
    queue = WaitingQueue()
    for request in waiting:
        queue.add(request)
    scheduler = make_scheduler(name, make_costs(**costs), max_bypassed)  # type: ignore[arg-type]
    return [one.number for one in scheduler.choose(Situation(now_s, queue, running or [], limits, loading_s))]


def running(number: int, *, generated: int, expected: float, first_s: float, objective: Objective) -> ServiceRequest:
    request = make_request(number, expected=expected, objective=objective)
    request.generated, request.first_token_s = generated, first_s
    return request


def test_first_come_first_served_lets_nobody_past_one_that_does_not_fit() -> None:
    waiting = [make_request(0, inputs=2), make_request(1, inputs=90), make_request(2, inputs=2)]
    assert choose("fcfs", waiting, limits=BatchLimits(8, 100)) == [0]
    assert choose("edf", waiting, limits=BatchLimits(8, 100)) == [0, 2]


def test_earliest_due_goes_first() -> None:
    waiting = [make_request(n, objective=Objective(due, 1.0)) for n, due in enumerate((5.0, 3.0, 4.0))]
    assert choose("edf", waiting, limits=BatchLimits(2, 1000)) == [1, 2]


def test_shortest_counts_the_prompt_and_the_expected_answer() -> None:
    waiting = [make_request(0, inputs=5, expected=5.0), make_request(1, inputs=2, expected=9.0), make_request(2)]
    assert choose("shortest", waiting) == [2, 0, 1]
    assert choose("shortest", waiting, prefill_token_s=4.0) == [2, 1, 0]


def test_affine_serves_resident_tasks_first_and_tasks_together() -> None:
    waiting = [make_request(n, task=task) for n, task in enumerate(("code", "qa", "code", "qa"))]
    assert choose("affine", waiting, loading_s={"qa": 0.0, "code": 3.0}.__getitem__) == [1, 3, 0, 2]
    with_code = [make_request(9, task="code")]
    assert choose("affine", waiting, with_code, loading_s={"qa": 2.0, "code": 3.0}.__getitem__) == [0, 2, 1, 3]


class TestAlgorithm1:
    def test_it_admits_by_due_time_while_promises_hold(self) -> None:
        # Prompts of 2 s each: the first token of the third would come at 6 s.
        waiting = [make_request(n, inputs=2, objective=Objective(due, 9.0)) for n, due in enumerate((5.0, 4.0, 4.5))]
        assert choose("emoe", waiting) == [1, 2]

    def test_a_running_request_keeps_its_promise(self) -> None:
        # Four tokens to come at 1 s; allowed 8 s for them, so 4 s may be lost to a newcomer's prompt.
        bound = [running(9, generated=1, expected=5.0, first_s=0.0, objective=Objective(9.0, 2.0))]
        waiting = [make_request(0, inputs=5), make_request(1, inputs=4)]
        assert choose("emoe", waiting, bound) == [1]

    def test_a_running_request_that_is_late_anyway_protects_nothing(self) -> None:
        late = [running(9, generated=1, expected=5.0, first_s=0.0, objective=Objective(9.0, 0.5))]
        assert choose("emoe", [make_request(0, inputs=50)], late) == [0]

    def test_loading_counts_unless_ablated(self) -> None:
        bound = [running(9, generated=1, expected=5.0, first_s=0.0, objective=Objective(9.0, 2.0))]
        waiting = [make_request(0, inputs=2)]
        slow = {"qa": 3.0}.__getitem__
        assert choose("emoe", waiting, bound, loading_s=slow) == []
        assert choose("emoe_no_loading", waiting, bound, loading_s=slow) == [0]

    def test_the_requests_own_time_per_token_is_checked(self) -> None:
        # Beside another, a step takes 3 s; the newcomer was promised 2 s.
        patient = [running(9, generated=1, expected=9.0, first_s=0.0, objective=Objective(9.0, 99.0))]
        strict = [make_request(0, expected=3.0, objective=Objective(9.0, 2.0))]
        assert choose("emoe", strict, patient, steps={1: 1.0, 2: 3.0}) == []
        assert choose("emoe", strict, patient, steps={1: 1.0, 2: 1.5}) == [0]

    def test_those_too_late_come_after_those_in_time_in_order_of_arrival(self) -> None:
        objectives = (Objective(1.0, 9.0), Objective(0.5, 9.0), Objective(99.0, 9.0))
        waiting = [make_request(n, objective=objective) for n, objective in enumerate(objectives)]
        assert choose("emoe", waiting, now_s=5.0) == [2, 0, 1]

    def test_an_empty_batch_admits_somebody_whatever_the_estimate(self) -> None:
        hopeless = [make_request(0, inputs=50, objective=Objective(1.0, 0.1))]
        assert choose("emoe", hopeless) == [0]


def test_the_one_bypassed_often_enough_is_next_and_blocks_the_rest() -> None:
    long, quick = make_request(0, inputs=50), [make_request(number) for number in range(1, 6)]
    tight = BatchLimits(8, 100)
    assert choose("shortest", [long, *quick], limits=BatchLimits(8, 1000), max_bypassed=3) == [1, 2, 3, 0, 4, 5]
    holder = [make_request(9, inputs=60)]
    assert choose("shortest", [long, *quick], holder, limits=tight, max_bypassed=2) == [1, 2]
    assert choose("emoe", [long, *quick], holder, limits=tight, max_bypassed=0) == []


REQUESTS = st.lists(
    st.tuples(
        st.floats(0.0, 4.0),  # gap before it
        st.integers(1, 20),  # input tokens
        st.integers(1, 12),  # true output
        st.sampled_from(["qa", "code"]),
        st.floats(0.5, 60.0),  # promised TTFT
        st.floats(0.5, 6.0),  # promised TPOT
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("name", SCHEDULERS)
@given(drawn=REQUESTS, max_bypassed=st.integers(0, 6), max_requests=st.integers(1, 4))
@settings(max_examples=25)
def test_nobody_is_bypassed_more_often_than_allowed_and_all_are_served(
    name: str, drawn: list[tuple[float, int, int, str, float, float]], max_bypassed: int, max_requests: int
) -> None:
    scheduler = make_scheduler(name, make_costs(steps={1: 1.0, 4: 2.0}), max_bypassed)
    limits = BatchLimits(max_requests, 40)
    coming, now = [], 0.0
    for number, (gap, inputs, output, task, ttft_s, tpot_s) in enumerate(drawn):
        now += gap
        request = make_request(
            number, now, task=task, inputs=inputs, expected=4.0, limit=12, objective=Objective(ttft_s, tpot_s)
        )
        coming.append((request, output))
    truth = {request.number: output for request, output in coming}
    bypassed = dict.fromkeys(truth, 0)
    queue, batch, clock, served = WaitingQueue(), [], 0.0, []
    while coming or len(queue) or batch:
        if not len(queue) and not batch:
            clock = max(clock, coming[0][0].arrival_s)
        while coming and coming[0][0].arrival_s <= clock:
            queue.add(coming.pop(0)[0])
        chosen = scheduler.choose(Situation(clock, queue, batch, limits, lambda task: 1.5))
        assert len({one.number for one in chosen}) == len(chosen)
        assert chosen or batch, "idle though somebody waits"
        for request in chosen:
            for other in queue:
                bypassed[other.number] += other.place < request.place
            queue.take([request])
            clock += request.input_tokens
            request.first_token_s, request.generated = clock, 1
            batch.append(request)
        assert len(batch) <= max_requests and sum(one.reserved_tokens for one in batch) <= 40
        assert max(bypassed.values()) <= max_bypassed
        served += [one.number for one in batch if one.generated >= truth[one.number]]
        batch = [one for one in batch if one.generated < truth[one.number]]
        clock += 1.0
        for one in batch:
            one.generated += 1
    assert sorted(served) == sorted(truth)


class TestLatency:
    @given(
        remaining=st.lists(st.integers(1, 30), min_size=1, max_size=8),
        new=st.integers(1, 30),
        slope=st.floats(0.0, 2.0),
    )
    def test_the_forecast_is_what_stepping_through_gives(self, remaining: list[int], new: int, slope: float) -> None:
        step_s = 1.0 + slope * np.arange(12)
        step_s[0] = 0.0

        def ends(lengths: list[int]) -> list[float]:
            clock, found, left = 0.0, [0.0] * len(lengths), list(lengths)
            while any(left):
                clock += step_s[sum(count > 0 for count in left)]
                left = [max(0, count - 1) for count in left]
                found = [end or (clock if not count else 0.0) for end, count in zip(found, left, strict=True)]
            return found

        forecast = DecodeForecast(np.array(remaining, dtype=float), step_s)
        assert forecast.alone_s(np.array(remaining)) == pytest.approx(ends(remaining))
        joined = ends([*remaining, new])
        assert float(forecast.joined_s(np.array(new))) == pytest.approx(joined[-1])
        latency = expected_latency_s(
            np.zeros(len(remaining)),
            np.array(remaining, dtype=float),
            step_s,
            loading_s=0.0,
            prefill_s=0.0,
            new_output_tokens=new,
        )
        assert latency == pytest.approx(joined[:-1])

    def test_it_is_the_papers_equation_where_all_others_finish_later(self) -> None:
        cost, loading, prompt = 0.3, 2.0, 7
        step_s = cost * np.arange(6)
        found = expected_latency_s(
            np.array([5.0]),
            np.array([4.0]),
            step_s,
            loading_s=loading,
            prefill_s=prompt * cost,
            new_output_tokens=50.0,
        )
        assert found == pytest.approx([loading + (prompt + 2 * 4) * cost + 5.0])

    def test_the_expected_rest_starts_again_at_five_percent(self) -> None:
        request = make_request(0, expected=40.0)
        seen = []
        for request.generated in (0, 39, 40, 41, 42, 45):
            seen.append(request.remaining_tokens)
        assert seen == [40, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_scheduler("lottery", make_costs()), "choose one of fcfs"),
        (lambda: make_scheduler("edf", make_costs(), -1), "give 0"),
        (lambda: BatchLimits(0, 10), "at least 1 request"),
        (lambda: Objective(0.0, 1.0), "more than 0 seconds"),
        (lambda: make_request(0, inputs=0), "at least one input token"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_a_request_that_never_fits_is_refused_by_name() -> None:
    with pytest.raises(RequestTooLargeError, match="request 7 may need 58 tokens"):
        BatchLimits(4, 57).require_fit(make_request(7, inputs=50))
