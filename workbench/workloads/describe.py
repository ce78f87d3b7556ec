"""What the prepared workloads hold: counts and mean lengths, as a table."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from rich.console import Group
from rich.table import Table

from emoe_core.planning.tasks import TASK_TYPES
from workbench.workloads.split import SPLITS
from workbench.workloads.store import load_task


def describe(
    tasks: tuple[str, ...] = TASK_TYPES,
    source: str = "embedded",
    count_tokens: Callable[[str], int] | None = None,
) -> pd.DataFrame:
    """Return one row per task and split.

    Parameters
    ----------
    tasks, source
        As in `workbench.workloads.store.prepare`.
    count_tokens : callable or None
        Counts the tokens of a text; without it only words are counted.

    Returns
    -------
    DataFrame
        Columns ``task, split, items, prompt_words, reference_words`` (means), and ``prompt_tokens`` with a counter.
    """
    rows = []
    for task in tasks:
        for split in SPLITS:
            items = load_task(task, split, source)
            row: dict[str, object] = {
                "task": task,
                "split": split,
                "items": len(items),
                "prompt_words": _mean(len(text.split()) for text in items["prompt"]),
                "reference_words": _mean(len(text.split()) for text in items["reference"]),
            }
            if count_tokens is not None:
                row["prompt_tokens"] = _mean(count_tokens(text) for text in items["prompt"])
            rows.append(row)
    return pd.DataFrame(rows)


def summary_tables(tasks: tuple[str, ...] = TASK_TYPES, source: str = "embedded") -> Group:
    """Return rich tables of the prepared tasks for the command line: their sizes, and where they come from."""
    table = Table(title="Prompts", caption="For evaluation and profiling only: never fit model weights on them.")
    table.add_column("task", no_wrap=True)
    sources = Table("task", "source", show_header=False, box=None)
    for name in (*SPLITS, "words a prompt", "words a reference"):
        table.add_column(name, justify="right")
    found = describe(tasks, source)
    for task in tasks:
        rows = found[found["task"] == task]
        counts = [str(int(rows.loc[rows["split"] == split, "items"].iloc[0])) for split in SPLITS]
        means = [f"{rows[column].mean():.0f}" for column in ("prompt_words", "reference_words")]
        table.add_row(task, *counts, *means)
        sources.add_row(task, load_task(task, "test", source)[0]["source"])
    return Group(table, sources)


def _mean(values: object) -> float:
    numbers = list(values)  # type: ignore[call-overload]
    return sum(numbers) / len(numbers)
