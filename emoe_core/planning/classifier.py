"""The task classifier: which task type a prompt has, by keywords (section 3.2 of the eMoE paper).

A list of keywords per task type; most matches wins, and a tie or no match is ``"unknown"``. It runs on the CPU in
microseconds and reads the user's text only, before any chat template. The lists were tuned on the train split of the
prepared workloads only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from emoe_core.planning.tasks import UNKNOWN

# Stems stand for their inflections ("summar" matches "summarise" and "summary"); a trailing "$" asks for the whole
# word.
KEYWORDS: Mapping[str, tuple[str, ...]] = {
    "qa": (
        "answer the question",
        "question:",
        "passage:",
        "read the passage",
        "short phrase",
        "based on the text",
        "according to the",
        "who is",
        "who was",
        "what is",
        "what was",
        "what year",
        "when did",
        "when was",
        "where is",
        "where did",
        "how many",
        "how much",
        "why did",
    ),
    "summarization": (
        "summar",
        "in one sentence",
        "in a few sentences",
        "main point",
        "key point",
        "headline",
        "tl;dr",
        "condense",
        "shorten",
        "news article",
        "article:",
        "gist$",
    ),
    "classification": (
        "classif",
        "sentiment",
        "categor",
        "label",
        "positive",
        "negative",
        "neutral",
        "ambivalent",
        "bullish",
        "bearish",
        "spam$",
        "one word",
        "which topic",
    ),
    "comparison": (
        "compar",
        "claim",
        "similar",
        "difference",
        "support the",
        "contradict",
        "same meaning",
        "mean the same",
        "true, false or neither",
        "versus",
        "evidence",
    ),
    "conversation": (
        "conversation",
        "chat$",
        "dialogue",
        "next message",
        "continue this",
        "reply to",
        "hello",
        "hi$",
        "hey$",
        "how are you",
        "do you",
        "did you",
        "have you",
        "let's talk",
        "lol$",
    ),
    "code": (
        "python",
        "javascript",
        "def ",
        "return$",
        "function",
        "import ",
        "code$",
        "program$",
        ">>>",
        "```",
        "algorithm",
        "bug$",
        "implement",
        "sql$",
        "regex",
    ),
}


def _compile(keyword: str) -> re.Pattern[str]:
    whole = keyword.endswith("$")
    text = keyword.removesuffix("$")
    start = r"\b" if text[0].isalnum() else ""
    return re.compile(start + re.escape(text) + (r"\b" if whole else ""), re.IGNORECASE)


_PATTERNS = {task: tuple(_compile(word) for word in words) for task, words in KEYWORDS.items()}


def keyword_matches(text: str) -> dict[str, int]:
    """Return, per task type, how many of its keywords occur in the text at least once.

    A keyword counts once however often it occurs, so that a long article about a "question" stays an article.
    """
    return {task: sum(1 for pattern in found if pattern.search(text)) for task, found in _PATTERNS.items()}


def classify(text: str) -> str:
    """Return the task type whose keywords match the text most, or ``"unknown"``.

    Parameters
    ----------
    text : str
        The user's message, before any chat template.

    Returns
    -------
    str
        One of `TASK_TYPES`; ``"unknown"`` when nothing matches or two tasks share the highest count, because a wrong
        type may skip layers that matter whereas an unknown one never does.
    """
    counts = keyword_matches(text)
    most = max(counts.values())
    winners = [task for task, count in counts.items() if count == most]
    return winners[0] if most > 0 and len(winners) == 1 else UNKNOWN
