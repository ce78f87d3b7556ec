"""Who leaves a full layer when another expert comes: the eviction policies by name, and LRU, the default.

A policy is a rule over the entries that may leave (`slots.Policy`), or a table of its own (`decayed_demand.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from emoe_core.errors import require_known
from emoe_core.loader.decayed_demand import DemandTable
from emoe_core.loader.slots import Entry, Policy, SlotTable

LRU, DECAYED_DEMAND = POLICY_NAMES = ("lru", "decayed_demand")


def lru(candidates: Sequence[Entry], forward: int) -> Entry | None:
    """Evict the least recently touched expert."""
    return min(candidates, key=lambda entry: entry.touched, default=None)


def require_policy(policy: str | Policy) -> None:
    """Raise OptionError, naming the known ones, for an eviction policy that is neither a name nor a rule."""
    if not callable(policy):
        require_known(policy, POLICY_NAMES, "eviction policy")


def policy_name(policy: str | Policy) -> str:
    """Return what a policy is called."""
    return policy if isinstance(policy, str) else policy.__name__


def make_table(capacity: Sequence[int], staging: int, policy: str | Policy, experts: int) -> SlotTable:
    """Return the residency table of a policy; ``experts`` are those of the largest layer."""
    require_policy(policy)
    if policy == DECAYED_DEMAND:
        return DemandTable(capacity, staging, experts)
    return SlotTable(capacity, staging, lru if isinstance(policy, str) else policy)
