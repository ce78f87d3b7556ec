"""Tables with a row for each prompt, from two runs, put side by side.

`pairing` says which rows belong together. Quality is compared on pairs that were scored on the same continuation; where
that is not recorded prompt by prompt it is taken from the runs' reference hash, and a difference there is flagged
(`differences`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.compare.change import Change, paired_change
from workbench.compare.pairing import pair_keys, pairs_after_others, side_by_side, why_unpaired
from workbench.metrics.catalogue import metric_of
from workbench.tracking.record import RunRecord

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
    data = [run.environment.get("data_hash") for run in (a, b)]
    same_data = None if None in data else data[0] == data[1]
    for name in TABLES:
        first, second = a.table(name), b.table(name)
        if first is None or second is None or first.empty or second.empty:
            continue
        keys = pair_keys(first, second, bool(same_data))
        if keys is None:
            remarks.append(f"{name}: prompts cannot be paired: {why_unpaired(first, second, same_data)}.")
            continue
        both = side_by_side(first, second, keys)
        if both is None:
            remarks.append(f"{name}: prompts cannot be paired, rows of one prompt cannot be told apart.")
            continue
        if both.empty:
            remarks.append(f"{name}: the runs have no prompt in common.")
            continue
        if len(both) < max(len(first), len(second)):
            remarks.append(f"{name}: {len(both)} pairs of {len(first)} rows in A and {len(second)} in B.")
        moved = pairs_after_others(first, second, keys, len(both))
        if moved:
            remarks.append(
                f"{name}: {moved} pairs came after other prompts in A than in B, so slots may have differed."
            )
        known = {change.metric for change in changes}
        found, unlike = _changes_of(both)
        if unlike:
            remarks.append(f"{name}: quality leaves out {unlike} pairs that were scored on other continuations.")
        changes += [change for change in found if change.metric not in known]
    return PromptChanges(changes, remarks)


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
            if weighted or metric_of(column).group == "quality":
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
                    by_prompt=True,
                )
            )
    return changes, unlike
