"""How well the task classifier does on prompts whose type is known.

The same items are read three times, because our prompts carry templates of our own and the keywords were chosen with
them in view:

* ``prompt``: the text as it is served, template included;
* ``no instruction``: without the template's instruction, only what follows its first blank line;
* ``bare``: also without the template's labels ("Passage:", "Question:", code fences), so nothing but the item's text.

The first says what happens in the bench, the last what to expect of texts that do not say what is wanted of them.
Nothing is fitted here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pandas as pd

from emoe_core.errors import OptionError
from emoe_core.planning.classifier import classify
from emoe_core.planning.tasks import TASK_TYPES, UNKNOWN
from workbench.workloads import load_task

_LABEL = re.compile(r"^(?:(?:Passage|Question|Article|Text|Claim): |[AB]: |```\w*$)", re.MULTILINE)


def without_instruction(text: str) -> str:
    """Return a prompt without what stands before its first blank line; a prompt without one stays whole."""
    return text.split("\n\n", 1)[-1]


def bare(text: str) -> str:
    """Return a prompt without instruction, labels of its parts, speakers' letters and code fences."""
    return _LABEL.sub("", without_instruction(text)).strip()


READINGS: dict[str, Callable[[str], str]] = {
    "prompt": lambda text: text,
    "no instruction": without_instruction,
    "bare": bare,
}


def confusion(tasks: Sequence[str], texts: Sequence[str]) -> pd.DataFrame:
    """Return how many texts of each task (rows) were given each type (columns, the last being unknown)."""
    if len(tasks) != len(texts):
        raise OptionError(f"{len(texts)} texts came with {len(tasks)} task types: give one each")
    table = pd.DataFrame(0, index=list(TASK_TYPES), columns=[*TASK_TYPES, UNKNOWN])
    for task, text in zip(tasks, texts, strict=True):
        table.loc[task, classify(text)] += 1
    return table


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """Return per task the shares ``right``, ``wrong`` and ``unknown`` (summing to 1) and the number of ``items``.

    Tasks without items are left out. The distinction matters: unknown costs memory, wrong may cost quality.
    """
    table = table[table.sum(axis=1) > 0]
    items = table.sum(axis=1)
    right = pd.Series({task: table.loc[task, task] for task in table.index}) / items
    unknown = table[UNKNOWN] / items
    wrong = (items - table[UNKNOWN]) / items - right
    return pd.DataFrame({"right": right, "wrong": wrong, "unknown": unknown, "items": items})


def evaluate_classifier(split: str = "test", source: str = "embedded") -> dict[str, pd.DataFrame]:
    """Return the confusion matrix of each reading over all items of a split.

    Raises
    ------
    DataError
        When the prompts were not prepared.
    """
    items = [(task, str(item["prompt"])) for task in TASK_TYPES for item in load_task(task, split, source)]
    tasks = [task for task, _ in items]
    return {name: confusion(tasks, [read(text) for _, text in items]) for name, read in READINGS.items()}
