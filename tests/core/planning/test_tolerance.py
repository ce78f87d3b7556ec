"""Promise of the miss tolerance: whose word counts."""

from __future__ import annotations

from emoe_core.planning.quality_target import QualityPlan
from emoe_core.planning.tasks import Profile, TaskProfile
from emoe_core.planning.tolerance import MissTolerance

# Its layer 0 is insensitive, its layer 1 is not.
PROFILE = Profile("model", "data", 2, {"qa": TaskProfile("qa", (False, True), 8.0)})
# Its layer 0 must be exact, its layer 1 need not be.
QUALITY = QualityPlan(0.01, (4, 4), {"qa": frozenset({0})}, {"qa": 0.0})


def test_the_request_then_the_quality_target_then_the_profile_then_the_engine_decides() -> None:
    everybody = MissTolerance(0.25, PROFILE, QUALITY)
    assert everybody.of("qa", 0, own=0.5) == 0.5
    assert everybody.of("qa", 1, own=0.0) == 0.0, "0 is an answer"
    assert [everybody.of("qa", layer) for layer in (0, 1)] == [0.0, 1.0]
    assert [MissTolerance(0.25, PROFILE).of("qa", layer) for layer in (0, 1)] == [1.0, 0.25]
    assert MissTolerance(0.25).of("qa", 0) == 0.25


def test_a_task_that_was_not_profiled_gets_no_more_than_the_engine_gives() -> None:
    assert MissTolerance(0.25, PROFILE).of("unknown", 0) == 0.25
    assert MissTolerance(0.25, PROFILE, QUALITY).of("unknown", 1) == 0.0
