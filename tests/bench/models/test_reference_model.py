"""The upcycled reference model: reading the parent, training, building, verifying."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from emoe_core.errors import CheckpointError, DataError, OptionError
from workbench.fetch import sha256_file
from workbench.models import reference as reference_model
from workbench.models.reference import dense
from workbench.models.reference.recipe import ADAPTERS, MANIFEST
from workbench.models.reference.summary import normalised_mutual_information, summarise
from workbench.models.reference.tiny import tiny_tokenizer
from workbench.models.reference.upcycled import build as builder
from workbench.models.reference.upcycled.mixture import Shape
from workbench.models.reference.upcycled.recipe import Recipe, save_recipe
from workbench.models.reference.upcycled.train import Plan, Trainer, next_token_loss

SHAPE = Shape(experts=4, top_k=2, rank=2)
PLAN = Plan(branch_steps=3, mix_steps=4, branch_batch=2, branch_length=16, mix_length=16, probe_tokens=32, save_every=2)


def tiny_dense() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class TinySource:
    """A dense parent in memory, with the interface of `DenseSource` that the builder uses."""

    def __init__(self, path: Path) -> None:
        self.loaded = tiny_dense()
        self.config = self.loaded.config
        self.path = path
        path.write_bytes(b"the tiny parent")

    def tensor(self, name: str) -> torch.Tensor:
        return self.loaded.state_dict()[name].float()

    def tokenizer(self):
        return tiny_tokenizer()


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(d * 16, d * 16 + 16, (200,), generator=generator) for d in range(SHAPE.experts)]


def trainer(folder: Path, plan: Plan = PLAN) -> Trainer:
    return Trainer(tiny_dense(), texts(), SHAPE, plan, seed=0, folder=folder)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, TinySource, Path]:
    """A trained tiny mixture, its parent and its recipe folder."""
    folder = tmp_path_factory.mktemp("recipe")
    source = TinySource(folder / "parent.gguf")
    trained = trainer(folder / "state")
    trained.run()
    sha256 = sha256_file(source.path)
    save_recipe(folder, trained.mixtures, {"parent": {"gguf_sha256": sha256}, "seed": 0})
    return trained, source, folder


def test_rotary_rows_are_restored_to_the_order_of_transformers() -> None:
    heads, head_dim, columns = 3, 8, 5
    original = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(-1, columns)
    # llama.cpp's own conversion: split each head in two halves, then interleave them.
    stored = original.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(original.shape)
    assert not np.array_equal(stored, original)
    assert np.array_equal(dense.restore_rotary_rows(stored, heads), original)


def test_an_altered_parent_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"not the released weights")
    with pytest.raises(DataError, match="were altered"):
        dense.check_gguf(path)


def test_stopped_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight")
    assert straight.run()
    for _ in range(4):  # stops inside branch stages, between them, and inside the joint phase
        stopped = trainer(tmp_path / "stopped")
        if stopped.run(stop_after=4):
            break
    assert stopped.run()
    pairs = zip(straight.adapters + straight.routers, stopped.adapters + stopped.routers, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert straight.losses == stopped.losses


def test_a_saved_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run(stop_after=2)
    with pytest.raises(OptionError, match="another plan or seed"):
        trainer(tmp_path, replace(PLAN, mix_steps=9)).run()


def test_the_built_checkpoint_is_the_trained_mixture(grown, tmp_path: Path) -> None:
    trained, source, folder = grown
    path = builder.build(tmp_path / "built", folder, source=source)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert stock.config.model_type == "mixtral"
    ids = torch.stack([text[:32] for text in texts()])
    for mixture in trained.mixtures:
        mixture.fixed_expert = None
    with torch.no_grad():
        expected = next_token_loss(trained.model, ids)
        found = next_token_loss(stock, ids)
        plain = next_token_loss(source.loaded, ids)
    # Storage in bfloat16 moves the loss far less than training did.
    assert abs(found - expected) < 0.1 * abs(plain - expected)


def test_building_twice_gives_the_same_bytes_and_verify_agrees(grown, tmp_path: Path) -> None:
    _, source, folder = grown
    first = builder.build(tmp_path / "a", folder, source=source)
    second = builder.build(tmp_path / "b", folder, source=source)
    assert builder.verify(first) == builder.verify(second)
    assert builder.build(first, folder, source=source) == first


def test_verify_names_an_altered_file(grown, tmp_path: Path) -> None:
    _, source, folder = grown
    path = builder.build(tmp_path / "built", folder, source=source)
    shard = sorted(path.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name):
        builder.verify(path)


def test_an_altered_recipe_is_refused(grown, tmp_path: Path) -> None:
    _, _, folder = grown
    for name in (ADAPTERS, "recipe.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    content = bytearray((tmp_path / ADAPTERS).read_bytes())
    content[-1] ^= 1
    (tmp_path / ADAPTERS).write_bytes(content)
    with pytest.raises(CheckpointError, match="the recipe was altered"):
        Recipe.open(tmp_path)


def test_a_recipe_of_another_parent_is_refused(grown, tmp_path: Path) -> None:
    _, _, folder = grown
    other = TinySource(tmp_path / "other.gguf")
    other.path.write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="belongs to other dense weights"):
        builder.build(tmp_path / "built", folder, source=other)
    assert not (tmp_path / "built").exists()


def test_a_folder_with_other_content_is_left_alone(grown, tmp_path: Path) -> None:
    _, source, folder = grown
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        builder.build(tmp_path, folder, source=source)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_mutual_information_is_one_for_one_expert_per_domain_and_zero_for_uniform() -> None:
    assert normalised_mutual_information(np.eye(4)) == pytest.approx(1.0)
    assert normalised_mutual_information(np.full((4, 4), 0.25)) == pytest.approx(0.0)


def test_summary_counts_shares_and_ratios() -> None:
    counts = np.zeros((2, 1, 1, 4), dtype=int)
    counts[0, 0, 0] = (6, 2, 1, 1)
    counts[1, 0, 0] = (0, 0, 5, 5)
    found = summarise(["a", "b"], np.array([9, 9]), np.log([4.0, 4.0]), np.log([2.0, 5.0]), counts)
    assert found["domains"]["a"]["ratio"] == pytest.approx(0.5)
    assert found["domains_below_dense"] == 1
    assert found["worst_ratio"] == pytest.approx(1.25)
    assert found["domains"]["a"]["best_half_mass"] == pytest.approx(0.8)
    assert found["layers"]["min_share"] == pytest.approx([0.1])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(OptionError, match="upcycled"):
        reference_model.build(kind="carved-in-stone")


def test_the_committed_recipe_is_whole_and_small() -> None:
    recipe = Recipe.open()
    assert recipe.layers == 30 and recipe.shape == Shape()
    assert sum(entry.stat().st_size for entry in recipe.folder.iterdir()) < 26_000_000
    with safe_open(recipe.folder / ADAPTERS, "pt") as file:
        assert len(file.keys()) == 30 * 7


@pytest.mark.reference
def test_the_built_reference_model_has_the_checksums_of_the_recipe() -> None:
    if not reference_model.is_built():
        pytest.skip("the reference model is not built here")
    found = reference_model.verify()
    manifest = json.loads((Recipe.open().folder / MANIFEST).read_text())["files"]
    assert {name: found[name] for name in manifest} == manifest
