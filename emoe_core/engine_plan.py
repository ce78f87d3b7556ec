"""What an engine's options come to, before anything is loaded: slots, and what a quality target allows."""

from __future__ import annotations

from emoe_core.budget import SlotPlan, plan_given, plan_slots
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.config import EngineConfig
from emoe_core.planning.quality_target import QualityPlan, choose


def plan_engine(index: CheckpointIndex, config: EngineConfig) -> tuple[SlotPlan, QualityPlan | None]:
    """Return the slots that options come to, and what their quality target, if any, allows.

    Raises
    ------
    BudgetError, ProfileError, OptionError
        As `load`.
    """
    profile, target = config.profile, config.max_quality_loss
    if profile is not None:
        profile.require_model(index.source_hash)
    budget = "100%" if config.budget is None and target is None else config.budget
    given = None if budget is None else plan_slots(index, budget)
    if profile is None or target is None:
        assert given is not None
        return given, None
    experts = [layer.num_experts for layer in index.layers]
    quality = choose(profile, target, experts, index.top_k, None if given is None else given.slots_per_layer)
    return given or plan_given(index, quality.slots_per_layer, f"a quality loss of at most {target:.2%}"), quality
