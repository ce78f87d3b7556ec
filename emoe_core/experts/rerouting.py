"""Serving a token without one of its experts: who replaces it, and with what weight.

The experts of a layer get the router's choice only, so a hook keeps the router's logits for the layer's call. A
`RoutingRule` turns logits into the order in which experts are chosen and into the scores their weights come from; a
family whose router has no rule is served exactly only.

Loss of a token = weights of its absent chosen experts / weights of all its chosen experts. The smallest absent
weights are replaced first, while the loss stays within the tolerance; the rest is loaded. The new weights are the
scores of the experts used, scaled to the token's original total (the paper's section 3.4 leaves re-weighting open).

A *cache bias* narrows that down: an absent expert is replaced only if it falls out of the token's top-k once available
experts get a bonus (`outranked`; cache-aware routing, arXiv 2412.00099). It then matters how close a substitute comes,
not only how much weight is lost: fewer bytes at equal KL (docs/results/predictors.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emoe_core.experts.routing_rules import MINUS_INFINITY, Choice, RoutingRule


@dataclass(frozen=True)
class Rerouted:
    """What is served instead: index and weights [T, k], ``replaced`` bool [T, k]."""

    index: torch.Tensor
    weights: torch.Tensor
    replaced: torch.Tensor


def replaceable(weights: torch.Tensor, absent: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Decide which absent choices may be replaced: smallest weights first while the loss is within tolerance.

    Parameters
    ----------
    weights : torch.Tensor
        Router weights [T, k].
    absent : torch.Tensor
        Bool [T, k], True where the chosen expert is not resident.
    tolerance : torch.Tensor
        Float [T] in [0, 1]. A token with tolerance 0 is never replaced, not even at weight 0.

    Returns
    -------
    torch.Tensor
        Bool [T, k].
    """
    share = torch.where(absent, shares_of(weights), torch.full_like(weights, float("inf"), dtype=torch.float32))
    ranked, order = share.sort(dim=-1)
    loss = torch.where(ranked.isinf(), torch.zeros_like(ranked), ranked).cumsum(dim=-1)
    limit = tolerance.unsqueeze(-1)
    within = ((loss <= limit) | (limit >= 1.0)) & ~ranked.isinf() & (limit > 0.0)
    return torch.zeros_like(absent).scatter(1, order, within)


def outranked(choice: Choice, available: torch.Tensor, bias: float, rule: RoutingRule) -> torch.Tensor:
    """Return which choices fall out of the top-k once available experts get a bonus.

    Parameters
    ----------
    choice : Choice
        The router's decision.
    available : torch.Tensor
        Bool [E].
    bias : float
        The bonus, as a share of the spread (largest minus smallest) of the token's order values.
    rule : RoutingRule
        How logits become order.

    Returns
    -------
    torch.Tensor
        Bool [T, k]. A token's best expert never falls out, and an available one never does.
    """
    order = rule.order(choice.logits.float())
    spread = order.max(dim=-1, keepdim=True).values - order.min(dim=-1, keepdim=True).values
    biased = order + bias * spread * available
    limit = rule.group_limit(order)
    order, biased = order.masked_fill(~limit, MINUS_INFINITY), biased.masked_fill(~limit, MINUS_INFINITY)
    biased.scatter_(1, order.argmax(dim=-1, keepdim=True), float("inf"))
    kept = torch.zeros_like(available).expand_as(order).scatter(1, biased.topk(choice.index.shape[1]).indices, True)
    return ~kept.gather(1, choice.index) & ~available[choice.index]


def shares_of(weights: torch.Tensor) -> torch.Tensor:
    """Return each chosen expert's share of its token's weights, float32 [T, k]."""
    weights = weights.float()
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def substitute(choice: Choice, replace: torch.Tensor, available: torch.Tensor, rule: RoutingRule) -> Rerouted:
    """Replace the marked choices by each token's next-best available experts and renormalise.

    A token with fewer available experts than choices uses all of them; its left-over places get weight 0. The group
    limit of grouped routers holds while its groups have an available expert left, and is lifted otherwise.

    Parameters
    ----------
    choice : Choice
        The router's decision.
    replace : torch.Tensor
        Bool [T, k], from `replaceable`; none of these is available.
    available : torch.Tensor
        Bool [E]: experts that are, or are about to be, in slots; at least one.
    rule : RoutingRule
        How logits become order and scores.
    """
    rows = replace.any(dim=-1)
    logits, chosen, marks = choice.logits[rows].float(), choice.index[rows], replace[rows]
    order = rule.order(logits)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept.scatter_(1, chosen, ~marks)
    candidates = available & ~kept
    # Two stable sorts: by order, then experts inside the groups before those outside before those not to be had.
    tier = torch.where(candidates, (~rule.group_limit(order)).long(), 2)
    by_order = order.argsort(dim=-1, descending=True, stable=True)
    best = by_order.gather(1, tier.gather(1, by_order).argsort(dim=-1, stable=True))
    rank = (marks.long().cumsum(dim=-1) - 1).clamp_min(0)
    substitutes = best.gather(1, rank)
    found = tier.gather(1, substitutes) < 2
    fallback = int(available.nonzero()[0, 0])
    new_index = torch.where(marks, torch.where(found, substitutes, torch.full_like(substitutes, fallback)), chosen)
    log_scores = rule.log_scores(logits).gather(1, new_index).masked_fill(marks & ~found, MINUS_INFINITY)
    new_weights = log_scores.softmax(dim=-1) * choice.weights[rows].float().sum(dim=-1, keepdim=True)
    index, weights = choice.index.clone(), choice.weights.clone()
    index[rows] = new_index
    weights[rows] = new_weights.to(weights.dtype)
    return Rerouted(index, weights, replace)
