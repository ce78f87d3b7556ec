"""Residency tables that replay eviction policies: the engine's own, and those that only the simulator knows.

The engine's policies (`emoe_core.slots.POLICIES`) run on the engine's table, unchanged. Beside them:

random
    Evicts anyone: the sanity bound.
decayed_demand
    Each expert has a score: the square root of the tokens that chose it in a pass, halved every ``half_life`` passes.
    Before a pass the layer chooses its *keepers*: the best C (slots) by score, of those resident or needed. Others
    leave first. A keeper leaves only for an expert that must be computed next when nothing else can give way.

    Two things differ from LRU. A pass over a prompt needs nearly every expert and LRU is left with whatever came
    last; here its token counts tell which experts the answer will want. And an expert that is needed once passes
    through the spare slot instead of displacing a better one.

`pinned` (a fixed set, known beforehand) and `min` (the bound) evict nothing on demand; they are in `simulate.py` and
`simulate_bound.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.slots import POLICIES, Entry, SlotTable

HALF_LIFE_PASSES = 2.0


class DemandTable(SlotTable):
    """A table that keeps the best by decayed demand; see the module's text.

    Parameters
    ----------
    capacity, spare
        As in `SlotTable`.
    experts : int
        Experts of the largest layer.
    half_life : float
        Passes in which a score halves.
    """

    def __init__(self, capacity: Sequence[int], spare: int, experts: int, half_life: float = HALF_LIFE_PASSES) -> None:
        super().__init__(capacity, spare)
        self._decay = 0.5 ** (1.0 / half_life)
        self._scores = np.zeros((len(self.capacity), experts))
        self._keepers: set[int] = set()
        self._incoming: int | None = None

    def begin(self, layer: int, tokens: np.ndarray) -> None:
        """Hear what a layer's pass needs (tokens that chose each expert, int [E]), and choose who must stay."""
        scores = self._scores[layer]
        scores *= self._decay
        scores += np.sqrt(tokens)
        there = self.resident(layer).union(np.flatnonzero(tokens).tolist())
        self._keepers = set(sorted(there, key=lambda expert: -scores[expert])[: self.capacity[layer]])

    def admit(self, layer: int, expert: int, *, may_use_spare: bool = True) -> tuple[Entry, Entry | None] | None:
        """As `SlotTable.admit`; the victim depends on who comes."""
        self._incoming = expert
        try:
            return super().admit(layer, expert, may_use_spare=may_use_spare)
        finally:
            self._incoming = None

    def victim(self, layer: int) -> Entry | None:
        """Return who leaves next: not a keeper, if that can wait."""
        entries = list(self._layers[layer].values())
        candidates = [entry for entry in entries if entry.ready and not entry.pins]
        leaving = [entry for entry in candidates if entry.expert not in self._keepers]
        incoming = self._incoming
        # Experts are computed in ascending order: while a lower one is still pinned, the newcomer is only read ahead.
        ahead = incoming is not None and any(entry.pins and entry.expert < incoming for entry in entries)
        spare_is_free = incoming is not None and len(entries) <= self.capacity[layer] and self.spare > 0
        if not leaving and (ahead or spare_is_free):
            return None
        scores = self._scores[layer]
        return min(leaving or candidates, key=lambda entry: scores[entry.expert], default=None)


def random_table(capacity: Sequence[int], spare: int, seed: int) -> SlotTable:
    """Return the engine's table with victims drawn at random."""
    generator = np.random.default_rng(seed)

    def anyone(candidates: Sequence[Entry], forward: int) -> Entry | None:
        return candidates[int(generator.integers(len(candidates)))]

    table = SlotTable(capacity, spare)
    table.policy = anyone
    return table


# Made with (slots of each layer, spare slots, experts of the largest layer, seed).
TableFactory = Callable[[Sequence[int], int, int, int], SlotTable]


def _engine(name: str) -> TableFactory:
    return lambda capacity, spare, experts, seed: SlotTable(capacity, spare, name)


TABLES: dict[str, TableFactory] = {
    **{name: _engine(name) for name in POLICIES},
    "random": lambda capacity, spare, experts, seed: random_table(capacity, spare, seed),
    "decayed_demand": lambda capacity, spare, experts, seed: DemandTable(capacity, spare, experts),
}
PINNED, BOUND = "pinned", "min"
POLICY_NAMES = (*TABLES, PINNED, BOUND)


def require_policy(name: str) -> None:
    """Raise OptionError, naming the known ones, unless a policy can be simulated."""
    if name not in POLICY_NAMES:
        raise OptionError(f"unknown policy {name!r}: choose one of {', '.join(POLICY_NAMES)}")
