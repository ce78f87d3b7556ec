"""The tiny random checkpoints: real files of each family, small, seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emoe_core.errors import OptionError
from workbench.models.names import TINY, resolve_model
from workbench.models.reference import tiny
from workbench.models.reference.tiny import FAMILIES, tiny_moe


def _bytes_of(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_below_two_megabytes_and_chats_in_stock_transformers(family: str, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path, family)
    assert _bytes_of(path) < 2_000_000
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.model_type == family
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "déjà vu"}], tokenize=False)
    assert prompt == "<|im_start|>user\ndéjà vu<|im_end|>\n"
    batch = tokenizer(prompt, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == prompt
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.isfinite().all() and logits.std() > 0.1


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = [
        tiny_moe(tmp_path / name, seed=seed) / "model.safetensors" for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


def test_bfloat16_and_shards_are_honoured(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path, "qwen3_moe", dtype="bfloat16", max_shard_size="300KB")
    assert (path / "model.safetensors.index.json").exists()
    assert len(list(path.glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16


def test_unknown_family_and_dtype_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="choose one of mixtral"):
        tiny_moe(tmp_path, "llama")
    with pytest.raises(OptionError, match="float32 or bfloat16"):
        tiny_moe(tmp_path, dtype="float16")


def test_the_tiny_model_is_known_by_name_wherever_a_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    path = Path(resolve_model(TINY))
    assert AutoModelForCausalLM.from_pretrained(path).config.model_type == "mixtral"
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(TINY) == path and (path / "model.safetensors").stat().st_mtime_ns == written


def test_a_tiny_model_that_was_not_written_to_its_end_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiny, "tiny_tokenizer", interrupted)
        resolve_model(TINY)
    assert AutoTokenizer.from_pretrained(resolve_model(TINY)).vocab_size


def interrupted() -> None:
    raise KeyboardInterrupt
