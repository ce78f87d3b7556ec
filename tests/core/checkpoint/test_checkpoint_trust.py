"""A checkpoint runs no code, chooses no code from elsewhere, and leads to no file outside its folder by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import emoe_core
from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.errors import CheckpointError, PredictorError
from emoe_core.generation import load_tokenizer
from emoe_core.loader.pack import ensure_pack
from workbench.models.reference.tiny import tiny_moe
from workbench.models.reference.tiny_families import tiny_family


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def plant(folder: Path, name: str) -> Path:
    """Put a module beside the weights that would leave a mark if it were ever run; return the mark's path."""
    mark = folder.parent / f"{name}-ran"
    (folder / f"{name}.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Planted(PreTrainedTokenizerFast):\n    pass\n"
    )
    return mark


def test_a_tokenizer_that_is_code_is_refused_and_not_run(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "model", "qwen3_moe")
    mark = plant(model, "planted")
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Planted",
        auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
    )
    try:
        load_tokenizer(model)
    except CheckpointError as error:
        assert "never runs code" in str(error)
    assert not mark.exists()
    # The trap works: stock transformers runs the module once it is told to trust it.
    transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert mark.exists()


def test_a_family_without_a_tokenizer_class_runs_no_code(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "model", "olmoe")
    mark = plant(model, "planted")
    (model / "tokenizer.json").unlink()
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Planted",
        auto_map={"AutoTokenizer": ["planted.Planted", None]},
    )
    with pytest.raises(CheckpointError, match="never runs code"):
        load_tokenizer(model)
    assert not mark.exists()


def test_a_damaged_tokenizer_is_our_error(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(model)


def test_code_beside_a_known_family_is_left_alone(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path / "model")
    mark = plant(model, "planted")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text((model / "planted.py").read_text())
    edit(
        model / "config.json",
        auto_map={"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"},
    )
    with emoe_core.load(model, budget="100%", pack_dir=tmp_path) as engine:
        assert engine.generate(["x"], max_new_tokens=1)[0].token_ids
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["somebody/kernel", "kernels-community/flash-attn2:flash", "flash_attention_2"])
def test_attention_from_elsewhere_is_refused(tmp_path: Path, key: str, name: str) -> None:
    model = tiny_moe(tmp_path)
    edit(model / "config.json", **{key: name})
    with pytest.raises(CheckpointError, match=r"code from elsewhere.*Remove the entry"):
        open_checkpoint(model)
    edit(model / "config.json", **{key: {"": "eager", "text_config": name}})
    with pytest.raises(CheckpointError, match="code from elsewhere"):
        open_checkpoint(model)


def test_experts_from_elsewhere_are_refused_and_built_in_ones_accepted(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path)
    edit(model / "config.json", experts_implementation="sonicmoe")
    with pytest.raises(CheckpointError, match="code from elsewhere"):
        open_checkpoint(model)
    edit(model / "config.json", experts_implementation="eager", attn_implementation="eager")
    assert open_checkpoint(model).config._attn_implementation == "eager"


def test_an_endless_number_of_layers_is_refused(tmp_path: Path) -> None:
    model = tiny_moe(tmp_path)
    edit(model / "config.json", num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        open_checkpoint(model)


def test_a_model_laid_out_as_in_the_hubs_cache_loads(tmp_path: Path) -> None:
    # There, every file of a snapshot is a link to ../../blobs.
    model = tiny_moe(tmp_path / "model", max_shard_size="300KB")
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    with emoe_core.load(snapshot, budget="50%", pack_dir=tmp_path) as engine:
        assert engine.generate(["x"], max_new_tokens=1)[0].token_ids


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(
            (name, "outside its directory")
            for name in ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "..")
        ),
        *((name, "no safetensors file") for name in ("", ".", "x.bin", "x\0")),
        *((name, "lacks 1 of 1") for name in ("a/x.safetensors", "\0.safetensors", f"{'é' * 250}.safetensors")),
    ],
)
def test_a_shard_is_a_safetensors_file_in_its_own_folder(tmp_path: Path, name: str, reason: str) -> None:
    model = tiny_moe(tmp_path / "model", max_shard_size="300KB")
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=dict.fromkeys(weight_map, name))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(model)


def test_the_name_of_a_pack_does_not_follow_the_configuration(tmp_path: Path) -> None:
    # transformers lets a part of a configuration call itself anything.
    tiny_family(tmp_path / "model", "llama4")
    config = tmp_path / "model" / "config.json"
    part = json.loads(config.read_text()) | {"model_type": "../escaped"}
    config.write_text(json.dumps({"model_type": "llama4", "text_config": part}))
    assert open_checkpoint(tmp_path / "model").config.model_type == "../escaped"
    packs = tmp_path / "inner" / "packs"
    assert ensure_pack(open_checkpoint(tmp_path / "model"), packs).path.parent == packs
    assert not list(tmp_path.rglob("escaped*"))


def test_a_predictor_of_another_kind_is_our_error(tmp_path: Path) -> None:
    from emoe_core.predictor import make_predictor

    (tmp_path / "x").write_bytes(b"\x80\x04.")
    with pytest.raises(PredictorError):
        make_predictor("transformer", 2, 2, path=tmp_path / "x")
