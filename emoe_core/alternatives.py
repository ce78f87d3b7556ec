"""Two alternatives to the miss rules of `rerouting.py`, on trial: which wins is for `workbench` to measure.

*Cache-aware routing* (arXiv 2412.00099): experts at hand get a bonus of ``bias`` times the spread of a token's router
values, and the top-k is taken anew; an absent expert that still makes it is loaded. The token's best expert is kept
whatever the bonus. *Similar experts* (BuddyMoE, SMoE): an absent expert is replaced by the available one whose outputs
are most like its own, with the weight of the one that it stands in for.
"""

from __future__ import annotations

import torch

from .rerouting import MINUS_INFINITY, Choice, Rerouted, RoutingRule, group_limit


def replaceable_by_bias(
    choice: Choice,
    absent: torch.Tensor,
    available: torch.Tensor,
    bias: float,
    rule: RoutingRule,
    router: torch.nn.Module,
) -> torch.Tensor:
    """Return which absent choices fall out of the top-k once available experts get the bonus, bool [T, k]."""
    order = rule.order(router, choice.logits.float())
    spread = order.max(dim=-1, keepdim=True).values - order.min(dim=-1, keepdim=True).values
    biased = order + bias * spread * available
    biased = biased.masked_fill(~group_limit(router, order), MINUS_INFINITY)
    biased.scatter_(1, order.argmax(dim=-1, keepdim=True), float("inf"))
    kept = biased.topk(choice.index.shape[1], dim=-1).indices
    in_top = torch.zeros_like(order, dtype=torch.bool).scatter_(1, kept, True)
    return absent & ~in_top.gather(1, choice.index)


def substitute_similar(choice: Choice, replace: torch.Tensor, available: torch.Tensor, rank: torch.Tensor) -> Rerouted:
    """Replace the marked choices, heaviest first, by the most similar available expert that the token does not use.

    Parameters
    ----------
    rank : torch.Tensor
        int64 [E, E]: place of expert r among those like expert e, 0 being the most similar.
    """
    index, weights = choice.index.clone(), choice.weights.clone()
    experts = available.shape[0]
    free = available.unsqueeze(0).repeat(index.shape[0], 1)
    free.scatter_(1, torch.where(replace, index[:, :1], index), False)
    # Where the first choice itself is replaced, the line above marked it, which is not available anyway.
    fallback = int(available.nonzero()[0, 0])
    for place in range(index.shape[1]):
        rows = replace[:, place].nonzero().squeeze(-1)
        if not len(rows):
            continue
        costs = rank[choice.index[rows, place]].masked_fill(~free[rows], experts + 1)
        cost, best = costs.min(dim=-1)
        found = cost <= experts
        index[rows, place] = torch.where(found, best, torch.full_like(best, fallback))
        weights[rows, place] = torch.where(found, weights[rows, place], torch.zeros_like(weights[rows, place]))
        free[rows, best] = False
    # A token with fewer experts at hand than choices keeps its total.
    total = choice.weights.float().sum(-1, keepdim=True)
    scaled = weights.float() * (total / weights.float().sum(-1, keepdim=True).clamp_min(1e-20))
    touched = replace.any(dim=-1, keepdim=True)
    weights = torch.where(touched, scaled.to(weights.dtype), weights)
    return Rerouted(index, weights, replace)
