"""Find where a yes turns into a no, asking as seldom as possible: double, then halve.

The question is assumed to be monotone (what 8 allows, 7 allows too). Where the answers are noisy, as they are for
memory near a limit, the result is a number that was seen to hold beside one that was seen to fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from emoe_core.errors import OptionError


def largest_that_holds(holds: Callable[[int], bool], start: int, cap: int, resolution: float = 0.0) -> int:
    """Return the largest whole number from 1 to ``cap`` that holds, or 0 when none does.

    Parameters
    ----------
    holds : callable
        Never asked twice about a number.
    start : int
        Asked first (at most ``cap``); then its double, and so on.
    cap : int
        When it holds, it is the answer.
    resolution : float
        Stop when the answer is known to this share of itself; 0 finds it exactly.

    Raises
    ------
    OptionError
        When start or cap are below 1, or the resolution is not in [0, 1).
    """
    if start < 1 or cap < 1 or not 0 <= resolution < 1:
        raise OptionError(f"a search needs start and cap of at least 1, not {start}, {cap}; resolution {resolution}")
    good, bad, number = 0, cap + 1, min(start, cap)
    while good < cap and bad > cap:
        if holds(number):
            good, number = number, min(2 * number, cap)
        else:
            bad = number
    while bad - good > max(1, math.floor(resolution * good)) and good < cap:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def smallest_that_holds(holds: Callable[[int], bool], start: int, step: int, cap: int) -> int | None:
    """Return the smallest multiple of ``step`` up to ``cap`` that holds, or None when none does.

    Parameters
    ----------
    holds : callable
        Monotone the other way round: what holds for 8 holds for 9. Never asked twice about a number.
    start : int
        The first multiple at or above it is asked first, then its double, and so on.
    """
    if step < 1 or start < 1:
        raise OptionError(f"a search needs a start and a step of at least 1, not {start} and {step}")
    most = cap // step
    if most < 1:
        return None
    bad, number = 0, min(-(-start // step), most)
    while not holds(number * step):
        if number == most:
            return None
        bad, number = number, min(2 * number, most)
    good = number
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle * step) else (good, middle)
    return good * step


def most_questions(start: int, cap: int, resolution: float = 0.0) -> int:
    """Return how often `largest_that_holds` asks at most, for progress bars."""
    doublings = math.ceil(math.log2(max(cap / min(start, cap), 1))) + 1
    halvings = math.ceil(math.log2(max(cap, 2)))
    return doublings + (min(halvings, math.ceil(math.log2(1 / resolution)) + 1) if resolution else halvings)
