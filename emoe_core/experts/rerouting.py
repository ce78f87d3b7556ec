"""What happens on a miss: whether an absent expert is loaded or given up, and who serves in its place.

The experts of a layer get the router's choice only, so a hook keeps the router's logits for the layer's call. A
`RoutingRule` turns logits into the order in which experts are chosen and into the scores their weights come from; a
family whose router has no rule cannot be rerouted.

Loss of a token = weights of its absent chosen experts / weights of all its chosen experts. The smallest absent
weights are given up first, while the loss stays within the tolerance; the rest is loaded. What becomes of those given
up is `on_miss`:

reroute
    The token's next-best available experts take their places. The new weights are the scores of the experts used,
    scaled to the token's original total (the paper's section 3.4 leaves re-weighting open).
drop
    Nobody does: the weights of the experts that are left are scaled to the token's original total. It needs no router
    logits, hence no rule. A token that gives up all of its experts, which only a tolerance of 1 allows, gets nothing
    from the layer's routed experts; below 1 it always keeps, or loads, its best one.

A *cache bias* narrows that down: an absent expert is replaced only if it falls out of the token's top-k once available
experts get a bonus (`outranked`; cache-aware routing, arXiv 2412.00099). It then matters how close a substitute comes,
not only how much weight is lost: fewer bytes at equal KL (docs/results/predictors.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emoe_core.experts.routing_rules import MINUS_INFINITY, Choice, RoutingRule

REROUTE, DROP = ON_MISS = ("reroute", "drop")


@dataclass(frozen=True)
class Rerouted:
    """What is served instead: index and weights [T, k]; ``replaced`` bool [T, k] marks the choices given up."""

    index: torch.Tensor
    weights: torch.Tensor
    replaced: torch.Tensor


def reroute(
    choice: Choice,
    present: Collection[int],
    num_experts: int,
    tolerances: Sequence[float],
    rule: RoutingRule | None,
    cache_bias: float = 0.0,
    real: torch.Tensor | None = None,
) -> Rerouted | None:
    """Decide for each token of a layer which of its absent experts are given up; the others are to be loaded.

    Parameters
    ----------
    choice : Choice
        The router's decision for T tokens.
    present : collection of int
        Experts that are, or are about to be, in slots; at least one.
    num_experts : int
        E.
    tolerances : sequence of float
        Of each row of the pass, in [0, 1]; T is a multiple of their number.
    rule : RoutingRule or None
        How logits become order and scores; None drops what is given up.
    cache_bias : float
        See `outranked`; 0 is off.
    real : torch.Tensor or None
        Bool [T], False at padding, which gives nothing up.

    Returns
    -------
    Rerouted or None
        None when nothing is given up.
    """
    tokens = choice.index.shape[0]
    if tokens == 1 and cache_bias == 0:
        return reroute_token(choice, present, tolerances[0], rule)
    available = torch.zeros(num_experts, dtype=torch.bool)
    available[sorted(present)] = True
    missing = ~available[choice.index]
    if real is not None:
        missing &= real.unsqueeze(-1)
    candidates = missing & outranked(choice, available, cache_bias, rule) if rule and cache_bias > 0 else missing
    replace = replaceable(
        choice.weights, candidates, torch.tensor(tolerances).repeat_interleave(tokens // len(tolerances))
    )
    available[choice.index[missing & ~replace]] = True
    # What is loaded for one token serves every other that chose it.
    replace &= ~available[choice.index]
    if not bool(replace.any()):
        return None
    if rule is None:
        return drop(choice, replace, int(available.nonzero()[0, 0]))
    return substitute(choice, replace, available, rule)


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


def drop(choice: Choice, marks: torch.Tensor, stand_in: int) -> Rerouted:
    """Give up the marked choices and let each token's remaining ones carry its original total.

    Parameters
    ----------
    choice : Choice
        The router's decision; its logits are not looked at.
    marks : torch.Tensor
        Bool [T, k].
    stand_in : int
        An expert that is there: with weight 0, it fills the places of a token that has no expert left. Other places
        given up name, with weight 0, the first expert that the token keeps.
    """
    weights = choice.weights.float()
    kept = weights.masked_fill(marks, 0.0)
    left = kept.sum(dim=-1, keepdim=True)
    scaled = torch.where(left > 0, kept / left * weights.sum(dim=-1, keepdim=True), torch.zeros_like(kept))
    first = choice.index.gather(1, (~marks).int().argmax(dim=-1, keepdim=True))
    filler = first.masked_fill(marks.all(dim=-1, keepdim=True), stand_in)
    touched = marks.any(dim=-1, keepdim=True)
    return Rerouted(
        torch.where(marks, filler, choice.index),
        torch.where(touched, scaled.to(choice.weights.dtype), choice.weights),
        marks,
    )


def reroute_token(
    choice: Choice, present: Collection[int], tolerance: float, rule: RoutingRule | None
) -> Rerouted | None:
    """Do for a single token what `reroute` does for many, without its forty small tensor operations a layer.

    Decoding one token meets every layer once, and there operations on a few elements cost more than the experts they
    save. Decisions are taken on Python numbers; scores and weights still come from the rule's tensors, so that both
    ways give the same experts and the same bits. There is no cache bias here.

    Parameters
    ----------
    choice : Choice
        The router's decision for one token.
    present : collection of int
        Experts that are, or are about to be, in slots; at least one.
    tolerance : float
        In [0, 1]; see `rerouting.replaceable`.
    rule : RoutingRule or None
        As for `reroute`.

    Returns
    -------
    Rerouted or None
        None when nothing is given up: every absent expert is to be loaded.
    """
    chosen = choice.index[0].tolist()
    available = set(present)
    marked = _marked(choice, chosen, available, tolerance)
    # What is loaded for one place serves every other that names it.
    available.update(expert for place, expert in enumerate(chosen) if place not in marked)
    marked = [place for place in marked if chosen[place] not in available]
    if not marked:
        return None
    if rule is None:
        given_up = [place in marked for place in range(len(chosen))]
        return drop(choice, torch.tensor([given_up], device=choice.index.device), min(available))
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
