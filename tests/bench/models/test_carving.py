"""Carving: cutting a feed-forward into experts, finding routers, repairing, keeping few experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_parent import HIDDEN, NEURONS, VOCAB, TinyParent, tiny_dense
from torch.nn import functional
from transformers import AutoModelForCausalLM

from emoe_core.errors import OptionError
from recipes.carved_training import Carver, Plan
from recipes.carving import Shape, carve, contributions, router_start
from recipes.held_out import losses
from recipes.keeping import keeping, most_used, reroute
from workbench.fetch import sha256_file
from workbench.models.reference.carved.build import build
from workbench.models.reference.carved.layer import assemble, pack, unpack
from workbench.models.reference.carved.recipe import Recipe

SHAPE = Shape(experts=4, top_k=2, shared=16)
PLAN = Plan(block_tokens=16, blocks=4, cluster_tokens=100, repairable=10.0)


def blocks() -> torch.Tensor:
    return torch.randint(0, VOCAB, (40, 16), generator=torch.Generator().manual_seed(1))


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    feed_forward = tiny_dense().model.layers[0].mlp
    return tuple(getattr(feed_forward, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))


def carver(folder: Path, plan: Plan = PLAN, shape: Shape = SHAPE) -> Carver:
    return Carver(tiny_dense(), blocks(), shape, plan, seed=0, folder=folder)


def build_from(made: Carver, folder: Path) -> Path:
    parent = TinyParent(folder / "parent.gguf")
    description = {"parent": {"gguf_sha256": sha256_file(parent.path)}, "seed": 0}
    recipe = Recipe.save(folder / "recipe", made.finished, vars(made.shape), description)
    return build(folder / "built", recipe.folder, source=parent)


def test_all_experts_at_equal_weights_are_the_dense_feed_forward() -> None:
    shape = replace(SHAPE, top_k=SHAPE.experts)
    dense = matrices()
    gate, up, down = dense
    x = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(2))
    hidden = functional.silu(x @ gate.T) * (x @ up.T)
    order = carve(contributions(hidden, down), shape, torch.Generator().manual_seed(0))
    made = assemble(shape, dense, {"order": order, "router": torch.zeros(shape.experts, HIDDEN)})
    assert torch.allclose(made(x), hidden @ down.T, rtol=1e-4, atol=1e-5)


def test_a_built_checkpoint_with_all_experts_at_equal_weights_is_the_dense_model(tmp_path: Path) -> None:
    made = carver(tmp_path / "state", replace(PLAN, ridge=0.0), replace(SHAPE, top_k=SHAPE.experts))
    made.run()
    for parts in made.finished:
        parts["router"].zero_()
    stock = AutoModelForCausalLM.from_pretrained(build_from(made, tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(blocks()).logits, tiny_dense()(blocks()).logits, rtol=1e-3, atol=1e-4)


def test_every_neuron_lies_in_one_expert_and_the_loudest_are_shared() -> None:
    contribution = torch.rand(200, NEURONS, generator=torch.Generator().manual_seed(3))
    contribution[:, 5:21] += 2
    order = carve(contribution, SHAPE, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(NEURONS))
    assert set(order[: SHAPE.shared].tolist()) == set(range(5, 21))


def test_neurons_that_work_together_share_an_expert() -> None:
    generator = torch.Generator().manual_seed(4)
    shape = Shape(experts=4, top_k=2, shared=0)
    team = torch.arange(NEURONS) % 4
    on = torch.randint(0, 4, (300,), generator=generator)
    contribution = 0.1 * torch.rand(300, NEURONS, generator=generator) + (on[:, None] == team)
    order = carve(contribution, shape, generator)
    assert all(len(set(team[piece].tolist())) == 1 for piece in order.view(4, -1))


def test_the_router_picks_the_expert_with_most_energy() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(500, HIDDEN, generator=generator)
    energy = (x @ torch.randn(HIDDEN, 4, generator=generator)).exp()
    router = router_start(x, energy, spread=0.05)
    assert ((x @ router.T).argmax(1) == energy.argmax(1)).float().mean() > 0.9
    assert float((x @ router.T).std(dim=1).mean()) == pytest.approx(0.05, rel=1e-3)


def test_packed_repairs_are_the_repair_within_half_a_step() -> None:
    repair = torch.randn(HIDDEN, NEURONS, generator=torch.Generator().manual_seed(6))
    repair[:, 3] = 0
    stored = pack(repair)
    assert stored["codes"].shape == (HIDDEN, NEURONS // 2)
    error = (unpack(stored["codes"]) * stored["steps"].float() - repair).abs()
    assert bool((error <= 0.53 * repair.abs().amax(dim=0) / 7 + 1e-9).all())


def test_neurons_that_do_not_divide_are_refused() -> None:
    with pytest.raises(OptionError, match="cannot be cut into 5"):
        Shape(experts=5, top_k=2, shared=16).width(NEURONS)


def test_the_repair_brings_every_layer_closer_to_the_parent(tmp_path: Path) -> None:
    made = carver(tmp_path)
    made.run()
    assert all(layer["repaired"] < layer["carved"] for layer in made.losses)


def test_a_layer_that_a_few_tokens_decide_is_left_as_carved(tmp_path: Path) -> None:
    made = carver(tmp_path, replace(PLAN, repairable=0.0))
    made.run()
    assert all(
        "codes" not in parts and "repaired" not in layer
        for parts, layer in zip(made.finished, made.losses, strict=True)
    )


def test_keeping_every_expert_changes_nothing_and_keeping_few_uses_only_these(tmp_path: Path) -> None:
    made = carver(tmp_path / "state")
    made.run()
    path = build_from(made, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    ids = blocks()[:4]
    plain, _ = losses(stock, ids)
    with keeping(stock, torch.ones(4, 2, SHAPE.experts, dtype=torch.bool)):
        assert losses(stock, ids)[0] == pytest.approx(plain, rel=1e-6)
    one = most_used(torch.arange(SHAPE.experts).expand(4, 2, -1), 1)
    with keeping(stock, one):
        assert losses(stock, ids)[0] != pytest.approx(plain, rel=1e-6)
    assert losses(stock, ids)[0] == plain
    logits = torch.randn(10, SHAPE.experts, generator=torch.Generator().manual_seed(8))
    kept = torch.tensor([True, False, True, True]).expand(10, -1)
    weights, chosen = reroute(logits, kept, SHAPE.top_k)
    assert bool((chosen != 1).all())
    assert torch.allclose(weights.sum(1), logits.softmax(-1).topk(SHAPE.top_k).values.sum(1))
