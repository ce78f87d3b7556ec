"""Routing rules: each kind of router is told apart from the others by what it chose, and none is imagined."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_core.experts.routing_rules import Choice, Groups, RoutingRule, find_rule

TOKENS, EXPERTS, K = 64, 8, 2


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Kind:
    """A family's router, written out as the family writes it."""

    name: str
    choice_score: str
    weight_score: str
    bias: bool = False
    best_of_group: int = 0
    groups_kept: int = 2
    renormalised: bool = True
    factor: float = 1.0


KINDS = (
    Kind("softmax", "softmax", "softmax"),
    Kind("softmax", "softmax", "softmax", renormalised=False),
    Kind("sigmoid", "sigmoid", "sigmoid", factor=2.5),
    Kind("sigmoid+bias", "sigmoid", "sigmoid", bias=True, renormalised=False),
    Kind("sigmoid+bias", "logit", "sigmoid", bias=True),
    Kind("softmax+bias", "softmax", "softmax", bias=True),
    Kind("sqrtsoftplus+bias", "sqrtsoftplus", "sqrtsoftplus", bias=True, factor=1.5),
    Kind("sigmoid+bias+groups", "sigmoid", "sigmoid", bias=True, best_of_group=2),
    Kind("softmax+groups", "softmax", "softmax", best_of_group=1, groups_kept=1),
    Kind("softmax+groups", "softmax", "softmax", best_of_group=2, renormalised=False),
)
SCORES = {
    "logit": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}


def decide(kind: Kind, logits: torch.Tensor, bias: torch.Tensor) -> Choice:
    order = SCORES[kind.choice_score](logits) + (bias if kind.bias else 0)
    if kind.best_of_group:
        grouped = order.view(TOKENS, 4, EXPERTS // 4)
        best = grouped.topk(kind.best_of_group, dim=-1)[0].sum(-1).topk(kind.groups_kept, dim=-1)[1]
        mask = torch.zeros(TOKENS, 4).scatter_(1, best, 1).unsqueeze(-1).expand_as(grouped).reshape(order.shape)
        order = order.masked_fill(mask == 0, float("-inf"))
    index = order.topk(K, dim=-1, sorted=False).indices
    weights = SCORES[kind.weight_score](logits).gather(1, index)
    if kind.renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(logits, weights * kind.factor, index)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_known_kind_of_router_is_recognised_and_its_rule_holds_for_other_tokens(kind: Kind) -> None:
    bias, decoy = 0.3 * values(1, EXPERTS), values(2, EXPERTS).abs()
    rule = find_rule(decide(kind, 2 * values(0, TOKENS, EXPERTS), bias), [decoy, bias], (4, kind.groups_kept))
    assert rule is not None and rule.name == kind.name
    new = decide(kind, 2 * values(3, TOKENS, EXPERTS), bias)
    assert torch.equal(rule.choose(new.logits, K).sort(-1).values, new.index.sort(-1).values)
    shares = new.weights / new.weights.sum(-1, keepdim=True)
    torch.testing.assert_close(rule.log_scores(new.logits).gather(1, new.index).softmax(-1), shares)


def test_probabilities_in_place_of_logits_and_a_factor_for_each_expert_are_recognised() -> None:
    probabilities, scale = values(0, TOKENS, EXPERTS).softmax(-1), 0.5 + values(1, EXPERTS).abs()
    weights, index = probabilities.topk(K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True) * scale[index]
    rule = find_rule(Choice(probabilities, weights, index), [scale])
    assert rule is not None and rule.name == "probability+scale"


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_choices_that_ignore_the_logits_have_no_rule(seed: int) -> None:
    index = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).topk(K).indices
    choice = Choice(values(seed, TOKENS, EXPERTS), torch.full((TOKENS, K), 0.5), index)
    assert find_rule(choice, [values(seed + 1, EXPERTS)], (4, 2)) is None


def test_weights_that_follow_no_score_have_no_rule() -> None:
    choice = decide(KINDS[0], values(0, TOKENS, EXPERTS), torch.zeros(EXPERTS))
    assert find_rule(Choice(choice.logits, choice.weights.flip(-1), choice.index)) is None


def test_a_choice_respects_groups_and_puts_the_best_first() -> None:
    rule = RoutingRule(groups=Groups(4, 1, best=1))
    assert rule.choose(torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 2.5, 0.0, 2.9]]), 2).tolist() == [[4, 5]]
