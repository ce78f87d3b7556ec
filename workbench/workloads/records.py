"""One raw item of a task before it becomes a prompt, and the template that makes the prompt.

Terms
-----
record
    The fields of one item (passage, question, ...), its reference, its label choices, and two keys for splitting.
group
    Items of one group go to the same split: questions on one encyclopedia article, turns of one conversation. Without
    it, the same passage would sit in the profile and in the test split.
unit
    At most one item of a unit is kept, so that a split is not twenty questions on one paragraph.
topic
    A task type, or a task type in another language, such as ``classification_pl``: what a stream can switch between
    although its label stays.

There is one template per task, whatever source the items come from. Long texts are cut at a whole word to the limits
in `MAX_WORDS`, so that most prompts have 60 to 350 tokens and a run on two cores stays short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from emoe_core.errors import DataError

MAX_WORDS: Mapping[str, int] = {
    "passage": 160,
    "article": 220,
    "review": 150,
    "turns": 160,
    "function": 260,
    "question": 60,
    "claim": 60,
}

TEMPLATES: Mapping[str, str] = {
    "qa": (
        "Read the passage and answer the question with a short phrase.\n\nPassage: {passage}\n\nQuestion: {question}"
    ),
    "summarization": "Summarize the following news article in one sentence.\n\nArticle: {article}",
    "classification": (
        "Classify the sentiment of the following text as {choices}. Reply with one word.\n\nText: {review}"
    ),
    "comparison": (
        "Compare the claim with the passage. Does the passage support the claim? Reply with one word: {choices}.\n\n"
        "Passage: {passage}\n\nClaim: {claim}"
    ),
    "conversation": "Continue this conversation: write the next message of B.\n\n{turns}",
    "code": "Complete this Python function. Reply with the code only.\n\n```python\n{function}\n```",
}

# Whitespace carries meaning in these fields, so they are cut at a line, not at a word.
_LINE_FIELDS = frozenset({"turns", "function"})


def task_of(topic: str) -> str:
    """Return the task type of a topic."""
    return topic.partition("_")[0]


@dataclass(frozen=True)
class Record:
    """One raw item: ``fields`` fill the task's template, ``reference`` is the target text or the right label."""

    fields: Mapping[str, str]
    reference: str
    group: str
    unit: str
    choices: tuple[str, ...] = field(default=())


def cut_words(text: str, limit: int) -> str:
    """Return the text with runs of whitespace made single and everything after ``limit`` words cut off."""
    return " ".join(text.split()[:limit])


def cut_lines(text: str, limit: int, keep_end: bool = False) -> str:
    """Return whole lines holding at most ``limit`` words, from the start or (``keep_end``) from the end.

    A single line over the limit is kept: half a line of a conversation or of code would not be a prompt.
    """
    lines = text.strip("\n").split("\n")
    kept: list[str] = []
    words = 0
    for line in reversed(lines) if keep_end else lines:
        words += len(line.split())
        if kept and words > limit:
            break
        kept.append(line)
    return "\n".join(reversed(kept) if keep_end else kept)


def render(task: str, record: Record) -> str:
    """Return the plain-text user message of a record.

    Parameters
    ----------
    task : str
        Task type; selects the template.
    record : Record
        Must hold every field the template names.

    Raises
    ------
    DataError
        When the task has no template or the record lacks a field.
    """
    if task not in TEMPLATES:
        raise DataError(f"unknown task {task!r}; known are {', '.join(TEMPLATES)}.")
    values = {"choices": spoken_list(record.choices)} if record.choices else {}
    for name, text in record.fields.items():
        limit = MAX_WORDS[name]
        if name in _LINE_FIELDS:
            values[name] = cut_lines(text, limit, keep_end=name == "turns")
        else:
            values[name] = cut_words(text, limit)
    try:
        return TEMPLATES[task].format(**values)
    except KeyError as missing:
        raise DataError(f"an item of task {task!r} lacks the field {missing}; its source is damaged.") from missing


def spoken_list(words: tuple[str, ...]) -> str:
    """Return ``a, b or c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
