"""Serving a token without one of its experts: who replaces it, and with what weight.

The experts of a layer get the router's choice only, so a hook keeps the router's logits for the layer's call. A
*routing rule* turns logits into the order in which experts are chosen and into the scores their weights come from;
`find_rule` picks the rule that best reproduces the router's own choice on random inputs, so new families with a known
rule work at once, and a family without one is served exactly only.

Loss of a token = weights of its absent chosen experts / weights of all its chosen experts. The smallest absent
weights are replaced first, while the loss stays within the tolerance; the rest is loaded. The new weights are the
scores of the experts used, scaled to the token's original total (the paper's section 3.4 leaves re-weighting open).

A *cache bias* narrows that down: an absent expert is replaced only if it falls out of the token's top-k once available
experts get a bonus (`outbid`; cache-aware routing, arXiv 2412.00099). It then matters how close a substitute comes, not
only how much weight is lost. In a trial (token by token, half of the experts in slots, LRU, against a tolerance alone,
too few prompts for an interval) it read 3 to 8% fewer bytes at equal KL on the embedded model (6 and 10 prompts, bias
0.2 and 0.4, tolerance 0.3 and 0.45), and about 14% fewer on the carved one (4 prompts, bias 0.4).

Tried and left out: replacing an expert by the one whose outputs are most like its own (BuddyMoE, SMoE), ranked on
profile prompts. At 3, 4 and 5 of 8 slots (16 prompts) KL changed by 0.0001, -0.0008 and -0.0010 nats, perplexity not
measurably; at 9, 12 and 15 of the carved model's 24 (24 prompts) by +0.002, +0.021 and +0.034, for the worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MINUS_INFINITY = float("-inf")
MAX_SHARE_ERROR = 2e-2


@dataclass(frozen=True)
class RoutingRule:
    """How a family's router goes from logits [T, E] to its choice.

    ``order`` gives the values whose k largest are chosen; ``log_scores`` the logarithms, up to a constant per token, of
    what weights are proportional to: logarithms, because the scores of a confident router's other experts underflow.
    Both take (router module, logits float32 [T, E]) and return float32 [T, E].
    """

    name: str
    order: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    log_scores: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


def _logits(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    return logits


def _log_sigmoid(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(logits)


def _biased_sigmoid(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    bias = getattr(router, "e_score_correction_bias", None)
    return logits.sigmoid() if bias is None else logits.sigmoid() + bias.float()


RULES = (
    # softmax -> top-k and top-k -> softmax order and weigh alike: by logits, and by their exponentials.
    RoutingRule("softmax", _logits, _logits),
    RoutingRule("sigmoid+bias", _biased_sigmoid, _log_sigmoid),
)


def group_limit(router: torch.nn.Module, order: torch.Tensor) -> torch.Tensor:
    """Return a bool mask [T, E] of the experts in each token's best groups; all True for a router without groups.

    DeepSeek-V3 restricts a token to ``topk_group`` of ``num_group`` groups, ranked by the sum of their two best.
    """
    groups, kept = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if not groups or not kept or groups <= 1 or kept >= groups:
        return torch.ones_like(order, dtype=torch.bool)
    tokens, experts = order.shape
    grouped = order.view(tokens, groups, experts // groups)
    best = grouped.topk(min(2, experts // groups), dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    mask = torch.zeros(tokens, groups, dtype=torch.bool, device=order.device).scatter_(1, best, True)
    return mask.unsqueeze(-1).expand_as(grouped).reshape(tokens, experts)


def find_rule(router: torch.nn.Module, hidden_size: int, output: Callable[[Any], Choice]) -> RoutingRule | None:
    """Return the rule that reproduces a router's choice and weights on 64 random tokens, or None.

    Parameters
    ----------
    router : torch.nn.Module
        The loaded router.
    hidden_size : int
        Width of its input.
    output : callable
        Takes what the router returns and gives its `Choice`.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        parameter = next(router.parameters())
        hidden = torch.randn(64, hidden_size, generator=generator).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            choice = output(router(hidden))
    except (TypeError, RuntimeError, IndexError, ValueError, AttributeError, StopIteration):
        return None
    logits = choice.logits.float()
    weights = choice.weights.float()
    shares = weights / weights.sum(-1, keepdim=True)
    explained: list[tuple[float, RoutingRule]] = []
    for rule in RULES:
        order = rule.order(router, logits)
        order = order.masked_fill(~group_limit(router, order), MINUS_INFINITY)
        chosen = order.topk(choice.index.shape[-1], dim=-1).indices
        # Ties between logits of low precision may be broken either way: compare what was chosen by its order value.
        same_choice = torch.allclose(
            order.gather(1, chosen).sort(-1).values, order.gather(1, choice.index).sort(-1).values, atol=1e-6
        )
        error = (rule.log_scores(router, logits).gather(1, choice.index).softmax(-1) - shares).abs().max().item()
        if same_choice and error < MAX_SHARE_ERROR:
            explained.append((error, rule))
    # Small logits fit several rules within rounding: the closest one is the router's own.
    return min(explained, key=lambda pair: pair[0])[1] if explained else None


@dataclass(frozen=True)
class Choice:
    """A router's decision for T tokens: logits [T, E], weights [T, k], expert index int64 [T, k]."""

    logits: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor


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


def outbid(
    choice: Choice, available: torch.Tensor, bias: float, rule: RoutingRule, router: torch.nn.Module
) -> torch.Tensor:
    """Return which choices fall out of the top-k once available experts get a bonus.

    Parameters
    ----------
    choice : Choice
        The router's decision.
    available : torch.Tensor
        Bool [E].
    bias : float
        The bonus, as a share of the spread (largest minus smallest) of the token's order values.
    rule, router
        How logits become order.

    Returns
    -------
    torch.Tensor
        Bool [T, k]. A token's best expert never falls out, and an available one never does.
    """
    order = rule.order(router, choice.logits.float())
    spread = order.max(dim=-1, keepdim=True).values - order.min(dim=-1, keepdim=True).values
    biased = order + bias * spread * available
    limit = group_limit(router, order)
    order, biased = order.masked_fill(~limit, MINUS_INFINITY), biased.masked_fill(~limit, MINUS_INFINITY)
    biased.scatter_(1, order.argmax(dim=-1, keepdim=True), float("inf"))
    kept = torch.zeros_like(available).expand_as(order).scatter(1, biased.topk(choice.index.shape[1]).indices, True)
    return ~kept.gather(1, choice.index) & ~available[choice.index]


def shares_of(weights: torch.Tensor) -> torch.Tensor:
    """Return each chosen expert's share of its token's weights, float32 [T, k]."""
    weights = weights.float()
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def substitute(
    choice: Choice,
    replace: torch.Tensor,
    available: torch.Tensor,
    rule: RoutingRule,
    router: torch.nn.Module,
) -> Rerouted:
    """Replace the marked choices by each token's next-best available experts and renormalise.

    Parameters
    ----------
    choice : Choice
        The router's decision.
    replace : torch.Tensor
        Bool [T, k], from `replaceable`; none of these is available.
    available : torch.Tensor
        Bool [E]: experts that are, or are about to be, in slots; at least one.
    rule, router
        How logits become order and scores.

    A token with fewer available experts than choices uses all of them; its left-over places get weight 0. The group
    limit of grouped routers holds while its groups have an available expert left, and is lifted otherwise.
    """
    rows = replace.any(dim=-1)
    logits, chosen, marks = choice.logits[rows].float(), choice.index[rows], replace[rows]
    order = rule.order(router, logits)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept.scatter_(1, chosen, ~marks)
    candidates = available & ~kept
    # Two stable sorts: by order, then experts inside the groups before those outside before those not to be had.
    tier = torch.where(candidates, (~group_limit(router, order)).long(), 2)
    by_order = order.argsort(dim=-1, descending=True, stable=True)
    best = by_order.gather(1, tier.gather(1, by_order).argsort(dim=-1, stable=True))
    rank = (marks.long().cumsum(dim=-1) - 1).clamp_min(0)
    substitutes = best.gather(1, rank)
    found = tier.gather(1, substitutes) < 2
    fallback = int(available.nonzero()[0, 0])
    new_index = torch.where(marks, torch.where(found, substitutes, torch.full_like(substitutes, fallback)), chosen)
    log_scores = rule.log_scores(router, logits).gather(1, new_index).masked_fill(marks & ~found, MINUS_INFINITY)
    new_weights = log_scores.softmax(dim=-1) * choice.weights[rows].float().sum(dim=-1, keepdim=True)
    index, weights = choice.index.clone(), choice.weights.clone()
    index[rows] = new_index
    weights[rows] = new_weights.to(weights.dtype)
    return Rerouted(index, weights, replace)
