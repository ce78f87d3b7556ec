"""Rerouting: who is replaced, by whom, with what weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe_core
from emoe_core.experts import router_of
from emoe_core.rerouting import RULES, Choice, replaceable, shares_of, substitute
from emoe_core.tasks import Profile, TaskProfile
from workbench.reference_model.tiny import tiny_moe

SOFTMAX = next(rule for rule in RULES if rule.name == "softmax")


def top_k_choice(tokens: int, experts: int, k: int, seed: int) -> Choice:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights, index = logits.softmax(-1).topk(k, dim=-1)
    return Choice(logits, weights / weights.sum(-1, keepdim=True), index)


@settings(max_examples=60, deadline=None)
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


def test_zero_tolerance_never_replaces_even_a_zero_weight() -> None:
    weights, absent = torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])
    assert not bool(replaceable(weights, absent, torch.zeros(1)).any())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sets(st.integers(0, 7), min_size=1))
def test_substitutes_are_available_distinct_and_keep_the_total(seed: int, k: int, resident: set[int]) -> None:
    choice = top_k_choice(16, 8, k, seed)
    available = torch.zeros(8, dtype=torch.bool)
    available[sorted(resident)] = True
    replace = ~available[choice.index]
    if not bool(replace.any()):
        return
    served = substitute(choice, replace, available, SOFTMAX, torch.nn.Identity())
    untouched = ~replace.any(-1)
    assert torch.equal(served.index[untouched], choice.index[untouched])
    assert torch.equal(served.weights[untouched], choice.weights[untouched])
    torch.testing.assert_close(served.weights.sum(-1), choice.weights.sum(-1))
    for token in range(16):
        used = served.index[token][served.weights[token] > 0].tolist()
        assert set(used) <= resident
        assert len(used) == len(set(used)) == min(k, len(resident))


def test_shares_sum_to_one() -> None:
    torch.testing.assert_close(shares_of(torch.tensor([[0.2, 0.1]])).sum(-1), torch.ones(1))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_every_family_reroutes_and_full_residency_stays_exact(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family=family, seed=2)
    ids = torch.arange(20).unsqueeze(0)
    options = {"pack_dir": tmp_path, "predictor": None, "dtype": "float32"}
    with torch.no_grad():
        with emoe_core.load(path, budget="100%", **options) as engine:
            exact = engine.model(ids).logits
        with emoe_core.load(path, budget="100%", tolerance=1.0, **options) as engine:
            assert torch.equal(engine.model(ids).logits, exact)
        with emoe_core.load(path, budget="3 slots", tolerance=1.0, **options) as engine:
            assert router_of(engine.model.get_submodule(engine.index.layers[0].name)) is not None
            engine.model(ids)
            filled = engine.stats().counters.loads
            lossy = engine.model(ids).logits
            counters = engine.stats().counters
    assert counters.loads == filled == 3 * len(engine.index.layers), "residents come once, then nothing is loaded"
    assert counters.reroutes > 0
    assert not torch.equal(lossy, exact)
    assert bool(torch.isfinite(lossy).all())


def test_more_tolerance_means_fewer_loads(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=2)
    ids = torch.arange(40).unsqueeze(0)
    loads = []
    for tolerance in (0.0, 0.3, 0.6, 1.0):
        with emoe_core.load(
            path, budget="3 slots", tolerance=tolerance, pack_dir=tmp_path, predictor=None, record=True
        ) as engine:
            with torch.no_grad():
                engine.model(ids)
                engine.model(ids)
            loads.append(engine.stats().counters.token_loads)
            trace = engine.trace()
        replaced = (trace.chosen[..., None] != trace.served[..., None, :]).all(-1)
        share = trace.weight.astype(float) / trace.weight.astype(float).sum(-1, keepdims=True)
        assert ((share * replaced).sum(-1) <= tolerance + 2e-3).all()
    assert loads == sorted(loads, reverse=True)
    assert loads[0] > loads[-1]


def test_insensitive_task_is_rerouted_while_a_sensitive_one_stays_exact(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", family="mixtral", seed=2)
    prompt, answer = list(range(20)), list(range(30, 36))
    with emoe_core.load(path, budget="100%", pack_dir=tmp_path, predictor=None) as engine:
        expected = engine.score([(prompt, answer)], ["qa"])[0].logits
        layers, model_hash = len(engine.index.layers), engine.index.source_hash
    tasks = {"classification": TaskProfile("classification", (False,) * layers, 8.0)}
    profile = Profile(model_hash, "none", layers, tasks)
    with emoe_core.load(path, budget="3 slots", pack_dir=tmp_path, predictor=None, profile=profile) as engine:
        exact = engine.score([(prompt, answer)], ["qa"])[0].logits
        before = engine.stats().counters
        lossy = engine.score([(prompt, answer)], ["classification"])[0].logits
        moved = engine.stats().counters.since(before)
    assert torch.equal(exact, expected)
    assert not torch.equal(lossy, expected)
    assert moved.loads == 0 and moved.reroutes > 0
