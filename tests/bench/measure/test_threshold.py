"""Searching a threshold: every monotone question, every cap, never the same number twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_core.errors import OptionError
from workbench.measure.threshold import largest_that_holds, most_questions, smallest_that_holds

NUMBERS = st.integers(1, 5000)


@given(threshold=st.integers(0, 6000), start=NUMBERS, cap=NUMBERS)
def test_the_largest_that_holds_is_found_exactly(threshold: int, start: int, cap: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= threshold

    assert largest_that_holds(holds, start, cap) == min(threshold, cap)
    assert len(set(asked)) == len(asked) <= most_questions(start, cap)
    assert all(1 <= number <= cap for number in asked)


@given(threshold=st.integers(0, 6000), start=NUMBERS, cap=NUMBERS, resolution=st.sampled_from([0.02, 0.1, 0.5]))
def test_a_resolution_bounds_what_is_missed(threshold: int, start: int, cap: int, resolution: float) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= threshold

    found, truth = largest_that_holds(holds, start, cap, resolution), min(threshold, cap)
    assert found == 0 or found in asked
    assert found <= truth <= found + max(1, resolution * found)


@given(threshold=st.integers(0, 6000), start=NUMBERS, step=st.integers(1, 300), cap=NUMBERS)
def test_the_smallest_multiple_that_holds_is_found(threshold: int, start: int, step: int, cap: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number >= threshold

    expected = next((number for number in range(step, cap + 1, step) if number >= threshold), None)
    assert smallest_that_holds(holds, start, step, cap) == expected
    assert len(set(asked)) == len(asked) and all(number % step == 0 and number <= cap for number in asked)


@pytest.mark.parametrize(("start", "cap", "resolution"), [(0, 5, 0.0), (1, 0, 0.0), (1, 5, 1.0)])
def test_a_search_without_room_is_refused(start: int, cap: int, resolution: float) -> None:
    with pytest.raises(OptionError):
        largest_that_holds(lambda number: True, start, cap, resolution)
