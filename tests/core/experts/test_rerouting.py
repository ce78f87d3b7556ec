"""Rerouting: who is replaced, by whom, with what weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import emoe_core
from emoe_core.errors import UnsupportedFamilyError
from emoe_core.experts.rerouting import (
    Rerouted,
    drop,
    outranked,
    replaceable,
    reroute,
    reroute_token,
    shares_of,
    substitute,
)
from emoe_core.experts.routing_rules import Choice, Groups, RoutingRule
from workbench.models.reference.tiny import tiny_moe

SOFTMAX = RoutingRule()
ONE_GROUP_OF_FOUR = RoutingRule(groups=Groups(4, 1, best=2))


def top_k_choice(tokens: int, experts: int, k: int, seed: int) -> Choice:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights, index = logits.softmax(-1).topk(k, dim=-1)
    return Choice(logits, weights / weights.sum(-1, keepdim=True), index)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0, 1), st.integers(1, 7))
def test_loss_stays_within_tolerance_and_smallest_weights_go_first(
    seed: int, k: int, tolerance: float, resident: int
) -> None:
    choice = top_k_choice(16, 8, k, seed)
    absent = choice.index >= resident
    replace = replaceable(choice.weights, absent, torch.full((16,), tolerance))
    lost = (choice.weights * replace).sum(-1) / choice.weights.sum(-1)
    assert not bool((replace & ~absent).any())
    assert bool((lost <= tolerance + 1e-5).all())
    for token in range(16):
        given_up = choice.weights[token][replace[token]]
        kept_absent = choice.weights[token][absent[token] & ~replace[token]]
        if len(given_up) and len(kept_absent):
            assert given_up.max() <= kept_absent.min() + 1e-6
    if tolerance >= 1:
        assert torch.equal(replace, absent)
    if tolerance == 0:
        assert not bool(replace.any())


@settings(max_examples=80)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sets(st.integers(0, 7)), st.floats(0, 5), st.floats(0, 5))
def test_a_higher_bias_outbids_more_but_never_the_best_nor_what_is_there(
    seed: int, k: int, resident: set[int], one: float, other: float
) -> None:
    choice = top_k_choice(16, 8, k, seed)
    available = torch.zeros(8, dtype=torch.bool)
    available[sorted(resident)] = True
    low, high = (outranked(choice, available, bias, SOFTMAX) for bias in sorted((one, other)))
    assert not bool((low & ~high).any())
    assert not bool(high[:, 0].any()), "the best expert is kept"
    assert not bool((high & available[choice.index]).any())
    assert bool((high.sum(-1) <= len(resident)).all()), "nobody falls out without somebody to take the place"
    # A bonus beyond the spread lets every available expert pass every other but the best.
    every = outranked(choice, available, 1.01, SOFTMAX)
    free = (available.sum() - available[choice.index].sum(-1)).clamp_min(0)
    absent = ~available[choice.index]
    absent[:, 0] = False
    assert torch.equal(every.sum(-1), torch.minimum(absent.sum(-1), free))


def test_zero_tolerance_never_replaces_even_a_zero_weight() -> None:
    weights, absent = torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])
    assert not bool(replaceable(weights, absent, torch.zeros(1)).any())


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1))
def test_substitutes_are_available_distinct_and_keep_the_total(seed: int, k: int, resident: set[int]) -> None:
    choice = top_k_choice(16, 8, k, seed)
    available = torch.zeros(8, dtype=torch.bool)
    available[sorted(resident)] = True
    replace = ~available[choice.index]
    if not bool(replace.any()):
        return
    served = substitute(choice, replace, available, SOFTMAX)
    untouched = ~replace.any(-1)
    assert torch.equal(served.index[untouched], choice.index[untouched])
    assert torch.equal(served.weights[untouched], choice.weights[untouched])
    torch.testing.assert_close(served.weights.sum(-1), choice.weights.sum(-1))
    for token in range(16):
        used = served.index[token][served.weights[token] > 0].tolist()
        assert set(used) <= resident
        assert len(used) == len(set(used)) == min(k, len(resident))


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1), st.floats(0, 1, width=32))
def test_what_is_dropped_weighs_nothing_and_the_rest_keeps_the_total_and_its_proportions(
    seed: int, k: int, resident: set[int], tolerance: float
) -> None:
    choice = top_k_choice(16, 8, k, seed)
    served = reroute(choice, resident, 8, [tolerance], None)
    if served is None:
        return
    marks, there = served.replaced, resident | set(choice.index[~served.replaced].tolist())
    assert not set(choice.index[marks].tolist()) & there
    assert torch.equal(served.index[~marks], choice.index[~marks])
    assert not bool(served.weights[marks].any())
    assert set(served.index.flatten().tolist()) <= there, "nothing else needs to be in a slot"
    untouched, emptied = ~marks.any(-1), marks.all(-1)
    assert torch.equal(served.weights[untouched], choice.weights[untouched])
    kept = ~untouched & ~emptied
    torch.testing.assert_close(served.weights[kept].sum(-1), choice.weights[kept].sum(-1))
    torch.testing.assert_close(shares_of(served.weights)[kept], shares_of(choice.weights.masked_fill(marks, 0.0))[kept])
    assert tolerance == 1 or not bool(emptied.any()), "below 1 a token keeps or loads its best expert"


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1), st.floats(0, 1))
def test_dropping_gives_up_what_rerouting_would(seed: int, k: int, resident: set[int], tolerance: float) -> None:
    choice = top_k_choice(16, 8, k, seed)
    dropped, rerouted = (reroute(choice, resident, 8, [tolerance], rule) for rule in (None, SOFTMAX))
    assert (dropped is None) == (rerouted is None)
    assert dropped is None or rerouted is None or torch.equal(dropped.replaced, rerouted.replaced)


def test_a_token_that_loses_all_its_experts_gets_nothing() -> None:
    choice = Choice(torch.zeros(1, 4), torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 1]]))
    served = drop(choice, torch.tensor([[True, True]]), 3)
    assert served.index.tolist() == [[3, 3]] and served.weights.tolist() == [[0.0, 0.0]]


def reroute_in_general(
    choice: Choice, present: set[int], tolerance: float, rule: RoutingRule | None
) -> Rerouted | None:
    available = torch.zeros(choice.logits.shape[1], dtype=torch.bool)
    available[sorted(present)] = True
    missing = ~available[choice.index]
    replace = replaceable(choice.weights, missing, torch.tensor([tolerance]))
    available[choice.index[missing & ~replace]] = True
    replace &= ~available[choice.index]
    if not bool(replace.any()):
        return None
    if rule is None:
        return drop(choice, replace, min(available.nonzero().flatten().tolist()))
    return substitute(choice, replace, available, rule)


@settings(max_examples=200)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.sets(st.integers(0, 7), min_size=1),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "drop"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([None, Groups(4, 1, best=2), Groups(2, 1, best=1), Groups(4, 2, best=2)]),
)
def test_a_single_token_is_rerouted_to_the_same_experts_and_bits_as_among_many(
    seed: int,
    k: int,
    present: set[int],
    tolerance: float,
    score: str,
    dtype: torch.dtype,
    corrected: bool,
    groups: Groups | None,
) -> None:
    choice = top_k_choice(1, 8, k, seed)
    choice = Choice(choice.logits.to(dtype), choice.weights.to(dtype), choice.index)
    correction = torch.randn(8, generator=torch.Generator().manual_seed(seed + 1)) if corrected else None
    rule = None
    if score != "drop":
        rule = RoutingRule(choice_score=score, weight_score=score, correction=correction, groups=groups)
    alone = reroute_token(choice, present, tolerance, rule)
    general = reroute_in_general(choice, present, tolerance, rule)
    if general is None:
        assert alone is None
        return
    assert alone is not None
    assert torch.equal(alone.replaced, general.replaced)
    assert torch.equal(alone.index, general.index)
    assert torch.equal(alone.weights, general.weights) and alone.weights.dtype == general.weights.dtype


def test_shares_sum_to_one() -> None:
    torch.testing.assert_close(shares_of(torch.tensor([[0.2, 0.1]])).sum(-1), torch.ones(1))


def test_the_group_limit_holds_while_its_groups_have_somebody_and_is_lifted_otherwise() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]])
    choice = Choice(logits, torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 1]]))
    assert ONE_GROUP_OF_FOUR.group_limit(logits).tolist() == [[True, True, False, False, False, False, False, False]]
    served = {}
    for name, resident in (("inside", [1, 2, 7]), ("outside", [2, 7])):
        available = torch.zeros(8, dtype=torch.bool)
        available[resident] = True
        served[name] = substitute(choice, ~available[choice.index], available, ONE_GROUP_OF_FOUR).index[0].tolist()
    assert served == {"inside": [2, 1], "outside": [2, 7]}


def test_a_bias_protects_the_best_expert_within_the_groups_and_nobody_outside_bids() -> None:
    # The best expert of all, 7, lies outside the chosen group (0, 1), whose two best sum to more.
    logits = torch.tensor([[4.0, 3.9, 0.0, 0.0, 0.0, 0.0, -9.0, 5.0]])
    choice = Choice(logits, torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 1]]))
    available = torch.zeros(8, dtype=torch.bool)
    available[[2, 7]] = True
    assert not bool(outranked(choice, available, 3.0, ONE_GROUP_OF_FOUR).any()), "nobody in the group can take a place"


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("mixtral", "softmax"),
        ("qwen2_moe", "softmax"),
        ("qwen3_moe", "softmax"),
        ("olmoe", "softmax"),
        ("gpt_oss", "softmax"),
        ("deepseek_v3", "sigmoid+bias+groups"),
    ],
)
def test_the_rule_of_every_tested_family_is_found(family: str, rule: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=2)
    with emoe_core.load(path, budget="50%", pack_dir=tmp_path) as engine:
        modules = [engine.model.get_submodule(layer.name) for layer in engine.index.layers]
        assert {module.__dict__["_emoe_layer"].rule.name for module in modules} == {rule}


def test_a_router_that_no_rule_explains_cannot_be_rerouted_but_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=2)
    plain = MixtralTopKRouter.forward

    def contrary(self: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, _ = plain(self, hidden)
        return logits, weights, (-logits).topk(weights.shape[-1], dim=-1).indices

    monkeypatch.setattr(MixtralTopKRouter, "forward", contrary)
    with pytest.raises(UnsupportedFamilyError, match=r"mixtral.*tolerance=0.*on_miss=\"drop\""):
        emoe_core.load(path, budget="50%", tolerance=1.0, pack_dir=tmp_path)
    lossy = {"tolerance": 1.0, "on_miss": "drop", "predictor": None}
    with emoe_core.load(path, budget="2 slots", pack_dir=tmp_path, **lossy) as engine, torch.no_grad():
        assert engine.reroutable
        assert bool(torch.isfinite(engine.model(torch.arange(12).unsqueeze(0)).logits).all())
        assert engine.stats().counters.drops > 0
        with pytest.raises(UnsupportedFamilyError, match="cannot be rerouted"):
            engine.restart(on_miss="reroute")
    with emoe_core.load(path, budget="50%", pack_dir=tmp_path) as engine, torch.no_grad():
        assert bool(torch.isfinite(engine.model(torch.arange(12).unsqueeze(0)).logits).all())
