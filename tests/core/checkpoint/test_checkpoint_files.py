"""Of a folder's files those count which stock transformers loads: the same weights from any state of it, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from emoe_core.errors import CheckpointError
from emoe_core.loader.pack import compare_with_checkpoint, ensure_pack
from workbench.models.reference.tiny import tiny_moe
from workbench.sweep.points import model_state

Tensors = dict[str, torch.Tensor]
NORM, HEAD, ROUTER = "model.norm.weight", "lm_head.weight", "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


def stock_weights(path: Path) -> Tensors | None:
    """Return what stock loading gives; None where it refuses or leaves a weight to chance."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation="eager", output_loading_info=True
        )
    except Exception:  # whatever it is that stock trips over
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else dict(model.state_dict())


def our_weights(path: Path) -> Tensors | None:
    """Return the same of ours; None where a folder is refused in one line."""
    try:
        index = open_checkpoint(path)
        weights = dict(index.build_model().state_dict())
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return None
    for layer in index.layers:
        experts = [index.expert_tensors(layer.index, expert) for expert in range(layer.num_experts)]
        weights |= {f"{layer.name}.{name}": torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    return weights


def assert_same(ours: Tensors | None, theirs: Tensors | None) -> None:
    assert (ours is None) == (theirs is None), "only one of the two loads it"
    if ours is None or theirs is None:
        return
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@dataclass(frozen=True)
class Folder:
    """A model's folder without weights, and the tensors of two models of its kind to fill it with."""

    path: Path
    right: Tensors
    wrong: Tensors

    def write(self, name: str, tensors: Tensors) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})

    def text(self, name: str, content: str) -> None:
        (self.path / name).write_text(content)

    def index(self, weight_map: dict[str, str], name: str = INDEX_NAME, **metadata: Any) -> None:
        self.text(name, json.dumps({"metadata": metadata, "weight_map": weight_map}))

    def configure(self, **changes: Any) -> None:
        config = json.loads((self.path / "config.json").read_text()) | changes
        self.text("config.json", json.dumps({key: value for key, value in config.items() if value is not None}))

    def shards(
        self, tensors: Tensors, pattern: str = "model-{}.safetensors", index: str = INDEX_NAME
    ) -> dict[str, str]:
        """Write three shards and their index; return its map."""
        names = list(tensors)
        parts = {pattern.format(part): names[part::3] for part in range(3)}
        for file, part in parts.items():
            self.write(file, {name: tensors[name] for name in part})
        weight_map = {name: file for file, part in parts.items() for name in part}
        self.index(weight_map, index)
        return weight_map


def without(tensors: Tensors, *words: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}


def stacked(tensors: Tensors) -> Tensors:
    """Return the experts under the names and in the form that the model itself has."""
    found = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        parts = {
            part: torch.stack(
                [tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight"] for expert in range(8)]
            )
            for part in ("w1", "w2", "w3")
        }
        found[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        found[f"{prefix}.mlp.experts.down_proj"] = parts["w2"]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("models")
    paths = [tiny_moe(root / str(seed), seed=seed) for seed in range(2)]
    right, wrong = (load_file(path / SINGLE_NAME) for path in paths)
    (paths[0] / SINGLE_NAME).unlink()
    return Folder(paths[0], right, wrong)


@pytest.fixture
def folder(models: Folder, tmp_path: Path) -> Folder:
    return Folder(shutil.copytree(models.path, tmp_path / "model"), models.right, models.wrong)


State = Callable[[Folder], object]
LOADED: dict[str, State] = {}
REFUSED: dict[str, State] = {}


def loaded(state: State) -> State:
    return LOADED.setdefault(state.__name__, state)


def refused(state: State) -> State:
    return REFUSED.setdefault(state.__name__, state)


@loaded
def one_file(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)


@loaded
def shards(folder: Folder) -> None:
    folder.shards(folder.right)


@loaded
def one_file_beside_older_shards(folder: Folder) -> None:
    folder.shards(folder.wrong)
    folder.write(SINGLE_NAME, folder.right)


@loaded
def one_file_beside_an_index_whose_shards_are_gone(folder: Folder) -> None:
    for name in set(folder.shards(folder.wrong).values()):
        (folder.path / name).unlink()
    folder.write(SINGLE_NAME, folder.right)


@loaded
def one_file_beside_a_damaged_index(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    folder.text(INDEX_NAME, "{")


@loaded
def shards_beside_one_that_the_index_does_not_name(folder: Folder) -> None:
    folder.shards(folder.right)
    folder.write("model-9.safetensors", folder.wrong)


@loaded
def shards_beside_a_folder_of_the_single_files_name(folder: Folder) -> None:
    folder.shards(folder.right)
    (folder.path / SINGLE_NAME).mkdir()


@loaded
def shards_beside_a_link_that_leads_nowhere(folder: Folder) -> None:
    folder.shards(folder.right)
    (folder.path / SINGLE_NAME).symlink_to("blob")


@loaded
def an_index_that_puts_tensors_in_other_shards(folder: Folder) -> None:
    weight_map = folder.shards(folder.right)
    folder.index(dict(zip(weight_map, reversed(weight_map.values()), strict=True)))


@loaded
def an_index_that_names_tensors_no_shard_has(folder: Folder) -> None:
    weight_map = folder.shards(folder.right)
    folder.index(weight_map | {"model.layers.9.gate.weight": weight_map[NORM]})


@loaded
def an_index_that_names_one_tensor_a_shard(folder: Folder) -> None:
    weight_map = folder.shards(folder.right)
    folder.index({file: file for file in weight_map.values()})


@loaded
def tensors_that_several_shards_hold(folder: Folder) -> None:
    folder.shards(folder.right)
    for part in range(3):
        tensors = load_file(folder.path / f"model-{part}.safetensors")
        twice = {name: folder.wrong[name] + part for name in (NORM, EXPERT, ROUTER)}
        folder.write(f"model-{part}.safetensors", tensors | twice)


@loaded
def files_of_other_purposes_beside(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "a/x.safetensors"):
        folder.write(name, folder.wrong)
    folder.text("model.fp16.safetensors.index.json", "{")
    folder.text("adapter_config.json", json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}))


@loaded
def pickled_files_beside(folder: Folder) -> None:
    folder.shards(folder.right)
    torch.save(folder.wrong, folder.path / "pytorch_model.bin")
    folder.text("pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": {NORM: "x.bin"}}))


@loaded
def shards_in_a_folder_within(folder: Folder) -> None:
    folder.shards(folder.right, "parts/model-{}.safetensors")
    folder.write("model-0.safetensors", folder.wrong)


@loaded
def shards_of_one_name_in_two_folders(folder: Folder) -> None:
    weight_map = folder.shards(folder.right, "{}/model.safetensors")
    assert len(set(weight_map.values())) == 3


@loaded
def links_as_in_the_hubs_cache(folder: Folder) -> None:
    folder.shards(folder.right)
    for number, file in enumerate(sorted(folder.path.iterdir())):
        blob = folder.path.parent / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(Path("../blobs") / str(number))


@loaded
def a_file_that_the_configuration_names(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.wrong)
    folder.write("other.safetensors", folder.right)
    folder.configure(transformers_weights="other.safetensors")


@loaded
def an_index_that_the_configuration_names(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.wrong)
    folder.shards(folder.wrong)
    folder.shards(folder.right, "other/{}.safetensors", "other.safetensors.index.json")
    folder.configure(transformers_weights="other.safetensors.index.json")


@loaded
def tensors_that_the_model_has_not(folder: Folder) -> None:
    further = {f"model.layers.3{name.removeprefix('model.layers.2')}": folder.wrong[name] for name in folder.wrong}
    folder.write(SINGLE_NAME, further | folder.right | {"surplus": torch.ones(2)})


@loaded
def tensors_without_the_models_prefix(folder: Folder) -> None:
    folder.write(SINGLE_NAME, {name.removeprefix("model."): tensor for name, tensor in folder.right.items()})


@loaded
def dense_tensors_with_and_without_the_models_prefix(folder: Folder) -> None:
    again = {name.removeprefix("model."): folder.wrong[name] for name in (NORM, ROUTER, "model.embed_tokens.weight")}
    folder.write(SINGLE_NAME, folder.right | again)


@loaded
def experts_stacked_by_another_program(folder: Folder) -> None:
    folder.write(SINGLE_NAME, without(folder.right, ".experts.") | stacked(folder.right))


@refused
def experts_one_by_one_and_stacked(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right | stacked(folder.wrong))


@refused
def experts_with_and_without_the_models_prefix(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right | {EXPERT.removeprefix("model."): folder.wrong[EXPERT]})


@loaded
def a_head_tied_and_not_stored(folder: Folder) -> None:
    folder.configure(tie_word_embeddings=True)
    folder.write(SINGLE_NAME, without(folder.right, HEAD))


@loaded
def a_head_tied_and_stored_otherwise(folder: Folder) -> None:
    folder.configure(tie_word_embeddings=True)
    folder.write(SINGLE_NAME, folder.right)


@loaded
def another_dtype_than_the_configuration_says(folder: Folder) -> None:
    folder.configure(dtype="bfloat16")
    folder.shards(folder.right)


@loaded
def no_dtype_in_the_configuration_and_several_in_the_files(folder: Folder) -> None:
    folder.configure(dtype=None)
    folder.shards(
        {
            name: tensor.half() if number % 3 == 0 else tensor
            for number, (name, tensor) in enumerate(folder.right.items())
        }
    )


@loaded
def no_dtype_in_the_configuration_and_one_in_the_index(folder: Folder) -> None:
    folder.configure(dtype=None)
    folder.index(folder.shards(folder.right), dtype="bfloat16")


@refused
def no_file(folder: Folder) -> None:
    pass


@refused
def a_variant_alone(folder: Folder) -> None:
    folder.write("model.fp16.safetensors", folder.right)


@refused
def files_without_an_index(folder: Folder) -> None:
    folder.shards(folder.right)
    (folder.path / INDEX_NAME).unlink()


@refused
def an_index_that_names_a_missing_shard(folder: Folder) -> None:
    folder.shards(folder.right)
    (folder.path / "model-1.safetensors").unlink()


@refused
def an_index_that_names_nothing(folder: Folder) -> None:
    folder.shards(folder.right)
    folder.index({})


@refused
def an_index_that_names_nothing_and_no_dtype_in_the_configuration(folder: Folder) -> None:
    an_index_that_names_nothing(folder)
    folder.configure(dtype=None)


@refused
def a_dtype_that_is_none_in_the_index(folder: Folder) -> None:
    folder.configure(dtype=None)
    folder.index(folder.shards(folder.right), dtype="load")


@refused
def one_truncated_file_beside_whole_shards(folder: Folder) -> None:
    folder.shards(folder.right)
    folder.text(SINGLE_NAME, "")


@refused
def a_missing_dense_tensor(folder: Folder) -> None:
    folder.write(SINGLE_NAME, without(folder.right, NORM))


@refused
def a_missing_head(folder: Folder) -> None:
    folder.write(SINGLE_NAME, without(folder.right, HEAD))


@refused
def a_missing_expert(folder: Folder) -> None:
    folder.write(SINGLE_NAME, without(folder.right, ".experts.5."))


@refused
def missing_experts_of_a_layer(folder: Folder) -> None:
    folder.write(SINGLE_NAME, without(folder.right, "layers.1.block_sparse_moe.experts"))


@refused
def one_expert_too_many(folder: Folder) -> None:
    ninth = {
        name.replace(".experts.5.", ".experts.8."): tensor for name, tensor in folder.wrong.items() if "5." in name
    }
    folder.write(SINGLE_NAME, ninth | folder.right)


@refused
def shards_of_two_models_of_different_shape(folder: Folder) -> None:
    folder.shards(folder.right | {NORM: torch.ones(65)})


@refused
def a_configuration_that_names_a_missing_file(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    folder.configure(transformers_weights="other.safetensors")


@refused
def a_configuration_that_names_a_file_elsewhere(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    folder.write("../other.safetensors", folder.right)
    folder.configure(transformers_weights="../other.safetensors")


@refused
def a_configuration_that_names_no_safetensors(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    folder.write("other.weights", folder.right)
    folder.configure(transformers_weights="other.weights")


FILES = (SINGLE_NAME, "model-1.safetensors", "model-2.safetensors", "parts/model-1.safetensors")
GROUPS = ("layers.0", "layers.1.block", "layers.1", "layers.2", "")
"""Tensors that stay together: each is of the first group that its name holds."""


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    groups=st.tuples(*[st.dictionaries(st.sampled_from(FILES), st.booleans(), min_size=1) for _ in GROUPS]),
    indexed=st.none() | st.lists(st.sampled_from(FILES), min_size=2),
    named=st.none() | st.none() | st.sampled_from([*FILES, INDEX_NAME]),
)
def test_any_spread_of_tensors_over_files_is_read_as_by_stock(
    models: Folder,
    tmp_path_factory: pytest.TempPathFactory,
    groups: tuple[dict[str, bool], ...],
    indexed: list[str] | None,
    named: str | None,
) -> None:
    folder = Folder(shutil.copytree(models.path, tmp_path_factory.mktemp("any") / "model"), models.right, models.wrong)
    files: dict[str, Tensors] = {}
    for name in folder.right:
        places = next(places for group, places in zip(GROUPS, groups, strict=True) if group in name)
        for file, right in places.items():
            files.setdefault(file, {})[name] = (folder.right if right else folder.wrong)[name]
    for file, tensors in files.items():
        folder.write(file, tensors)
    if indexed is not None:
        folder.index({str(number): file for number, file in enumerate(indexed)})
    folder.configure(transformers_weights=named)
    assert_same(our_weights(folder.path), stock_weights(folder.path))
    shutil.rmtree(folder.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"metadata": {}, "weight_map": []}', "\ufeff{}", "null"])
def test_an_index_that_is_none_is_refused_as_by_stock(folder: Folder, content: str) -> None:
    folder.shards(folder.right)
    folder.text(INDEX_NAME, content)
    assert stock_weights(folder.path) is None and our_weights(folder.path) is None


@pytest.mark.parametrize("state", LOADED)
def test_what_stock_loads_of_a_folder_we_load_the_same_of(folder: Folder, state: str) -> None:
    LOADED[state](folder)
    theirs = stock_weights(folder.path)
    assert theirs is not None
    assert_same(our_weights(folder.path), theirs)


@pytest.mark.parametrize("state", REFUSED)
def test_what_stock_refuses_or_fills_at_random_is_refused(folder: Folder, state: str) -> None:
    REFUSED[state](folder)
    assert stock_weights(folder.path) is None
    assert our_weights(folder.path) is None


def test_of_a_stacked_tensor_under_two_names_the_one_counts_that_stock_takes(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path, "gpt_oss")
    tensors = load_file(path / SINGLE_NAME)
    again = {name.removeprefix("model."): tensor + 1 for name, tensor in tensors.items() if "experts" in name}
    save_file(tensors | again, path / SINGLE_NAME, metadata={"format": "pt"})
    theirs = stock_weights(path)
    assert theirs is not None
    assert_same(our_weights(path), theirs)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "a/../../elsewhere.safetensors", "absolute"])
def test_an_index_that_leads_elsewhere_is_refused_though_stock_follows_it(folder: Folder, name: str) -> None:
    folder.write("../elsewhere.safetensors", folder.right)
    (folder.path / "a").mkdir()
    name = str(folder.path.parent / "elsewhere.safetensors") if name == "absolute" else name
    folder.index(dict.fromkeys(folder.right, name))
    assert stock_weights(folder.path) is not None
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(folder.path)


def test_pickled_weights_are_refused_though_stock_reads_them(folder: Folder) -> None:
    torch.save(folder.right, folder.path / "pytorch_model.bin")
    assert stock_weights(folder.path) is not None
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(folder.path)
    folder.index(dict.fromkeys(folder.right, "pytorch_model.bin"))
    assert stock_weights(folder.path) is not None
    with pytest.raises(CheckpointError, match=r"no safetensors file.*pytorch_model\.bin"):
        open_checkpoint(folder.path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_a_file_that_cannot_be_read_is_named(folder: Folder) -> None:
    (folder.path / SINGLE_NAME).symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        open_checkpoint(folder.path)


def test_a_distributed_checkpoint_is_refused_by_name(folder: Folder) -> None:
    folder.write(SINGLE_NAME, folder.right)
    folder.write("shard-00001-model-00001-of-00001.safetensors", folder.wrong)
    with pytest.raises(CheckpointError, match=r"distributed checkpoint \(shard-00001"):
        open_checkpoint(folder.path)


def test_an_adapter_is_refused_where_transformers_would_add_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    # peft is not among the dependencies: what it would add cannot be compared here.
    files_of_other_purposes_beside(folder)
    monkeypatch.setattr("emoe_core.checkpoint.weight_files.is_peft_available", lambda: True)
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_checkpoint(folder.path)


def write_a_shard_within_anew(folder: Folder) -> None:
    file = "0/model.safetensors"
    folder.write(file, {name: tensor + 1 for name, tensor in load_file(folder.path / file).items()})


CHANGES: dict[str, tuple[State, State]] = {
    "saved again as one file": (shards, one_file_beside_older_shards),
    "the one file removed": (one_file_beside_older_shards, lambda folder: (folder.path / SINGLE_NAME).unlink()),
    "another file named": (one_file, a_file_that_the_configuration_names),
    "another index": (shards, lambda folder: folder.shards(folder.wrong, "b-{}.safetensors")),
    "a shard within": (shards_of_one_name_in_two_folders, write_a_shard_within_anew),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pack_follows_the_files_that_count(folder: Folder, tmp_path: Path, change: str) -> None:
    before, after = CHANGES[change]
    before(folder)
    first, state = open_checkpoint(folder.path), model_state(folder.path)
    ensure_pack(first, tmp_path / "packs")
    after(folder)
    index = open_checkpoint(folder.path)
    assert index.source_hash != first.source_hash and index.source_mtimes() != first.source_mtimes()
    assert model_state(folder.path) != state
    pack = ensure_pack(index, tmp_path / "packs")
    compare_with_checkpoint(pack, index)
