"""Opening checkpoints: weights are bit for bit those of stock loading, and bad input is refused clearly."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from emoe_core.checkpoint.conversion import ParamSource
from emoe_core.checkpoint.index import CheckpointIndex, open_checkpoint
from emoe_core.checkpoint.safetensors_files import ALIGNMENT, read_shard
from emoe_core.errors import CheckpointError, OptionError, UnsupportedFamilyError
from workbench.models.reference.tiny import FAMILIES, tiny_moe


def stock(path: Path, dtype: str | torch.dtype = "auto") -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")


def assert_experts_equal(index: CheckpointIndex, model: transformers.PreTrainedModel) -> None:
    for layer in index.layers:
        module = model.get_submodule(layer.name)
        record = torch.full((layer.record_bytes,), 255, dtype=torch.uint8)
        for expert in range(layer.num_experts):
            index.read_record(layer.index, expert, record)
            views = layer.views(record)
            assert views.keys() == dict(module.named_parameters(recurse=False)).keys()
            for name, view in views.items():
                expected = getattr(module, name)[expert]
                assert view.dtype == expected.dtype
                assert torch.equal(view, expected), f"{layer.name}.{name}[{expert}]"


def assert_dense_equal(built: transformers.PreTrainedModel, model: transformers.PreTrainedModel) -> None:
    ours = {**dict(built.named_parameters()), **dict(built.named_buffers())}
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        if ".experts." not in name or "shared" in name:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_aligned_as_in_stock_loading(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    # Some math libraries round by the alignment of their operands.
    path = tiny_moe(tmp_path, family, dtype=dtype)
    index, model = open_checkpoint(path), stock(path)
    theirs = dict(model.named_parameters())
    for name, tensor in index.build_model().named_parameters():
        if not tensor.is_meta:
            assert tensor.data_ptr() % ALIGNMENT == theirs[name].data_ptr() % ALIGNMENT, name
    for layer in index.layers:
        for spec in layer.params:
            for expert in theirs[f"{layer.name}.{spec.name}"]:
                if expert.nbytes % ALIGNMENT == 0:
                    assert spec.offset_bytes % ALIGNMENT == expert.data_ptr() % ALIGNMENT, spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_and_dense_weight_equals_stock_loading(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = tiny_moe(tmp_path, family, dtype=dtype)
    index, model = open_checkpoint(path), stock(path)
    assert index.dtype == dtype
    assert_experts_equal(index, model)
    built = index.build_model()
    assert_dense_equal(built, model)
    assert built.config.to_dict() == model.config.to_dict()
    assert built.generation_config.to_dict() == model.generation_config.to_dict()
    assert not built.training


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_another_dtype_casts_as_stock_loading_does(tmp_path: Path, family: str, stored: str, asked: str) -> None:
    path = tiny_moe(tmp_path, family, dtype=stored)
    index, model = open_checkpoint(path, asked), stock(path, getattr(torch, asked))
    assert_experts_equal(index, model)
    assert_dense_equal(index.build_model(), model)


def test_shards_give_the_same_records_as_one_file(tmp_path: Path) -> None:
    single = open_checkpoint(tiny_moe(tmp_path / "one"))
    sharded = open_checkpoint(tiny_moe(tmp_path / "many", max_shard_size="300KB"))
    assert len(sharded.shards) > 2
    assert sharded.layers == single.layers
    for layer in single.layers:
        for expert in range(layer.num_experts):
            ours = sharded.expert_tensors(layer.index, expert)
            for name, tensor in single.expert_tensors(layer.index, expert).items():
                assert torch.equal(tensor, ours[name])


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    index = open_checkpoint(tmp_path)
    built = index.build_model()
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert_dense_equal(built, stock(tmp_path))
    dense = {tensor.data_ptr(): tensor for tensor in [*built.parameters(), *built.buffers()] if not tensor.is_meta}
    assert index.dense_bytes_total == sum(tensor.nbytes for tensor in dense.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_stay_unloaded_and_all_bytes_are_accounted(tmp_path: Path, family: str, dtype: str) -> None:
    index = open_checkpoint(tiny_moe(tmp_path, family, dtype=dtype))
    built = index.build_model()
    tensors = {**dict(built.named_parameters()), **dict(built.named_buffers())}
    expert_names = {f"{layer.name}.{param.name}" for layer in index.layers for param in layer.params}
    assert {name for name, tensor in tensors.items() if tensor.is_meta} == expert_names
    assert index.dense_bytes_total == sum(tensor.nbytes for tensor in tensors.values() if not tensor.is_meta)
    assert index.expert_bytes_total == sum(layer.num_experts * layer.record_bytes for layer in index.layers)
    assert index.top_k == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_aligned_and_parameters_do_not_overlap(tmp_path: Path, family: str) -> None:
    for number, layer in enumerate(open_checkpoint(tiny_moe(tmp_path, family, dtype=torch.bfloat16)).layers):
        assert layer.index == number
        assert layer.record_bytes % 4096 == 0
        end = 0
        for param in layer.params:
            assert param.offset_bytes % param.dtype.itemsize == 0
            if family != "gpt_oss":  # fused on disk: as aligned as its file
                assert param.offset_bytes % ALIGNMENT == 0
            assert param.offset_bytes >= end
            end = param.offset_bytes + param.nbytes
        assert end <= layer.record_bytes


def test_models_do_not_share_a_configuration(tmp_path: Path) -> None:
    index = open_checkpoint(tiny_moe(tmp_path))
    first = index.build_model(experts_implementation="eager")
    second = index.build_model(experts_implementation="batched_mm")
    assert first.config is not second.config
    assert first.config._experts_implementation == "eager"
    assert second.config._experts_implementation == "batched_mm"
    assert first.model.layers[0].mlp.experts.config is not second.model.layers[0].mlp.experts.config


def test_another_seed_has_another_source_hash(tmp_path: Path) -> None:
    first = open_checkpoint(tiny_moe(tmp_path / "a", seed=0)).source_hash
    assert first != open_checkpoint(tiny_moe(tmp_path / "b", seed=1)).source_hash
    assert first == open_checkpoint(tiny_moe(tmp_path / "c", seed=0)).source_hash


@pytest.mark.parametrize(
    ("sources", "operations"),
    [
        (["mlp.experts.gate_up"], [Transpose(1, 2)]),
        (["mlp.experts.gate_up"], [Transpose(1, 2, check_dims=True)]),
        (["mlp.experts.gate_up"], [Interleave(dim=1)]),
        (["mlp.experts.gate", "mlp.experts.up"], [Concatenate(dim=1)]),
        (["mlp.experts.*.gate", "mlp.experts.*.up"], [MergeModulelist(dim=0), Concatenate(dim=1)]),
    ],
    ids=["transpose", "transpose-checked", "interleave", "concatenate", "merge-concatenate"],
)
def test_an_expert_converted_alone_equals_the_whole_layer_converted(
    tmp_path: Path, sources: list[str], operations: list
) -> None:
    experts, generator = 3, torch.Generator().manual_seed(0)
    stacked = [torch.randn(experts, 4, 6, generator=generator) for _ in sources]
    tensors = {}
    for pattern, tensor in zip(sources, stacked, strict=True):
        parts = dict(enumerate(tensor)) if "*" in pattern else {0: tensor}
        tensors |= {pattern.replace("*", str(number)): part.contiguous() for number, part in parts.items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    refs = {ref.name: ref for ref in read_shard(tmp_path / "weights.safetensors").tensors}
    converter = WeightConverter(sources, "mlp.experts.gate_up_proj", operations)
    whole = {
        pattern: [*tensor] if "*" in pattern else [tensor] for pattern, tensor in zip(sources, stacked, strict=True)
    }
    shape = (experts, 6, 4) if isinstance(operations[0], Transpose) else (experts, 4 * len(sources), 6)

    class Model:
        def get_parameter(self, name: str) -> torch.Tensor:
            return torch.empty(shape)

    for operation in operations:
        whole = operation.convert(
            whole,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name="x",
            model=Model(),
        )
    (expected,) = whole.values()
    numbers = range(experts) if "*" in sources[0] else [0]
    source = ParamSource(
        "x",
        shape,
        torch.float32,
        {pattern: tuple(refs[pattern.replace("*", str(number))] for number in numbers) for pattern in sources},
        converter,
        "*" not in sources[0],
        None,
    )
    for expert in range(experts):
        assert torch.equal(source.read_expert(expert), expected[expert])


def save_dense(path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def edit_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.*does not exist"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")


def test_an_unreachable_hub_id_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/has-this-model"):
        open_checkpoint("nobody/has-this-model")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no MoE layer"):
        open_checkpoint(save_dense(tmp_path))


def test_an_moe_family_outside_the_experts_interface_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_key_value_heads=1,
        kv_channels=16,
        num_local_experts=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr("emoe_core.checkpoint.adapters.ADAPTERS", {})
    with pytest.raises(UnsupportedFamilyError, match=r"jetmoe.*4 experts"):
        open_checkpoint(tmp_path)


def test_an_unknown_model_type_is_named_and_its_code_never_runs(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    edit_config(path, model_type="surprise_moe", auto_map={"AutoConfig": "configuration_surprise.SurpriseConfig"})
    (path / "configuration_surprise.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedFamilyError, match="surprise_moe"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    edit_config(path, model_type="vit")
    with pytest.raises(UnsupportedFamilyError, match="vit"):
        open_checkpoint(path)


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_quantised_checkpoint_is_refused_by_name(tmp_path: Path, method: str) -> None:
    path = tiny_moe(tmp_path, "gpt_oss")
    edit_config(path, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=method):
        open_checkpoint(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled.*pytorch_model\.bin"):
        open_checkpoint(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path, max_shard_size="300KB")
    victim = sorted(path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        open_checkpoint(path)


def test_a_shard_name_outside_the_directory_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", max_shard_size="300KB")
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../secret.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    path = tiny_moe(tmp_path)
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|malformed)"):
        open_checkpoint(path)


def test_a_file_whose_tensors_start_anywhere_is_read(tmp_path: Path) -> None:
    # The format does not promise alignment; a view of odd bytes would not be a tensor.
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    header += b" " * (1 - len(header) % 2)
    assert (8 + len(header)) % 2 == 1
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    (ref,) = read_shard(file).tensors
    assert torch.equal(ref.read(), values) and torch.equal(ref.read_row(1), values[1:])


def test_a_malformed_header_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 : 8 + length] = b"{" * length
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="malformed"):
        open_checkpoint(path)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors[next(name for name in tensors if ".experts.3.w1" in name)]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"8 tensors .* has 7"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_dense_tensor_is_refused_when_the_model_is_built(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_checkpoint(path).build_model()


def test_weights_of_another_shape_than_the_configuration_are_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    edit_config(path, intermediate_size=128)
    with pytest.raises(CheckpointError, match="disagree"):
        open_checkpoint(path)
    shutil.rmtree(path)
    path = tiny_moe(tmp_path)
    edit_config(path, vocab_size=300)
    with pytest.raises(CheckpointError, match="different models"):
        open_checkpoint(path).build_model()


def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path)
    edit_config(path, vocab_size=100)
    with pytest.raises(CheckpointError, match="no model can be made"):
        open_checkpoint(path)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="int3"):
        open_checkpoint(tiny_moe(tmp_path), "int3")
