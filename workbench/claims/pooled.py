"""One table of several runs that differ in their seed: quality over the prompts of all of them.

Notebooks that compare configurations record a table ``summary``, a row for each by its ``label``, and ``requests``, a
row a prompt. Of each label the prompts of all runs are taken together, with `quality_metrics` as a single run has them,
so intervals are over prompts of all seeds; everything else a summary says is of the first run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from emoe_core.errors import ExperimentError
from workbench.quality.experiment import quality_metrics

Tables = Mapping[str, pd.DataFrame]
SUMMARY, PROMPTS = "summary", "requests"


def pooled_row(runs: Sequence[Tables], label: str) -> dict[str, Any]:
    """Return the row of a label over the prompts of all runs.

    Parameters
    ----------
    runs : sequence of mapping
        Tables of runs of one configuration and several seeds, by name.
    label : str

    Returns
    -------
    dict
        The first run's row of ``summary``, with the metrics of `quality_metrics` in place of its own, and ``seeds``.

    Raises
    ------
    ExperimentError
        When a run has no such tables, or no such label.
    """
    parts, first = [], None
    for tables in runs:
        if SUMMARY not in tables or PROMPTS not in tables:
            raise ExperimentError(f"a recorded run has no tables {SUMMARY!r} and {PROMPTS!r} to take together.")
        summary, prompts = (tables[name][tables[name]["label"] == label] for name in (SUMMARY, PROMPTS))
        if summary.empty or prompts.empty:
            raise ExperimentError(f"a recorded run has no configuration labelled {label!r}.")
        first = summary.iloc[0].to_dict() if first is None else first
        parts.append(prompts)
    return {**(first or {}), **quality_metrics(pd.concat(parts, ignore_index=True)), "seeds": len(runs)}


def pooled_summary(runs: Sequence[Tables], labels: Sequence[str] = ()) -> pd.DataFrame:
    """Return `pooled_row` of some labels, of all that the first run has if none are given, a row each."""
    return pd.DataFrame(
        [pooled_row(runs, label) for label in labels or list(runs[0].get(SUMMARY, {"label": []})["label"])]
    )
