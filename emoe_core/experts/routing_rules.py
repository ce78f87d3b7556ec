"""How a router turns its logits into a choice of experts and their weights, found by what explains its own choices.

A *routing rule* has four parts, each named after what it does to one token's logits [E]:

- *choice score*: ``logit``, ``softmax``, ``sigmoid`` or ``sqrtsoftplus``; its k largest values are chosen.
- *correction*: a tensor [E] added to the choice score (DeepSeek-V3's load-balancing bias), or none.
- *groups*: experts are first narrowed to the best of equal groups, ranked by the sum of their two best choice scores
  (DeepSeek-V3) or by their best (DeepSeek-V2), or not.
- *weight score*: what the chosen experts' weights are proportional to, times a *scale* [E] or none. Whether the
  family renormalises or multiplies by a constant does not matter here: only shares within a token do.

`find_rule` tries their combinations on a router's own logits and keeps the one that reproduces its choices, and its
weights best. So a family with a known kind of router is explained without being named, and one without (a sequential
mixer, a table by token id) has no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

MINUS_INFINITY = float("-inf")
MAX_SHARE_ERROR = 2e-2
# Ties between logits of low precision may be broken either way.
_TIE = 1e-6

Score = Callable[[torch.Tensor], torch.Tensor]

_CHOICE_SCORES: dict[str, Score] = {
    "logit": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}
# Logarithms up to a constant per token, because the scores of a confident router's other experts underflow.
_LOG_WEIGHT_SCORES: dict[str, Score] = {
    "softmax": lambda logits: logits,
    "sigmoid": torch.nn.functional.logsigmoid,
    "sqrtsoftplus": lambda logits: 0.5 * torch.nn.functional.softplus(logits).clamp_min(1e-38).log(),
    # For routers that hand out probabilities in place of logits.
    "probability": lambda values: values.clamp_min(1e-38).log(),
}


@dataclass(frozen=True)
class Choice:
    """A router's decision for T tokens: logits [T, E], weights [T, k], expert index int64 [T, k]."""

    logits: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """The limit to ``kept`` of ``count`` equal groups, each ranked by the sum of its ``best`` largest choice scores."""

    count: int
    kept: int
    best: int


@dataclass(frozen=True, eq=False)
class RoutingRule:
    """One router's way from logits float32 [T, E] to its choice; see the module's docstring for the parts."""

    choice_score: str = "logit"
    weight_score: str = "softmax"
    correction: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    groups: Groups | None = None

    @property
    def name(self) -> str:
        """The weight score and what is added to it, such as ``sigmoid+bias+groups``."""
        parts = (("bias", self.correction), ("scale", self.scale), ("groups", self.groups))
        return "+".join([self.weight_score, *(name for name, part in parts if part is not None)])

    def on_host(self) -> RoutingRule:
        """Return the rule for logits that lie on the host."""
        correction = None if self.correction is None else self.correction.cpu()
        scale = None if self.scale is None else self.scale.cpu()
        return replace(self, correction=correction, scale=scale)

    def order(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the values [T, E] whose k largest are chosen, before the group limit."""
        scores = _CHOICE_SCORES[self.choice_score](logits)
        return scores if self.correction is None else scores + self.correction.float()

    def log_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logarithms [T, E], up to a constant per token, of what weights are proportional to."""
        scores = _LOG_WEIGHT_SCORES[self.weight_score](logits)
        return scores if self.scale is None else scores + self.scale.float().log()

    def group_limit(self, order: torch.Tensor) -> torch.Tensor:
        """Return a bool mask [T, E] of the experts in each token's best groups; all True without groups."""
        if self.groups is None:
            return torch.ones_like(order, dtype=torch.bool)
        count, size = self.groups.count, order.shape[1] // self.groups.count
        grouped = order.view(-1, count, size)
        ranks = grouped.topk(min(self.groups.best, size), dim=-1).values.sum(dim=-1)
        best = ranks.topk(self.groups.kept, dim=-1).indices
        mask = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, best, True)
        return mask.unsqueeze(-1).expand_as(grouped).reshape(order.shape)

    def choose(self, logits: torch.Tensor, k: int) -> torch.Tensor:
        """Return the chosen experts int64 [T, k], best first."""
        order = self.order(logits)
        return order.masked_fill(~self.group_limit(order), MINUS_INFINITY).topk(k, dim=-1).indices


def find_rule(
    choice: Choice, tensors: Sequence[torch.Tensor] = (), groups: tuple[int, int] | None = None
) -> RoutingRule | None:
    """Return the rule that reproduces a router's choices and comes closest to its weights, or None.

    Parameters
    ----------
    choice : Choice
        What the router decided for some tokens.
    tensors : sequence of torch.Tensor
        Tensors of E elements that the router holds or is given: what may be a correction or a scale.
    groups : tuple of int, optional
        Number of groups and how many of them are kept, if the router speaks of groups.
    """
    logits, weights = choice.logits.float(), choice.weights.float()
    shares = weights / weights.sum(-1, keepdim=True)
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    # A constant corrects and scales nothing.
    flat = [tensor for tensor in flat if bool((tensor != tensor[0]).any())]
    explained: list[tuple[float, int, RoutingRule]] = []
    for rule in _choosers(flat, groups):
        if not _same_choice(rule, logits, choice.index):
            continue
        for weight_score in _LOG_WEIGHT_SCORES:
            for scale in (None, *flat):
                full = RoutingRule(rule.choice_score, weight_score, rule.correction, scale, rule.groups)
                guessed = full.log_scores(logits).gather(1, choice.index).softmax(-1)
                error = (guessed - shares).abs().max().item()
                if error < MAX_SHARE_ERROR:
                    explained.append((error, _doubt(full), full))
    # Small logits fit several rules within rounding: the closest one is the router's own.
    return min(explained, key=lambda entry: entry[:2])[2] if explained else None


def _doubt(rule: RoutingRule) -> int:
    """Rank rules that weigh alike. A correction hardly fits by chance; groups do where enough of them are kept."""
    unlike = rule.choice_score not in ("logit", rule.weight_score)
    return 4 * (rule.scale is not None) + 3 * unlike + 2 * (rule.groups is not None) - (rule.correction is not None)


def _choosers(tensors: Sequence[torch.Tensor], groups: tuple[int, int] | None) -> Iterator[RoutingRule]:
    """Yield rules that differ in how they choose."""
    limits: list[Groups | None] = [None]
    if groups is not None and 0 < groups[1] < groups[0]:
        limits += [Groups(*groups, best=2), Groups(*groups, best=1)]
    for limit in limits:
        for correction in (None, *tensors):
            # Without a correction or groups every score orders alike.
            scores = _CHOICE_SCORES if limit is not None or correction is not None else ("logit",)
            for score in scores:
                yield RoutingRule(choice_score=score, correction=correction, groups=limit)


def _same_choice(rule: RoutingRule, logits: torch.Tensor, index: torch.Tensor) -> bool:
    order = rule.order(logits)
    if rule.groups is not None:
        if order.shape[1] % rule.groups.count:
            return False
        order = order.masked_fill(~rule.group_limit(order), MINUS_INFINITY)
    best = order.topk(index.shape[-1], dim=-1).values
    return torch.allclose(best, order.gather(1, index).sort(-1, descending=True).values, atol=_TIE)
