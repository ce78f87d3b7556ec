"""Rerouting a single token, as `rerouting.py` does it for many, without its forty small tensor operations a layer.

Decoding one token meets every layer once, and there the operations of a few elements cost more than the experts they
save. Decisions are taken on Python numbers here; scores and weights still come from the routing rule's tensors, so
that both ways give the same experts and the same bits. A cache bias takes the general way.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from emoe_core.experts.rerouting import Rerouted, shares_of
from emoe_core.experts.routing_rules import MINUS_INFINITY, Choice, RoutingRule


def reroute_token(choice: Choice, present: Collection[int], tolerance: float, rule: RoutingRule) -> Rerouted | None:
    """Replace a token's absent experts while the loss is within its tolerance, smallest router weights first.

    Parameters
    ----------
    choice : Choice
        The router's decision for one token.
    present : collection of int
        Experts that are, or are about to be, in slots; at least one.
    tolerance : float
        In [0, 1]; see `rerouting.replaceable`.
    rule : RoutingRule

    Returns
    -------
    Rerouted or None
        None when nothing is replaced: every absent expert is to be loaded.
    """
    chosen = choice.index[0].tolist()
    available = set(present)
    marked = _marked(choice, chosen, available, tolerance)
    # What is loaded for one place serves every other that names it.
    available.update(expert for place, expert in enumerate(chosen) if place not in marked)
    marked = [place for place in marked if chosen[place] not in available]
    if not marked:
        return None
    logits = choice.logits.float()
    values = rule.order(logits)
    order = values[0].tolist()
    within = range(len(order)) if rule.groups is None else set(rule.group_limit(values)[0].nonzero()[:, 0].tolist())
    kept = {expert for place, expert in enumerate(chosen) if place not in marked}
    best = sorted(available - kept, key=lambda expert: (expert not in within, -order[expert], expert))
    replaced = [False] * len(chosen)
    unfilled = []
    for rank, place in enumerate(marked):
        replaced[place] = True
        if rank < len(best):
            chosen[place] = best[rank]
        else:
            chosen[place] = min(available)
            unfilled.append(place)
    index = torch.tensor([chosen], dtype=choice.index.dtype, device=choice.index.device)
    log_scores = rule.log_scores(logits).gather(1, index)
    if unfilled:
        log_scores[0, unfilled] = MINUS_INFINITY
    weights = log_scores.softmax(dim=-1) * choice.weights.float().sum(dim=-1, keepdim=True)
    marks = torch.tensor([replaced], device=choice.index.device)
    return Rerouted(index, weights.to(choice.weights.dtype), marks)


def _marked(choice: Choice, chosen: list[int], available: set[int], tolerance: float) -> list[int]:
    """Return the places, ascending, whose absent experts may be replaced."""
    absent = [place for place, expert in enumerate(chosen) if expert not in available]
    if tolerance >= 1.0 or not absent or tolerance <= 0.0:
        return absent if tolerance >= 1.0 else []
    shares = shares_of(choice.weights)[0].tolist()
    limit, loss, marked = np.float32(tolerance), 0.0, []
    for place in sorted(absent, key=lambda place: shares[place]):
        loss += shares[place]
        if np.float32(loss) > limit:
            break
        marked.append(place)
    return sorted(marked)
