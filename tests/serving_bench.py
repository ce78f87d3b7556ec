"""Synthetic serving costs and requests, for tests whose schedules are worked out by hand."""

from __future__ import annotations

from emoe_core.scheduler import Objective, Request
from emoe_core.scheduler.costs import ServingCosts, TaskLoad

FOREVER = Objective(1e9, 1e9)


def make_costs(
    *,
    prefill_token_s: float = 1.0,
    prefill_fixed_s: float = 0.0,
    steps: dict[int, float] | None = None,
    expert_load_s: float = 0.0,
    swap_s: float = 0.0,
    prediction_s: float = 0.0,
    slots: int = 2,
    tasks: dict[str, TaskLoad] | None = None,
) -> ServingCosts:
    """Return costs in round numbers: a second a prompt token and a step unless told otherwise."""
    steps = steps or {1: 1.0, 2: 1.0}
    return ServingCosts(
        model_hash="0" * 64,
        prefill_token_s=prefill_token_s,
        prefill_fixed_s=prefill_fixed_s,
        decode_batches=tuple(steps),
        decode_step_s=tuple(steps.values()),
        expert_load_s=expert_load_s,
        swap_s=swap_s,
        prediction_s=prediction_s,
        slots_per_layer=(slots,),
        kv_token_bytes=1,
        tasks=two_tasks() if tasks is None else tasks,
    )


def two_tasks() -> dict[str, TaskLoad]:
    """Return two tasks of one layer and four experts that share no expert: qa uses 0 and 1, code uses 2 and 3."""
    return {
        "qa": TaskLoad((2, 4), (1, 3), 2.0, ((0.6, 0.4, 0.0, 0.0),)),
        "code": TaskLoad((3, 5), (2, 6), 4.0, ((0.0, 0.0, 0.7, 0.3),)),
    }


def make_request(
    number: int,
    arrival_s: float = 0.0,
    *,
    task: str = "qa",
    inputs: int = 1,
    expected: float = 2.0,
    limit: int = 8,
    objective: Objective = FOREVER,
) -> Request:
    """Return a request that promises nothing unless told otherwise."""
    return Request(task, inputs, number, arrival_s, limit, expected, objective)
