"""Two sweeps against each other: runs of equal parameters are pairs, and metrics change over the pairs.

A parameter that has one value in A and another in B (the model, say) is what the sweeps differ in; all others make the
pairs. Runs without a partner are listed. Over pairs the ratio is the geometric mean of the pairs' ratios, since
configurations differ in size; differences are plain means.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emoe_core.errors import ExperimentError
from workbench.compare.change import Change, paired_change
from workbench.compare.differences import Difference, doubted, is_doubtful
from workbench.compare.runs import RunComparison, compare_runs, in_order
from workbench.metrics.names import named_metrics
from workbench.tracking.record import RunRecord
from workbench.tracking.run_lookup import Found
from workbench.tracking.runs import METRICS_TAG


@dataclass(frozen=True)
class SweepComparison:
    """What two sweeps say together.

    Attributes
    ----------
    notebooks : dict of str to list of Change
        How metrics changed over the pairs of each notebook.
    pairs : list of RunComparison
    parameters, others : list of (Difference, int)
        What differs, and in how many pairs.
    unpaired : list of str
        Runs that have no partner, and why.
    """

    a: Found
    b: Found
    notebooks: dict[str, list[Change]]
    pairs: list[RunComparison]
    parameters: list[tuple[Difference, int]]
    others: list[tuple[Difference, int]]
    unpaired: list[str]

    @property
    def doubted(self) -> set[str]:
        """Groups of metrics that something beside the parameters may have moved."""
        return doubted(item for item, _ in self.others)

    def main_metrics(self, pair: RunComparison) -> list[Change]:
        """Return the changes of a pair that its sweep file names, paired over prompts where that is possible."""
        named = pair.a.tags.get(METRICS_TAG, "").split(",")
        changes = {change.metric: change for change in [*pair.single, *pair.over_prompts]}
        return [changes[name] for name in named if name in changes] or list(changes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        others = [item for item, _ in self.others]
        return {
            "a": self.a.title,
            "b": self.b.title,
            "parameters": [asdict(item) | {"pairs": count} for item, count in self.parameters],
            "others": [asdict(item) | {"pairs": count} for item, count in self.others],
            "doubtful_groups": sorted(self.doubted),
            "doubtful_groups_over_prompts": sorted(doubted(others, by_prompt=True)),
            "over_pairs": {
                name: [c.to_dict() | {"doubtful": is_doubtful(c, others)} for c in changes]
                for name, changes in self.notebooks.items()
            },
            "pairs": [pair.to_dict() for pair in self.pairs],
            "unpaired": self.unpaired,
        }


def compare_sweeps(
    a: Found, b: Found, *, metrics: Collection[str] | None = None, without_times: bool = False
) -> SweepComparison:
    """Compare two sweeps; see `compare_runs` for the options and for what is refused.

    Raises
    ------
    ExperimentError
        Also when both are the same sweep, or no run of A has the parameters of a run of B.
    """
    if a.title == b.title:
        raise ExperimentError(f"A and B are the same sweep: {a.title}. Name two.")
    matched, unpaired = match_runs(a.runs, b.runs)
    if not matched:
        listing = "\n".join(f"  {line}" for line in unpaired[:12])
        raise ExperimentError(f"no run of A has the parameters of a run of B:\n{listing}")
    # A sweep may run several notebooks, and a metric be that of one of them.
    every = [compare_runs(*pair, without_times=without_times, may_be_empty=True) for pair in matched]
    if metrics:
        names = named_metrics(metrics, {name for pair in every for name in pair.metrics})
        every = [pair.only(names) for pair in every]
    pairs = [pair for pair in every if pair.over_prompts or pair.single]
    if not pairs:
        raise ExperimentError("no pair of runs has a metric in both.")
    notebooks = dict.fromkeys(pair.a.notebook_name for pair in pairs)
    return SweepComparison(
        a,
        b,
        {name: _over_pairs([pair for pair in pairs if pair.a.notebook_name == name]) for name in notebooks},
        pairs,
        _counted(item for pair in pairs for item in pair.parameters),
        _counted(item for pair in pairs for item in pair.others),
        unpaired,
    )


def match_runs(a: list[RunRecord], b: list[RunRecord]) -> tuple[list[tuple[RunRecord, RunRecord]], list[str]]:
    """Return the pairs of finished runs of equal parameters, and a line for each run without a partner."""
    unpaired = [
        f"{side}: {run.name} is {run.status.lower()}"
        for side, runs in (("A", a), ("B", b))
        for run in runs
        if run.status != "FINISHED"
    ]
    first, second = ([run for run in runs if run.status == "FINISHED"] for runs in (a, b))
    pairs = []
    for notebook in dict.fromkeys(run.notebook_name for run in [*first, *second]):
        here = [[run for run in runs if run.notebook_name == notebook] for runs in (first, second)]
        apart = _constant_but_different(*here)
        keyed = [{_key(run, apart): run for run in runs} for runs in here]
        for side, runs, found in zip("AB", here, keyed, strict=True):
            if len(found) < len(runs):
                raise ExperimentError(
                    f"sweep {side} holds runs of {notebook} with equal parameters: compare single runs instead."
                )
        pairs += [(run, keyed[1][key]) for key, run in keyed[0].items() if key in keyed[1]]
        for side, own, other in (("A", keyed[0], keyed[1]), ("B", keyed[1], keyed[0])):
            unpaired += [f"{side}: {run.name} has no partner" for key, run in own.items() if key not in other]
    return pairs, unpaired


def _constant_but_different(a: list[RunRecord], b: list[RunRecord]) -> set[str]:
    """Return the parameters that have one value in all of A and another in all of B."""
    apart = set()
    for name in {name for run in [*a, *b] for name in run.params}:
        values = [{_plain(run.params.get(name)) for run in runs} for runs in (a, b)]
        if len(values[0]) == len(values[1]) == 1 and values[0] != values[1]:
            apart.add(name)
    return apart


def _key(run: RunRecord, apart: set[str]) -> str:
    return json.dumps({name: _plain(value) for name, value in sorted(run.params.items()) if name not in apart})


def _plain(value: Any) -> str:
    # 1 and 1.0 are the same setting, whoever wrote the sweep file.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{float(value)!r}" if is_number else json.dumps(value)


def _over_pairs(pairs: list[RunComparison]) -> list[Change]:
    """Return how metrics changed over pairs of runs; a metric that some pair lacks is taken over the others."""
    found: dict[str, list[Change]] = {}
    for pair in pairs:
        for change in [*pair.over_prompts, *pair.single]:
            if change.variant == "":
                found.setdefault(change.metric, []).append(change)
    over = []
    for name, changes in found.items():
        a, b = (np.array([getattr(change, side) for change in changes]) for side in "ab")
        by_prompt = all(change.by_prompt for change in changes)
        over.append(paired_change(name, a, b, geometric=True, by_prompt=by_prompt))
    return in_order(over)


def _counted(items: Any) -> list[tuple[Difference, int]]:
    return list(Counter(items).items())
