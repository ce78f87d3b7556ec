"""What the task classifier is credited with."""

import pytest

from emoe_core.errors import OptionError
from workbench.workloads.classification import bare, confusion, rates, without_instruction

TEXTS = ["Summarize this.", "Lorem ipsum.", "Write a python function.", "Write a python function."]
TASKS = ["summarization", "summarization", "code", "qa"]


def test_right_wrong_and_unknown_are_told_apart():
    found = rates(confusion(TASKS, TEXTS))
    assert found.loc["summarization", ["right", "wrong", "unknown"]].tolist() == [0.5, 0.0, 0.5]
    assert found.loc["code", "right"] == 1.0
    assert found.loc["qa", "wrong"] == 1.0
    assert set(found.index) == {"summarization", "code", "qa"}


def test_every_text_is_counted_once_under_its_own_task():
    table = confusion(TASKS, TEXTS)
    assert table.sum(axis=1)[["summarization", "code", "qa"]].tolist() == [2, 1, 1]
    assert table.loc["qa", "code"] == 1


def test_readings_drop_the_template_and_nothing_else():
    prompt = "Do this.\n\nPassage: a Claim: b\n\nQuestion: c"
    assert without_instruction(prompt) == "Passage: a Claim: b\n\nQuestion: c"
    assert bare(prompt) == "a Claim: b\n\nc"
    assert bare("Go on.\n\nA: hello\nB: hi") == "hello\nhi"
    assert bare("Complete.\n\n```python\nx = 1\n```") == "x = 1"
    assert bare("no instruction") == "no instruction"


def test_texts_and_tasks_must_pair():
    with pytest.raises(OptionError, match="one each"):
        confusion(["qa"], [])
