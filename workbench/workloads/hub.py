"""The online sources: the data sets of the eMoE paper by their names on the Hugging Face hub.

Section 5 of the paper takes XSum, SQuAD, financial tweets and human-assistant conversations. Its comparison set
(headline pairs) comes as yearly tables of article identifiers; VitaminC claims take its place, as in the embedded
source, and code is HumanEval. Each source maps the hub's columns to the fields of the task's template; everything
after that (cutting, splitting, storing) is the same as for the embedded sources.

The hub's revisions move. The column names here were taken from the data set cards; a source whose columns have changed
is refused with the names that were found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from emoe_core.errors import DataError
from workbench.workloads.records import MAX_WORDS, Record, cut_words

MAX_ROWS = 6000
Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSource:
    """Where a task's items lie on the hub and how a row becomes a record.

    Attributes
    ----------
    path : str
        Data set name, or any path that ``datasets.load_dataset`` takes.
    split : str
        The hub's split to draw from; our own splits are made from it.
    columns : tuple of str
        Columns the mapping reads.
    to_record : callable
        Row to record, or None for a row that is not usable.
    config : str or None
        Configuration name, where the data set has several.
    """

    path: str
    split: str
    columns: tuple[str, ...]
    to_record: Callable[[Row], Record | None]
    config: str | None = None


def _summarization(row: Row) -> Record | None:
    article = row["document"]
    return Record({"article": article}, row["summary"], group=article, unit=article) if article.strip() else None


def _qa(row: Row) -> Record | None:
    passage = cut_words(row["context"], MAX_WORDS["passage"])
    answers = row["answers"]["text"]
    if not answers or answers[0] not in passage:
        return None
    fields = {"passage": passage, "question": row["question"].strip()}
    return Record(fields, answers[0], group=row["title"], unit=row["context"])


def _classification(row: Row) -> Record | None:
    choices = ("neutral", "bullish", "bearish")
    text, label = row["tweet"], int(row["sentiment"])
    if not text.strip() or not 0 <= label < len(choices):
        return None
    return Record({"review": text}, choices[label], group=text, unit=text, choices=choices)


def _comparison(row: Row) -> Record | None:
    labels = {"SUPPORTS": "True", "REFUTES": "False", "NOT ENOUGH INFO": "Neither"}
    if row["label"] not in labels or not row["evidence"].strip():
        return None
    fields = {"passage": row["evidence"], "claim": row["claim"]}
    topic = row["page"] or row["evidence"]
    return Record(fields, labels[row["label"]], group=topic, unit=topic, choices=tuple(labels.values()))


def _conversation(row: Row) -> Record | None:
    reply = row["response"].strip()
    turns = re.sub(r"^\s*Human:\s*", "A: ", row["prompt"].strip(), flags=re.MULTILINE)
    turns = re.sub(r"^\s*Assistant:\s*", "B: ", turns, flags=re.MULTILINE).removesuffix("B: ").strip()
    if not turns or not reply:
        return None
    turns = turns if turns.startswith(("A: ", "B: ")) else f"A: {turns}"
    return Record({"turns": turns}, reply, group=turns, unit=turns)


def _code(row: Row) -> Record | None:
    fields = {"function": row["prompt"].strip("\n")}
    return Record(fields, row["canonical_solution"].rstrip(), group=row["task_id"], unit=row["task_id"])


HUB_SOURCES: dict[str, HubSource] = {
    "qa": HubSource("rajpurkar/squad", "validation", ("title", "context", "question", "answers"), _qa),
    "summarization": HubSource("EdinburghNLP/xsum", "test", ("document", "summary"), _summarization),
    "classification": HubSource(
        "TimKoornstra/financial-tweets-sentiment", "train", ("tweet", "sentiment"), _classification
    ),
    "comparison": HubSource("tals/vitaminc", "test", ("claim", "evidence", "label", "page"), _comparison),
    "conversation": HubSource(
        "Isotonic/human_assistant_conversation_deduped", "test", ("prompt", "response"), _conversation
    ),
    "code": HubSource("openai/openai_humaneval", "test", ("task_id", "prompt", "canonical_solution"), _code),
}


def read(task: str, seed: int) -> Iterator[Record]:
    """Yield records of a task's hub source: at most `MAX_ROWS` rows, drawn with the seed.

    Raises
    ------
    DataError
        When the hub cannot be reached, the data set is not there, or its columns have changed.
    """
    import datasets

    source = HUB_SOURCES[task]
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # the hub client raises many unrelated types when offline or when a name is gone
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(
            f"cannot load {source.path} from the hub: {reason[0]}. Check the connection (and HF_HUB_OFFLINE), or "
            f"prepare the embedded source instead: `emoe data prepare`."
        ) from error
    if missing := set(source.columns) - set(rows.column_names):
        raise DataError(
            f"{source.path} lacks the columns {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}. "
            f"Prepare the embedded source instead: `emoe data prepare`."
        )
    rows = rows.shuffle(seed=seed).select(range(min(MAX_ROWS, len(rows))))
    for row in rows:
        record = source.to_record(row)
        if record is not None:
            yield record
