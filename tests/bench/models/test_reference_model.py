"""The embedded models grown from a parent, each kind alike: computing a recipe, building from it, verifying it.

The native kind, trained from scratch, is in test_native_recipe.py; what is built of any kind is checked here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_parent import HIDDEN, VOCAB, TinyParent, tiny_dense
from transformers import AutoModelForCausalLM, PreTrainedModel

from emoe_core.errors import CheckpointError, DataError, OptionError
from recipes import carved_training, carving, mixture, upcycled_training
from recipes.summary import normalised_mutual_information, summarise
from recipes.upcycled_training import save_recipe
from workbench.fetch import sha256_file
from workbench.models import reference
from workbench.models.names import resolve_model
from workbench.models.reference import EMBEDDED, dense
from workbench.models.reference.carved.build import ASSEMBLY as CARVED
from workbench.models.reference.carved.layer import assemble
from workbench.models.reference.checkpoint import Assembly
from workbench.models.reference.native.build import ASSEMBLY as NATIVE
from workbench.models.reference.recipe import ADAPTERS, DESCRIPTION, MANIFEST
from workbench.models.reference.upcycled.build import ASSEMBLY as UPCYCLED


def texts() -> list[torch.Tensor]:
    """Return token ids of four domains, each with words of its own."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(domain * 16, domain * 16 + 16, (200,), generator=generator) for domain in range(4)]


def described(parent: TinyParent) -> dict[str, Any]:
    return {"parent": {"gguf_sha256": sha256_file(parent.path)}, "seed": 0}


class Upcycling:
    """Training steps that can be stopped inside branch stages, between them, and inside the joint phase."""

    assembly: Assembly = UPCYCLED
    stop_after = 4
    shape = mixture.Shape(experts=4, top_k=2, rank=2)
    plan = upcycled_training.Plan(
        branch_steps=3, mix_steps=4, branch_batch=2, branch_length=16, mix_length=16, probe_tokens=32, save_every=2
    )
    other_plan = replace(plan, mix_steps=9)
    committed_bytes = 26_000_000

    def work(self, folder: Path, plan: upcycled_training.Plan | None = None) -> upcycled_training.Trainer:
        return upcycled_training.Trainer(tiny_dense(), texts(), self.shape, plan or self.plan, seed=0, folder=folder)

    def tensors(self, made: upcycled_training.Trainer) -> list[torch.Tensor]:
        return [*made.adapters, *made.routers]

    def save(self, folder: Path, made: upcycled_training.Trainer, parent: TinyParent) -> Path:
        return save_recipe(folder, made.mixtures, described(parent)).folder

    def check(self, built: PreTrainedModel, made: upcycled_training.Trainer, parent: TinyParent, recipe: Path) -> None:
        """See that the built model is the trained mixture: storing it moves the loss far less than training did."""
        assert built.config.model_type == "mixtral"
        ids = torch.stack([text[:32] for text in texts()])
        for layer in made.mixtures:
            layer.fixed_expert = None
        with torch.no_grad():
            models = (built, made.model, parent.model)
            found, expected, plain = (upcycled_training.next_token_loss(model, ids) for model in models)
        assert abs(found - expected) < 0.1 * abs(plain - expected)

    def is_whole(self, layer: dict[str, torch.Tensor]) -> bool:
        """Whether a committed layer has its router, and two factors for each of three matrices."""
        return len(layer) == 7


class Carving:
    """Layers that are carved, and repaired, one after the other."""

    assembly: Assembly = CARVED
    stop_after = 1
    shape = carving.Shape(experts=4, top_k=2, shared=16)
    plan = carved_training.Plan(block_tokens=16, blocks=4, cluster_tokens=100, repairable=10.0)
    other_plan = replace(plan, ridge=1.0)
    committed_bytes = 20_000_000

    def work(self, folder: Path, plan: carved_training.Plan | None = None) -> carved_training.Carver:
        blocks = torch.randint(0, VOCAB, (40, 16), generator=torch.Generator().manual_seed(1))
        return carved_training.Carver(tiny_dense(), blocks, self.shape, plan or self.plan, seed=0, folder=folder)

    def tensors(self, made: carved_training.Carver) -> list[torch.Tensor]:
        return [parts[name] for parts in made.finished for name in sorted(parts)]

    def save(self, folder: Path, made: carved_training.Carver, parent: TinyParent) -> Path:
        return self.assembly.recipe.save(folder, made.finished, vars(made.shape), described(parent)).folder

    def check(self, built: PreTrainedModel, made: carved_training.Carver, parent: TinyParent, recipe: Path) -> None:
        """See that a layer of the built model computes what was fitted."""
        assert built.config.model_type == "qwen2_moe"
        matrices = tuple(parent.tensor(f"model.layers.1.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        fitted = assemble(self.shape, matrices, self.assembly.recipe.open(recipe).layer(1))
        x = torch.randn(1, 50, HIDDEN, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            assert torch.allclose(built.model.layers[1].mlp(x)[0], fitted(x[0]), rtol=1e-4, atol=1e-5)

    def is_whole(self, layer: dict[str, torch.Tensor]) -> bool:
        """Whether a committed layer orders every neuron of the parent."""
        return sorted(layer["order"].tolist()) == list(range(1536))


KINDS: dict[str, Any] = {"upcycled": Upcycling(), "carved": Carving()}
ASSEMBLIES = {assembly.recipe.kind: assembly for assembly in (UPCYCLED, CARVED, NATIVE)}


@dataclass(frozen=True)
class Grown:
    """A finished tiny recipe of a kind, and what it was computed with."""

    kind: Any
    made: Any
    parent: TinyParent
    recipe: Path

    def build(self, folder: Path) -> Path:
        return self.kind.assembly.build(folder, self.recipe, source=self.parent)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


@pytest.fixture(scope="module", params=KINDS)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    parent, made = TinyParent(folder / "parent.gguf"), kind.work(folder / "state")
    assert made.run()
    return Grown(kind, made, parent, kind.save(folder / "recipe", made, parent))


def test_every_kind_is_tested_here() -> None:
    assert {*KINDS, NATIVE.recipe.kind} == set(EMBEDDED.values()) == set(ASSEMBLIES)
    assert all(kind.assembly is ASSEMBLIES[name] for name, kind in KINDS.items())


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


def test_stopped_work_resumes_to_the_same_bits(kind: Any, tmp_path: Path) -> None:
    straight, stops = kind.work(tmp_path / "straight"), 0
    assert straight.run()
    while not (stopped := kind.work(tmp_path / "stopped")).run(stop_after=kind.stop_after):
        stops += 1
    assert 1 <= stops < 9
    pairs = zip(kind.tensors(straight), kind.tensors(stopped), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert straight.losses == stopped.losses


def test_work_that_was_saved_of_another_plan_is_refused(kind: Any, tmp_path: Path) -> None:
    kind.work(tmp_path).run(stop_after=kind.stop_after)
    with pytest.raises(OptionError, match="another plan"):
        kind.work(tmp_path, kind.other_plan).run()


def test_the_built_checkpoint_is_what_was_computed(grown: Grown, tmp_path: Path) -> None:
    built = AutoModelForCausalLM.from_pretrained(grown.build(tmp_path / "built"), dtype=torch.float32).eval()
    grown.kind.check(built, grown.made, grown.parent, grown.recipe)


def test_building_twice_gives_the_same_bytes_and_verify_agrees(grown: Grown, tmp_path: Path) -> None:
    first, second = grown.build(tmp_path / "a"), grown.build(tmp_path / "b")
    assert grown.kind.assembly.verify(first) == grown.kind.assembly.verify(second)
    assert grown.build(first) == first, "what is built is not built again"


def test_verify_names_an_altered_file(grown: Grown, tmp_path: Path) -> None:
    shard = sorted(grown.build(tmp_path / "built").glob("*.safetensors"))[-1]
    flip_last_bit(shard)
    with pytest.raises(CheckpointError, match=shard.name):
        grown.kind.assembly.verify(shard.parent)


def test_an_altered_recipe_and_one_of_another_kind_are_refused(grown: Grown, tmp_path: Path) -> None:
    for name in (ADAPTERS, DESCRIPTION):
        shutil.copy(grown.recipe / name, tmp_path)
    name = grown.kind.assembly.recipe.kind
    other = next(kind for kind in KINDS if kind != name)
    with pytest.raises(CheckpointError, match=f"kind '{name}', not '{other}'"):
        reference.build(tmp_path / "built", tmp_path, kind=other)
    flip_last_bit(tmp_path / ADAPTERS)
    with pytest.raises(CheckpointError, match="the recipe was altered"):
        grown.kind.assembly.recipe.open(tmp_path)
    description = (tmp_path / DESCRIPTION).read_text()
    (tmp_path / DESCRIPTION).write_text(description[: len(description) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a recipe"):
        grown.kind.assembly.recipe.open(tmp_path)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_recipe_of_another_parent_is_refused(grown: Grown, tmp_path: Path) -> None:
    other = TinyParent(tmp_path / "other.gguf", b"other weights")
    with pytest.raises(CheckpointError, match="belongs to other dense weights"):
        grown.kind.assembly.build(tmp_path / "built", grown.recipe, source=other)
    assert not (tmp_path / "built").exists()


def test_a_folder_with_other_content_is_left_alone(grown: Grown, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        grown.build(tmp_path)
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
        reference.build(kind="carved-in-stone")


def test_the_committed_recipe_is_whole_and_small(kind: Any) -> None:
    recipe = kind.assembly.recipe.open()
    assert recipe.layers == 30 and recipe.shape == type(kind.shape)()
    assert sum(entry.stat().st_size for entry in recipe.folder.iterdir()) < kind.committed_bytes
    assert all(kind.is_whole(recipe.layer(layer)) for layer in range(recipe.layers))


@pytest.mark.reference
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_built_model_has_the_checksums_of_its_recipe(name: str) -> None:
    kind = EMBEDDED[name]
    if not reference.is_built(kind=kind):
        pytest.skip(f"the {kind} model is not built here")
    found, assembly = reference.verify(kind=kind), ASSEMBLIES[kind]
    manifest = json.loads((assembly.recipe.open().folder / MANIFEST).read_text())["files"]
    assert {file: found[file] for file in manifest} == manifest
    assert str(resolve_model(name)) == str(assembly.default_destination(assembly.recipe.open()))
