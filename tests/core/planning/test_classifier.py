"""The keyword classifier: which task type a prompt has."""

import json
from pathlib import Path

import pytest

from emoe_core.planning.classifier import KEYWORDS, classify, keyword_matches
from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads import load_fixture

FREEFORM = Path(__file__).parents[2] / "fixtures" / "prompts_freeform.jsonl"


def test_every_fixture_prompt_gets_its_own_task_type():
    assert {item["task"] for item in load_fixture()} == set(TASK_TYPES)
    assert [classify(item["prompt"]) for item in load_fixture()] == load_fixture()["task"]


def test_freeform_requests_are_rarely_given_a_wrong_type():
    requests = [json.loads(line) for line in FREEFORM.read_text(encoding="utf-8").splitlines()]
    found = [(item["task"], classify(item["prompt"])) for item in requests]
    wrong = sum(got not in (task, "unknown") for task, got in found)
    right = sum(got == task for task, got in found)
    assert wrong <= 1
    assert right >= 0.7 * len(found)


@pytest.mark.parametrize("text", ["", "   ", "Lorem ipsum dolor sit amet.", "12345 !!"])
def test_a_text_without_keywords_is_unknown(text):
    assert classify(text) == "unknown"


def test_a_tie_between_tasks_is_unknown():
    text = "summarize the sentiment"
    counts = keyword_matches(text)
    assert counts["summarization"] == counts["classification"] == 1
    assert classify(text) == "unknown"


def test_a_keyword_counts_once_however_often_it_occurs():
    text = "Summarize this news article: evidence, evidence, evidence, evidence."
    assert keyword_matches(text)["comparison"] == 1
    assert classify(text) == "summarization"


def test_keywords_match_at_word_starts_and_whole_words_where_asked():
    assert keyword_matches("proclaimed")["comparison"] == 0
    assert keyword_matches("The claims")["comparison"] == 1
    assert "hi$" in KEYWORDS["conversation"]
    assert keyword_matches("history")["conversation"] == 0
    assert keyword_matches("HI")["conversation"] == 1
