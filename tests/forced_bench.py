"""Tokens, specs and preparations of a bench of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emoe_core.budget import plan_slots
from emoe_core.checkpoint.index import open_checkpoint
from workbench.bench import prepare as preparation
from workbench.bench.bandwidth import Bandwidths
from workbench.bench.forced_tokens import ForcedTokens
from workbench.bench.plan import BenchPlan
from workbench.bench.prepare import Prepared
from workbench.bench.routing_pass import RoutingPass

FORCED = ForcedTokens((1, 2, 3), (4, 5), (6, 7, 8), (9, 10, 11, 12), "a test")


def spec_of(checkpoint: Path, adapter: str = "emoe", **options: Any) -> dict[str, Any]:
    plan = BenchPlan(str(checkpoint), systems=("emoe",), tokens=4, prompt_tokens=3, warm_tokens=2)
    return preparation.common_spec(plan, str(checkpoint), FORCED) | {
        "adapter": adapter,
        "options": options,
        "scratch": str(checkpoint.parent),
    }


def prepared_for(checkpoint: Path, routed: RoutingPass) -> Prepared:
    index = open_checkpoint(checkpoint)
    facts = {
        "record_bytes": max(layer.record_bytes for layer in index.layers),
        "token_dense_bytes": 1000,
        "tokens_from": "a test",
        "routing_agreement": None,
        "limit_by": None,
        "budget_terms": None,
        "expert_budget": "50%",
        "accelerate_bytes": 1,
    }
    rates = Bandwidths(1e9, True, 4096, 1e10)
    trace = routed.path
    return Prepared(index, plan_slots(index, "50%"), FORCED, routed, rates, trace, None, (), facts)
