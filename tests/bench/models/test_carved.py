"""The carved reference model: cutting a feed-forward into experts, repairing it, building, keeping few experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from emoe_core.errors import CheckpointError, OptionError
from workbench.fetch import sha256_file
from workbench.models import reference as reference_model
from workbench.models.names import resolve_model
from workbench.models.reference.carved import build as builder
from workbench.models.reference.carved.carving import Shape, carve, contributions, router_start
from workbench.models.reference.carved.keeping import keeping, most_used, reroute
from workbench.models.reference.carved.layer import assemble, pack, unpack
from workbench.models.reference.carved.recipe import Recipe
from workbench.models.reference.carved.train import Carver, Plan
from workbench.models.reference.held_out import losses
from workbench.models.reference.recipe import ADAPTERS, DESCRIPTION, MANIFEST
from workbench.models.reference.tiny import tiny_tokenizer

HIDDEN, NEURONS = 32, 48
SHAPE = Shape(experts=4, top_k=2, shared=16)
PLAN = Plan(block_tokens=16, blocks=4, cluster_tokens=100, repairable=10.0)


def tiny_dense() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # as stored, so that building loses nothing
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def blocks() -> torch.Tensor:
    return torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(1))


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    feed_forward = tiny_dense().model.layers[0].mlp
    return tuple(getattr(feed_forward, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))


def parent_file(path: Path) -> SimpleNamespace:
    """Return the tiny parent with the interface of `DenseSource` that the builder uses."""
    model = tiny_dense()
    path.write_bytes(b"the tiny parent")
    return SimpleNamespace(
        path=path, config=model.config, tensor=lambda name: model.state_dict()[name].float(), tokenizer=tiny_tokenizer
    )


def carver(folder: Path, plan: Plan = PLAN, shape: Shape = SHAPE) -> Carver:
    return Carver(tiny_dense(), blocks(), shape, plan, seed=0, folder=folder)


def save(folder: Path, made: Carver, parent: SimpleNamespace) -> Path:
    description = {"parent": {"gguf_sha256": sha256_file(parent.path)}, "seed": 0}
    return Recipe.save(folder, made.finished, vars(made.shape), description).folder


@pytest.fixture(scope="module")
def carved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimpleNamespace, Path]:
    """The tiny parent, and the recipe of its carving."""
    folder = tmp_path_factory.mktemp("carved")
    parent = parent_file(folder / "parent.gguf")
    made = carver(folder / "state")
    assert made.run()
    return parent, save(folder / "recipe", made, parent)


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
    parent = parent_file(tmp_path / "parent.gguf")
    made = carver(tmp_path / "state", replace(PLAN, ridge=0.0), replace(SHAPE, top_k=SHAPE.experts))
    made.run()
    for parts in made.finished:
        parts["router"].zero_()
    path = builder.build(tmp_path / "built", save(tmp_path / "recipe", made, parent), source=parent)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert stock.config.model_type == "qwen2_moe"
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


def test_stopped_carving_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight, stopped, resumed = carver(tmp_path / "a"), carver(tmp_path / "b"), carver(tmp_path / "b")
    assert straight.run()
    assert not stopped.run(stop_after=1)
    assert resumed.run()
    for ours, theirs in zip(straight.finished, resumed.finished, strict=True):
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
    assert straight.losses == resumed.losses


def test_finished_layers_of_another_plan_are_refused(tmp_path: Path) -> None:
    carver(tmp_path).run(stop_after=1)
    with pytest.raises(OptionError, match="another plan, shape or seed"):
        carver(tmp_path, replace(PLAN, ridge=1.0)).run()


def test_the_built_checkpoint_computes_what_was_fitted(carved, tmp_path: Path) -> None:
    parent, recipe = carved
    path = builder.build(tmp_path / "built", recipe, source=parent)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    feed_forward = stock.model.layers[1].mlp
    made = assemble(
        SHAPE,
        tuple(parent.tensor(f"model.layers.1.mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
        Recipe.open(recipe).layer(1),
    )
    x = torch.randn(1, 50, HIDDEN, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(feed_forward(x)[0], made(x[0]), rtol=1e-4, atol=1e-5)


def test_building_twice_gives_the_same_bytes_and_verify_agrees(carved, tmp_path: Path) -> None:
    parent, recipe = carved
    first = builder.build(tmp_path / "a", recipe, source=parent)
    second = builder.build(tmp_path / "b", recipe, source=parent)
    assert builder.verify(first) == builder.verify(second)


def test_an_altered_recipe_and_one_of_another_kind_are_refused(carved, tmp_path: Path) -> None:
    _, recipe = carved
    for name in (ADAPTERS, DESCRIPTION):
        (tmp_path / name).write_bytes((recipe / name).read_bytes())
    content = bytearray((tmp_path / ADAPTERS).read_bytes())
    content[-1] ^= 1
    (tmp_path / ADAPTERS).write_bytes(content)
    with pytest.raises(CheckpointError, match="the recipe was altered"):
        Recipe.open(tmp_path)
    with pytest.raises(CheckpointError, match="kind 'carved', not 'upcycled'"):
        reference_model.build(tmp_path / "built", recipe, kind="upcycled")


def test_keeping_every_expert_changes_nothing_and_keeping_few_uses_only_these(carved, tmp_path: Path) -> None:
    parent, recipe = carved
    path = builder.build(tmp_path / "built", recipe, source=parent)
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


def test_the_committed_recipe_is_whole_and_small() -> None:
    recipe = Recipe.open()
    assert recipe.layers == 30 and recipe.shape == Shape()
    assert sum(entry.stat().st_size for entry in recipe.folder.iterdir()) < 20_000_000
    assert sorted(recipe.layer(29)["order"].tolist()) == list(range(1536))


@pytest.mark.reference
def test_the_built_model_has_the_checksums_of_the_recipe() -> None:
    if not reference_model.is_built(kind="carved"):
        pytest.skip("the carved model is not built here")
    found = reference_model.verify(kind="carved")
    manifest = json.loads((Recipe.open().folder / MANIFEST).read_text())["files"]
    assert {name: found[name] for name in manifest} == manifest
    assert str(resolve_model("carved")) == str(builder.ASSEMBLY.default_destination(Recipe.open()))
