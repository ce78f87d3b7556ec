"""Residency tables that replay eviction policies: the engine's own, and those that only the simulator knows.

The engine's policies (`emoe_core.loader.eviction.POLICY_NAMES`) and the rules that it takes as they are
(`workbench.systems.eviction_rules.RULES`) run on the engine's table. Beside them:

random
    Evicts anyone: the sanity bound.

`pinned` (a fixed set, known beforehand) and `min` (the bound) evict nothing on demand; they are in `cache.py` and
`bound.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from emoe_core.errors import require_known
from emoe_core.loader.eviction import POLICY_NAMES as ENGINE_POLICIES
from emoe_core.loader.eviction import make_table
from emoe_core.loader.slots import Entry, Policy, SlotTable
from workbench.systems.eviction_rules import RULES


def random_table(capacity: Sequence[int], staging: int, seed: int) -> SlotTable:
    """Return the engine's table with victims drawn at random."""
    generator = np.random.default_rng(seed)

    def anyone(candidates: Sequence[Entry], forward: int) -> Entry | None:
        return candidates[int(generator.integers(len(candidates)))]

    return SlotTable(capacity, staging, anyone)


# Made with (slots of each layer, staging slots, experts of the largest layer, seed).
TableFactory = Callable[[Sequence[int], int, int, int], SlotTable]


def _engine(policy: str | Policy) -> TableFactory:
    return lambda capacity, staging, experts, seed: make_table(capacity, staging, policy, experts)


TABLES: dict[str, TableFactory] = {
    **{name: _engine(name) for name in ENGINE_POLICIES},
    **{name: _engine(rule) for name, rule in RULES.items()},
    "random": lambda capacity, staging, experts, seed: random_table(capacity, staging, seed),
}
PINNED, BOUND = "pinned", "min"
POLICY_NAMES = (*TABLES, PINNED, BOUND)


def require_policy(name: str) -> None:
    """Raise OptionError, naming the known ones, unless a policy can be simulated."""
    require_known(name, POLICY_NAMES, "policy")
