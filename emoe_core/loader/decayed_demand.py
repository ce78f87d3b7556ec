"""Decayed demand: an eviction policy that keeps what recent passes asked for most, and lets the rest pass through.

Each expert has a score: the square root of the tokens that chose it in a pass, halved every ``half_life`` passes.
Before a pass the layer chooses its *keepers*: the best C (slots) by score, of those resident or needed. Others leave
first. A keeper leaves only for an expert that must be computed next when nothing else can give way.

Two things differ from LRU. A pass over a prompt needs nearly every expert and LRU is left with whatever came last; here
its token counts tell which experts the answer will want. And an expert that is needed once passes through the staging
slot instead of displacing a better one, which costs reading ahead: fewer bytes, and more waiting where a layer has few
slots (docs/results/speed.md). LRU is the default.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emoe_core.loader.slots import Entry, SlotTable

HALF_LIFE_PASSES = 2.0


class DemandTable(SlotTable):
    """A residency table that keeps the best by decayed demand; see the module's text.

    Parameters
    ----------
    capacity, staging
        As in `SlotTable`.
    experts : int
        Experts of the largest layer.
    half_life : float
        Passes in which a score halves.
    """

    def __init__(
        self, capacity: Sequence[int], staging: int, experts: int, half_life: float = HALF_LIFE_PASSES
    ) -> None:
        super().__init__(capacity, staging, _unasked)
        self._decay = 0.5 ** (1.0 / half_life)
        self._scores = np.zeros((len(self.capacity), experts))
        self._keepers: list[set[int]] = [set() for _ in self.capacity]
        self._incoming: int | None = None

    def begin(self, layer: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Hear what a layer's pass needs (tokens that chose each expert, [E]), and choose who must stay."""
        scores = self._scores[layer]
        scores *= self._decay
        # A layer may have fewer experts than the largest one.
        scores[: len(tokens)] += np.sqrt(tokens)
        there = self.resident(layer).union(np.flatnonzero(tokens).tolist())
        self._keepers[layer] = set(sorted(there, key=lambda expert: -scores[expert])[: self.capacity[layer]])

    def allocate(self, layer: int, expert: int, *, may_use_staging: bool = True) -> tuple[Entry, Entry | None] | None:
        """As `SlotTable.allocate`; the victim depends on who comes.

        Who may not use the staging slot comes ahead of need and takes any slot that its own layer can free.
        """
        self._incoming = expert if may_use_staging else None
        try:
            return super().allocate(layer, expert, may_use_staging=may_use_staging)
        finally:
            self._incoming = None

    def victim(self, layer: int) -> Entry | None:
        """Return who leaves next: not a keeper, if that can wait."""
        entries = list(self._layers[layer].values())
        candidates = [entry for entry in entries if entry.ready and not entry.pins]
        leaving = [entry for entry in candidates if entry.expert not in self._keepers[layer]]
        incoming = self._incoming
        # Experts are computed in ascending order: while a lower one is still pinned, the newcomer is only read ahead.
        ahead = incoming is not None and any(entry.pins and entry.expert < incoming for entry in entries)
        staging_is_free = incoming is not None and self._staged() < self.staging
        if not leaving and (ahead or staging_is_free):
            return None
        scores = self._scores[layer]
        return min(leaving or candidates, key=lambda entry: scores[entry.expert], default=None)


def _unasked(candidates: Sequence[Entry], forward: int) -> Entry | None:
    raise AssertionError("who leaves depends on who comes: `victim` decides")
