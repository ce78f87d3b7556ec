"""The grouped form of a layer's experts gives eager's bits, whatever order weights arrive in, or is not used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import emoe_core
from emoe_core.experts import compute as expert_compute
from emoe_core.experts.compute import ExpertForm, Tensors, find_form
from emoe_core.experts.layer import LayerHandle
from workbench.models.reference.tiny import tiny_moe

EXPERTS, HIDDEN, INNER = 6, 24, 40


class Lent:
    """A lease whose experts arrive in a given order."""

    def __init__(self, tensors: list[Tensors], order: Iterable[int], arriving: Iterable[int]) -> None:
        self.order = tuple(order)
        self._tensors = tensors
        self._arriving = list(arriving)
        self.lowest: list[bool] = []

    def __getitem__(self, expert: int) -> Tensors:
        return self._tensors[expert]

    def take(self, lowest: bool = False) -> tuple[int, Tensors] | None:
        if not self._arriving:
            return None
        expert = min(self._arriving) if lowest else self._arriving[0]
        self._arriving.remove(expert)
        self.lowest.append(lowest)
        return expert, self._tensors[expert]


class Module(torch.nn.Module):
    """An experts module as transformers describes them."""

    is_transposed = has_bias = has_post_expert_norm = False
    has_gate = is_concatenated = True

    def _apply_gate(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = states.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def parameters(dtype: torch.dtype, seed: int = 0) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "gate_up_proj": torch.randn(2 * INNER, HIDDEN, generator=generator).to(dtype),
            "down_proj": torch.randn(HIDDEN, INNER, generator=generator).to(dtype),
        }
        for _ in range(EXPERTS)
    ]


def eager(lease: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """What transformers' families do: experts ascending (or, by sign, descending), a token's place first."""
    total = torch.zeros_like(hidden)
    for expert in sorted(set(index.flatten().tolist()), reverse=sign < 0):
        place, token = torch.where((index == expert).t())
        gate, up = linear(hidden[token], lease[expert]["gate_up_proj"]).chunk(2, dim=-1)
        part = linear(torch.nn.functional.silu(gate) * up, lease[expert]["down_proj"])
        total.index_add_(0, token, (part * weights[token, place, None]).to(total.dtype))
    return total


def test_experts_of_a_transformers_that_knows_no_norm_after_experts_have_none() -> None:
    class Older(Module):
        """As transformers 5.17 describes them."""

        def __getattribute__(self, name: str) -> Any:
            if name == "has_post_expert_norm":
                raise AttributeError(name)
            return super().__getattribute__(name)

    tensors, index = parameters(torch.float32), torch.tensor([[1, 3], [3, 0]])
    hidden, weights = torch.randn(2, HIDDEN), torch.rand(2, 2)
    lease = [Lent(tensors, [0, 1, 3], [0, 1, 3]) for _ in range(2)]
    old, new = (
        ExpertForm(kind(), True).layer(one, hidden, index, weights)
        for kind, one in zip((Older, Module), lease, strict=True)
    )
    assert torch.equal(old, new)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    k=st.integers(1, 4),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    room=st.sampled_from([0, 200, 1 << 20]),
    data=st.data(),
)
def test_results_do_not_depend_on_the_order_of_arrival(tokens, k, seed, dtype, room, data) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator)
    tensors, order = parameters(dtype, seed), sorted(set(index.flatten().tolist()))
    lease = Lent(tensors, order, data.draw(st.permutations(order)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_compute, "WAITING_BYTES", room)
        got = ExpertForm(Module(), True).layer(lease, hidden, index, weights)
    assert torch.equal(got, eager(lease, hidden, index, weights))


def test_an_expert_chosen_twice_by_a_token_counts_twice() -> None:
    lease = Lent(parameters(torch.float32), [1], [1])
    index, weights = torch.tensor([[1, 1]]), torch.tensor([[0.5, 0.25]])
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
    got = ExpertForm(Module(), True).layer(lease, hidden, index, weights)
    assert torch.equal(got, eager(lease, hidden, index, weights))


def test_an_expert_outside_the_lease_gives_nothing() -> None:
    tensors = parameters(torch.float32)
    index, weights = torch.tensor([[0, 4], [0, 1]]), torch.full((2, 2), 0.5)
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
    got = ExpertForm(Module(), True).layer(Lent(tensors, [0, 1], [1, 0]), hidden, index, weights)
    full = eager(Lent(tensors, [0, 1, 4], []), hidden, index, weights)
    assert torch.equal(got[1], full[1])
    assert not torch.equal(got[0], full[0])


def test_a_form_is_proven_on_the_memory_that_will_hold_the_experts() -> None:
    samples = [dict(item) for item in parameters(torch.float32)[:2]]
    assert isinstance(find_form(Module(), eager, samples, EXPERTS).form, ExpertForm)


def other_gate(lease: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(hidden)
    for expert in sorted(set(index.flatten().tolist())):
        place, token = torch.where((index == expert).t())
        up, gate = linear(hidden[token], lease[expert]["gate_up_proj"]).chunk(2, dim=-1)
        part = linear(torch.nn.functional.silu(gate) * up, lease[expert]["down_proj"])
        total.index_add_(0, token, (part * weights[token, place, None]).to(total.dtype))
    return total


def unweighted(lease: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return eager(lease, hidden, index, torch.ones_like(weights))


def in_reverse(lease: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    offset = torch.full_like(hidden, 0.125)
    return eager(lease, hidden, index, weights, sign=-1) + offset - offset


@pytest.mark.parametrize("code", [other_gate, unweighted, in_reverse])
def test_code_that_does_something_else_is_not_replaced(code: Any) -> None:
    samples = [dict(item) for item in parameters(torch.bfloat16)[:2]]
    found = find_form(Module(), code, samples, EXPERTS)
    assert found.form is None and found.failure


def test_where_stock_computes_from_memory_of_its_own_the_proof_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def crooked(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A product that rounds by where its operand starts, as some libraries' do."""
        return linear(states, weight) * (1 + (weight.data_ptr() % 64 > 0) / 64)

    def code(lease: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for expert in sorted(set(index.flatten().tolist())):
            place, token = torch.where((index == expert).t())
            gate, up = crooked(hidden[token], lease[expert]["gate_up_proj"]).chunk(2, dim=-1)
            part = crooked(torch.nn.functional.silu(gate) * up, lease[expert]["down_proj"])
            total.index_add_(0, token, (part * weights[token, place, None]).to(total.dtype))
        return total

    monkeypatch.setattr(expert_compute, "linear", crooked)
    straight = [dict(item) for item in parameters(torch.float32)[:2]]
    askew = [
        {name: torch.empty(one.numel() + 2)[2:].view(one.shape) for name, one in item.items()} for item in straight
    ]
    assert find_form(Module(), code, askew, EXPERTS).form is not None, "within the same memory nobody sees it"
    assert find_form(Module(), code, askew, EXPERTS, fresh=True).form is None
    assert find_form(Module(), code, straight, EXPERTS, fresh=True).form is not None


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_known_families_are_computed_in_a_proven_form(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / family, family=family, seed=3, dtype=torch.float32)
    with emoe_core.load(path, budget="1 slots", pack_dir=tmp_path) as engine:
        handles = [module.__dict__.get("_emoe_layer") for module in engine.model.modules()]
        found = [handle for handle in handles if isinstance(handle, LayerHandle)]
    assert found
    assert all(isinstance(handle.form, ExpertForm) for handle in found)
