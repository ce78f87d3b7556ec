"""Measured memory: fresh processes, their peaks, and the control that is subtracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import emoe_core
from emoe_core.errors import ExperimentError
from workbench.measure import memory
from workbench.measure.memory import as_metrics, measure
from workbench.measure.peak_memory import mapped_checkpoint_bytes, process_peak_bytes, reset_peak
from workbench.models.reference.tiny import tiny_moe

PROMPTS, TASKS = ["Is it warm?", "Sum up the day."], ["qa", "summarization"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_peak_can_be_started_anew() -> None:
    ballast = bytearray(200 * 2**20)
    high = process_peak_bytes()
    del ballast
    if not reset_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    assert process_peak_bytes() < high - 100 * 2**20


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"implementation": "stock"}, marks=pytest.mark.long, id="stock"),
        pytest.param({"budget": "50%"}, id="emoe"),
    ],
)
def test_a_tiny_model_needs_little_more_than_its_control(tmp_path: Path, cache: Path, options: dict[str, str]) -> None:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=1)
    measured = measure(checkpoint, PROMPTS, TASKS, max_new_tokens=3, options=options)
    assert measured.peak_bytes >= measured.serving_peak_bytes > 50 * 2**20
    assert abs(measured.serving_bytes) < 40 * 2**20
    assert measured.ttft_s > 0 and measured.tpot_s > 0
    assert as_metrics(measured)["serving_bytes"] == measured.serving_bytes
    # The control is kept: it depends on libraries, code, tokenizer and options only.
    assert len(list((cache / "controls").iterdir())) == 1


@pytest.mark.long
def test_tokens_are_those_of_the_timed_prompts_alone_and_equal_in_both_systems(tmp_path: Path) -> None:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=1)
    with emoe_core.load(checkpoint) as engine:
        timed = engine.generate(PROMPTS[1:], max_new_tokens=3)[0]
    for options in ({"implementation": "stock"}, {"budget": "50%"}):
        measured = measure(checkpoint, PROMPTS, TASKS, max_new_tokens=3, options=options)
        assert measured.tokens == timed.prompt_tokens + len(timed.token_ids), options


@pytest.mark.long
def test_a_measured_process_finds_its_pack_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=1)
    there: list[set[Path]] = []
    started = memory.launch
    monkeypatch.setattr(
        memory, "launch", lambda *given: (there.append(set((cache / "packs").glob("*.emoe"))), started(*given))[1]
    )
    measure(checkpoint, PROMPTS, TASKS, max_new_tokens=2, options={"budget": "50%", "expert_dtype": "int8"})
    # First the configuration, then its control: a pack more each time, and none that they would have written.
    assert [len(packs) for packs in there] == [1, 2] and there[-1] == set((cache / "packs").glob("*.emoe"))


def test_one_prompt_is_too_few_to_time(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="two prompts"):
        measure(tmp_path, PROMPTS[:1], TASKS[:1])


def test_a_user_error_in_the_measured_process_is_reported_in_its_words(tmp_path: Path) -> None:
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=1)
    with pytest.raises(ExperimentError, match="budget"):
        measure(checkpoint, PROMPTS, TASKS, options={"budget": "1 bytes"})


def test_mapped_pages_of_copied_weights_are_told_from_those_a_model_uses(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(1024, 1024))
    save_file({"weight": weight.detach()}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    mapped.sum()  # touches every page
    user, copier = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    user.weight, copier.weight = torch.nn.Parameter(mapped), weight

    assert mapped_checkpoint_bytes(tmp_path, copier) >= mapped.nbytes
    assert mapped_checkpoint_bytes(tmp_path, user) < mapped.nbytes / 2
    assert mapped_checkpoint_bytes(tmp_path / "elsewhere", copier) == 0
