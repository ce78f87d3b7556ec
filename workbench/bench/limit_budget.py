"""How many bytes a memory limit leaves for experts.

    budget = limit - control - dense weights - KV cache - workspace - logits - reserve

*Control* is measured: the peak of the same process with a tiny model under the same limit, as the control group
charges it (libraries, interpreter, allocator). The reserve is a share of the limit, for what the terms do not name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from emoe_core.budget import plan_slots
from emoe_core.checkpoint.index import CheckpointIndex
from emoe_core.errors import BudgetError
from emoe_core.footprint import memory_breakdown
from workbench.machine.control_groups import Controller
from workbench.measure.decoding import measure_decoding
from workbench.measure.launch import MEASURED

RESERVE_SHARE = 0.04


@dataclass(frozen=True)
class LimitBudget:
    """The terms, in bytes; `expert_bytes` is what is left, at most all experts."""

    limit_bytes: int
    control_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    expert_bytes: int

    def to_dict(self) -> dict[str, int]:
        """Return the terms by name."""
        return asdict(self)


def limit_budget(index: CheckpointIndex, limit_bytes: int, control_bytes: int, max_tokens: int) -> LimitBudget:
    """Return what a limit leaves for experts.

    Raises
    ------
    BudgetError
        When that is less than the smallest exact budget; the message names the smallest limit that works.
    """
    least = plan_slots(index, "1 slot")
    terms = memory_breakdown(index, least, max_tokens)
    other = control_bytes + terms.dense_bytes + terms.kv_bytes + terms.workspace_bytes + terms.logits_bytes
    reserve = int(RESERVE_SHARE * limit_bytes)
    left = limit_bytes - other - reserve
    if left < least.slot_bytes:
        smallest = (other + least.slot_bytes) / (1 - RESERVE_SHARE)
        raise BudgetError(
            f"a limit of {limit_bytes:,} bytes leaves {max(left, 0):,} for experts after the process itself "
            f"({control_bytes:,}), dense weights ({terms.dense_bytes:,}) and activations; one slot a layer needs "
            f"{least.slot_bytes:,}. Give a limit of at least {-(-smallest // 10**7) / 100:.2f}GB, or shorter sequences."
        )
    return LimitBudget(
        limit_bytes,
        control_bytes,
        terms.dense_bytes,
        terms.kv_bytes,
        terms.workspace_bytes + terms.logits_bytes,
        reserve,
        min(left, index.expert_bytes_total),
    )


def require_possible(index: CheckpointIndex, limit_bytes: int, max_tokens: int) -> None:
    """Refuse at once, from the checkpoint's index alone, a limit that no process could keep.

    Raises
    ------
    BudgetError
        When dense weights, activations and one slot a layer exceed it, with nothing for the process itself.
    """
    least = plan_slots(index, "1 slot")
    terms = memory_breakdown(index, least, max_tokens)
    other = terms.kv_bytes + terms.workspace_bytes + terms.logits_bytes
    needed = terms.dense_bytes + other + least.slot_bytes
    if limit_bytes < needed:
        raise BudgetError(
            f"a limit of {limit_bytes:,} bytes is too small for any process: dense weights take {terms.dense_bytes:,}, "
            f"activations {other:,} and one slot a layer {least.slot_bytes:,}. Give more than "
            f"{-(-needed // 10**7) / 100:.2f}GB, since the process itself takes some hundred megabytes beside that."
        )


def control_bytes(spec: dict[str, Any], limit_bytes: int, controller: Controller) -> int:
    """Measure the control process; ``spec`` is that of an emoe system, its model is replaced by a tiny one.

    Raises
    ------
    BudgetError
        When not even the tiny model runs under the limit.
    """
    from workbench.models.reference.tiny import cached_tiny_moe

    tiny = {**spec, "checkpoint": str(cached_tiny_moe()), "warm_trace": None, "options": {"budget": "50%"}}
    tiny |= {name: [1 + token % 255 for token in spec[name]] for name in ("warm_prompt", "warm", "prompt", "timed")}
    run = measure_decoding(tiny, limit_bytes=limit_bytes, controller=controller)
    if run.outcome != MEASURED and run.limit_hits:
        raise BudgetError(
            f"a limit of {limit_bytes:,} bytes is too small for the process itself, without a model: give 600MB or more"
        )
    found = run.answer("the control process failed")
    return run.group_peak_bytes or int(found["peak_bytes"])
