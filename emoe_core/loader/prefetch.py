"""Lookahead: guessing, while one MoE layer computes, what a later one will want, and fetching it meanwhile.

The later layer's own router is applied to this layer's hidden state, as mixtral-offloading (arXiv 2312.17238) does and
Pre-gated MoE (arXiv 2308.12066) trains for: residual streams change little from layer to layer, so its choice is often
the one that the layer will make. Both layers normalise the stream before their router; where their norms are seen to
differ by weights alone, the hidden state is rescaled as if the later norm had been applied to it.

A *guess* is the set of experts that the real tokens of a pass choose that way. It is dropped unless the whole set fits
the later layer's slots, so a prefill of many tokens never gets one. Guessed experts that are absent are fetched into
the later layer's own slots: only ready, unpinned experts that were not guessed give way, by the layer's eviction
policy; the staging slot is never used. The layer that computes keeps its experts, for slots are counted per layer.

Fetching ahead evicts, so wrong guesses cost more than they save. The share of fetched experts that their layer then
wanted is followed; below `MIN_TRUST` nothing is fetched, and only every 16th pass guesses, to notice when that changes.
When a layer starts, reads of wrong guesses for it that have not begun are called off.

A guess changes what is in slots and nothing else: no arithmetic, no routing, no history. There is none for the first
layers of a pass, nor for routers that no routing rule explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from emoe_core.loader.loader import ExpertLoader

Router = Callable[[torch.Tensor], torch.Tensor]

MIN_TRUST = 0.5
# The weight of the latest fetched guess in the share of right ones.
_NEWEST = 1 / 64
_LISTEN_EVERY = 16


class Lookahead:
    """Guesses ``distance`` layers ahead of the one that computes.

    Parameters
    ----------
    loader : ExpertLoader
        Fetches what was guessed, and owns the counters.
    routers : sequence of callable or None
        Of each MoE layer: hidden [T, H] -> chosen experts int64 [T, k], without side effects.
    norms : sequence of torch.nn.Module or None
        Of each MoE layer: the norm before its router.
    distance : int
        MoE layers ahead, >= 1.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        routers: Sequence[Router | None],
        norms: Sequence[torch.nn.Module | None],
        distance: int,
    ) -> None:
        assert distance >= 1, distance
        self.distance = distance
        self.scales = [
            norm_scale(norms[layer], norms[layer + distance]) if layer + distance < len(norms) else None
            for layer in range(len(norms))
        ]
        self._loader = loader
        self._routers = tuple(routers)
        self._guesses: dict[int, tuple[int, frozenset[int], frozenset[int]]] = {}
        self.trust = 1.0

    def guess(self, layer: int, hidden: torch.Tensor, real: torch.Tensor | None) -> None:
        """Guess from the input of one layer's experts, hidden [T, H], and fetch what is absent.

        ``real`` is a bool [T], False at padding, or None.
        """
        target = layer + self.distance
        router = self._routers[target] if target < len(self._routers) else None
        if router is None:
            return
        table = self._loader.table
        trusted = self.trust >= MIN_TRUST
        if not trusted and table.forward % _LISTEN_EVERY:
            return
        rows = hidden if real is None else hidden[real]
        capacity = table.capacity[target]
        # So many tokens hardly ever agree on a set that fits: spare them the product.
        if not 0 < rows.shape[0] <= capacity:
            return
        scale = self.scales[layer]
        with torch.no_grad():
            chosen = router(rows if scale is None else rows * scale)
        # Each token's surest choice first, in the order in which they will be read.
        guessed = list(dict.fromkeys(chosen.t().flatten().tolist()))
        if len(guessed) > capacity:
            return
        absent = frozenset(guessed) - table.resident(target)
        self._guesses[target] = (table.forward, frozenset(guessed), absent)
        if trusted:
            self._loader.fetch_ahead(target, guessed)

    def score(self, layer: int, wanted: Sequence[int]) -> None:
        """Compare the guess for a layer, if there was one in this pass, with the experts it wanted (distinct)."""
        forward, guessed, absent = self._guesses.pop(layer, (-1, frozenset(), frozenset()))
        if forward != self._loader.table.forward:
            return
        for expert in absent:
            self.trust += _NEWEST * ((expert in wanted) - self.trust)
        if absent:
            self._loader.call_off(layer, absent.difference(wanted))
        counters = self._loader.counters
        counters.lookahead_guessed += len(guessed)
        counters.lookahead_wanted += len(wanted)
        counters.lookahead_right += len(guessed.intersection(wanted))


def norm_scale(here: torch.nn.Module | None, there: torch.nn.Module | None) -> torch.Tensor | None:
    """Return s [H] with ``there(x) == here(x) * s`` within rounding, or None when there is no such factor."""
    ours, theirs = getattr(here, "weight", None), getattr(there, "weight", None)
    if here is None or there is None or ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    with torch.no_grad():
        scale = theirs.float() / ours.float()
        if not bool(scale.isfinite().all()):
            return None
        scale = scale.to(ours.dtype)
        sample = torch.randn(4, ours.shape[0], generator=torch.Generator().manual_seed(0)).to(ours)
        expected = there(sample)
        error = (here(sample) * scale - expected).float().abs().max()
        within = 0.05 * expected.float().abs().max()
    return scale if bool(error <= within) else None
