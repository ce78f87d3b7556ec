"""What the engine is told about tasks is what the configuration says, and as wrong as it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe_core.errors import OptionError
from workbench.workloads import StreamConfig, prompt_stream
from workbench.workloads.labels import check_labels, told_tasks

PROMPTS = prompt_stream(StreamConfig(n_prompts=20, source="fixture"))


def test_given_labels_are_the_data_sets_and_none_are_unknown() -> None:
    assert told_tasks(PROMPTS, "given") == [prompt.task for prompt in PROMPTS]
    assert set(told_tasks(PROMPTS, "none")) == {"unknown"}


@given(st.floats(0, 1), st.integers(0, 5))
def test_as_many_labels_are_wrong_as_asked_for(error: float, seed: int) -> None:
    told = told_tasks(PROMPTS, "given", error, seed)
    wrong = sum(label != prompt.task for label, prompt in zip(told, PROMPTS, strict=True))
    assert wrong == round(error * len(PROMPTS))
    assert told == told_tasks(PROMPTS, "given", error, seed)


@pytest.mark.parametrize(("labels", "error"), [("guess", 0.0), ("given", 1.5), ("none", 0.2)])
def test_labels_that_make_no_sense_are_refused(labels: str, error: float) -> None:
    with pytest.raises(OptionError):
        check_labels(labels, error)
