"""Tables with a row for each prompt, from two runs, put side by side.

Prompts are paired by their hash, within a variant where a run compared several. Runs that were recorded before prompts
had hashes are paired by their place in the stream, and only when the hash of the whole stream is the same. Quality is
compared on pairs that were scored on the same continuation; where that is not recorded prompt by prompt it is taken
from the runs' reference hash, and a difference there is flagged (`differences`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.compare.change import Change, paired_change
from workbench.metric_groups import group_of
from workbench.run_record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("requests", "answers")
# Weighted by output tokens, as `quality` defines them.
OVER_TOKENS = ("kl_nats", "log_ratio_nats", "top1_agreement")
LOG_RATIO, PERPLEXITY = "log_ratio_nats", "perplexity_ratio"
NO_METRICS = ("request", "prompt", "prompt_tokens", "output_tokens", "occurrence")


@dataclass(frozen=True)
class PromptChanges:
    """Changes over prompts, and what is to be said about the pairing."""

    changes: list[Change]
    remarks: list[str]


def prompt_changes(a: RunRecord, b: RunRecord) -> PromptChanges:
    """Return how every metric that both runs have prompt by prompt changed."""
    changes: list[Change] = []
    remarks: list[str] = []
    same_data = a.environment.get("data_hash") is not None and (
        a.environment.get("data_hash") == b.environment.get("data_hash")
    )
    for name in TABLES:
        first, second = a.table(name), b.table(name)
        if first is None or second is None or first.empty or second.empty:
            continue
        keys = pair_keys(first, second, same_data)
        if keys is None:
            remarks.append(f"{name}: prompts cannot be paired, the runs had other data and do not say which prompts.")
            continue
        both = _side_by_side(first, second, keys)
        if both is None:
            remarks.append(f"{name}: prompts cannot be paired, rows of one prompt cannot be told apart.")
            continue
        if both.empty:
            remarks.append(f"{name}: the runs have no prompt in common.")
            continue
        if len(both) < max(len(first), len(second)):
            remarks.append(f"{name}: {len(both)} pairs of {len(first)} rows in A and {len(second)} in B.")
        known = {change.metric for change in changes}
        found, unlike = _changes_of(both)
        if unlike:
            remarks.append(f"{name}: quality leaves out {unlike} pairs that were scored on other continuations.")
        changes += [change for change in found if change.metric not in known]
    return PromptChanges(changes, remarks)


def pair_keys(first: pd.DataFrame, second: pd.DataFrame, same_data: bool) -> list[str] | None:
    """Return the columns that pair the rows of two tables, None when nothing does."""

    def both_have(column: str) -> bool:
        return all(column in table and table[column].notna().all() for table in (first, second))

    variant = ["label"] if both_have("label") else []
    if both_have("prompt_hash"):
        # With equal streams the place tells repeats of a prompt apart.
        return [*variant, "prompt_hash", *(["request"] if same_data and both_have("request") else [])]
    if both_have("prompt") and not np.issubdtype(first["prompt"].dtype, np.number):
        return [*variant, "prompt"]
    return [*variant, "request"] if same_data and both_have("request") else None


def _side_by_side(first: pd.DataFrame, second: pd.DataFrame, keys: list[str]) -> pd.DataFrame | None:
    tables = []
    for table in (first, second):
        # A stream longer than its data repeats prompts: the first occurrence is paired with the first.
        numbered = table.assign(occurrence=table.groupby(keys).cumcount())
        if "prompt_hash" not in keys and "prompt" not in keys and numbered["occurrence"].any():
            return None
        tables.append(numbered)
    return tables[0].merge(tables[1], on=[*keys, "occurrence"], suffixes=("_a", "_b"), validate="one_to_one")


def _changes_of(both: pd.DataFrame) -> tuple[list[Change], int]:
    """Return the changes of every numeric column, and how many pairs quality could not use."""
    columns = [
        name.removesuffix("_a")
        for name in both
        if name.endswith("_a") and both[name].dtype.kind in "fiub" and name.removesuffix("_a") not in NO_METRICS
    ]
    variants = list(dict.fromkeys(both["label"])) if "label" in both else [""]
    changes: list[Change] = []
    unlike = 0
    for variant in variants:
        rows = both if variant == "" else both[both["label"] == variant]
        alike = np.ones(len(rows), dtype=bool)
        for column in ("scored_hash", "output_tokens"):
            if f"{column}_a" in rows:
                alike &= (rows[f"{column}_a"] == rows[f"{column}_b"]).to_numpy()
        unlike += int((~alike).sum())
        for column in columns:
            if f"{column}_b" not in rows or rows[f"{column}_b"].dtype.kind not in "fiub":
                continue
            first, second = (rows[f"{column}_{side}"].to_numpy(dtype=float) for side in "ab")
            usable = ~(np.isnan(first) | np.isnan(second))
            weighted = column in OVER_TOKENS and "output_tokens_a" in rows
            if weighted or group_of(column) == "quality":
                usable &= alike
            if not usable.any():
                continue
            changes.append(
                paired_change(
                    PERPLEXITY if column == LOG_RATIO else column,
                    first[usable],
                    second[usable],
                    weights=rows["output_tokens_a"].to_numpy(dtype=float)[usable] if weighted else None,
                    variant=str(variant),
                    scale=np.exp if column == LOG_RATIO else None,
                )
            )
    return changes, unlike
