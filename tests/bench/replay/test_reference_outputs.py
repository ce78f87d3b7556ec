"""Reference outputs: cached prompt by prompt, shared by overlapping streams, the same text for the same prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import emoe_core
from emoe_core.errors import ExperimentError
from workbench.models.reference.tiny import tiny_moe
from workbench.replay.references import Reference, ReferenceSpec, reference_outputs
from workbench.replay.scoring import score

PROMPTS = ["Is this a question?", "Sum up the day.", "Good or bad?"]
TASKS = ["qa", "summarization", "classification"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("tiny"), family="mixtral", seed=3)


@pytest.fixture(scope="module")
def computed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """Return a cache, and the outputs of the first two prompts, which it holds."""
    folder = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOE_CACHE", str(folder))
        return folder, reference_outputs(checkpoint, PROMPTS[:2], TASKS[:2], max_new_tokens=4)


@pytest.fixture
def cache(computed: tuple[Path, Reference], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of that cache, in use."""
    shutil.copytree(computed[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.long
@pytest.mark.usefixtures("cache")
def test_only_prompts_that_are_not_cached_are_computed(checkpoint: Path, computed: tuple[Path, Reference]) -> None:
    steps: list[tuple[int, int]] = []
    _, first = computed
    both = reference_outputs(
        checkpoint, PROMPTS[::-1], TASKS[::-1], max_new_tokens=4, progress=lambda *step: steps.append(step)
    )
    assert steps == [(1, 1)]
    assert both.outputs[2].token_ids == first.outputs[0].token_ids
    assert [both.trace.tasks[place] for place in range(3)] == TASKS[::-1]
    assert np.array_equal(both.trace.counts(2), first.trace.counts(0))
    assert reference_outputs(checkpoint, PROMPTS, TASKS, max_new_tokens=4).hash != both.hash


@pytest.mark.usefixtures("cache")
def test_the_trace_and_hidden_states_are_those_of_a_direct_run(checkpoint: Path) -> None:
    reference = reference_outputs(checkpoint, PROMPTS[:1], TASKS[:1], max_new_tokens=4)
    expected = reference.outputs[0]
    with emoe_core.load(checkpoint, budget="100%", predictor=None, record=True) as engine:
        scored = score(engine, [(expected.prompt_ids, expected.token_ids)], TASKS[:1])[0]
        trace = engine.trace()
    assert torch.equal(scored.hidden, expected.hidden)
    assert np.array_equal(trace.chosen, reference.trace.chosen)
    assert np.array_equal(trace.weight, reference.trace.weight)


def test_a_damaged_cache_entry_is_named(checkpoint: Path, cache: Path) -> None:
    for path in (cache / "references").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExperimentError, match="delete it and run again"):
        reference_outputs(checkpoint, PROMPTS[:1], TASKS[:1], max_new_tokens=4)


@pytest.mark.usefixtures("cache")
def test_the_folder_depends_on_the_model_and_the_length() -> None:
    base = ReferenceSpec("here", "a", "float32", 8)
    assert base.folder() == ReferenceSpec("there", "a", "float32", 8).folder()
    assert (
        len(
            {
                spec.folder()
                for spec in (base, ReferenceSpec("here", "b", "float32", 8), ReferenceSpec("here", "a", "float32", 9))
            }
        )
        == 2 + 1
    )


@pytest.mark.usefixtures("cache")
def test_another_number_of_threads_is_another_reference() -> None:
    one, two = (ReferenceSpec("model", "hash", "float32", 4, threads=threads) for threads in (1, 2))
    assert one.folder() != two.folder()
    assert ReferenceSpec("model", "hash", "float32", 4).threads == torch.get_num_threads()
