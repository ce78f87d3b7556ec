"""Two runs against each other: what differs, how metrics changed over their prompts, and their single values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from emoe_core.errors import ExperimentError
from workbench.compare.change import Change, paired_change
from workbench.compare.differences import (
    Difference,
    doubted,
    is_doubtful,
    other_differences,
    parameter_differences,
    refuse_warm_beside_cold,
)
from workbench.compare.prompts import prompt_changes
from workbench.metrics.catalogue import metric_of
from workbench.metrics.names import named_metrics
from workbench.metrics.show import show, title_of
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import ERROR_TAG


@dataclass(frozen=True)
class RunComparison:
    """What two runs say together.

    Attributes
    ----------
    parameters, others : list of Difference
        What the comparison is about, and what else differs.
    over_prompts : list of Change
        Metrics paired prompt by prompt.
    single : list of Change
        Metrics that each run has one value of.
    remarks : list of str
        What is to be said about the pairing.
    """

    a: RunRecord
    b: RunRecord
    parameters: list[Difference]
    others: list[Difference]
    over_prompts: list[Change]
    single: list[Change]
    remarks: list[str]

    @property
    def doubted(self) -> set[str]:
        """Groups of metrics that something beside the parameters may have moved."""
        return doubted(self.others)

    @property
    def doubted_over_prompts(self) -> set[str]:
        """The same of metrics that are paired by prompt."""
        return doubted(self.others, by_prompt=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        return {
            "a": _identity(self.a),
            "b": _identity(self.b),
            "parameters": [asdict(item) for item in self.parameters],
            "others": [asdict(item) for item in self.others],
            "doubtful_groups": sorted(self.doubted),
            "doubtful_groups_over_prompts": sorted(self.doubted_over_prompts),
            "over_prompts": [self.judged(change) for change in self.over_prompts],
            "single": [self.judged(change) for change in self.single],
            "remarks": self.remarks,
        }

    @property
    def metrics(self) -> set[str]:
        """Names of everything that is compared."""
        return {change.metric for change in [*self.over_prompts, *self.single]}

    def only(self, metrics: Collection[str]) -> RunComparison:
        """Return the comparison of some metrics."""
        over_prompts, single = (
            [change for change in changes if change.metric in metrics] for changes in (self.over_prompts, self.single)
        )
        return replace(self, over_prompts=over_prompts, single=single)

    def judged(self, change: Change) -> dict[str, Any]:
        """Return a change with the statement whether something else may have caused it."""
        return change.to_dict() | {"doubtful": is_doubtful(change, self.others)}


def compare_runs(
    a: RunRecord,
    b: RunRecord,
    *,
    metrics: Collection[str] | None = None,
    without_times: bool = False,
    may_be_empty: bool = False,
) -> RunComparison:
    """Compare two runs.

    Parameters
    ----------
    a, b : RunRecord
    metrics : collection of str, optional
        Only these, named as they are or as tables show them (`metric_names`); all when missing.
    without_times : bool
        Leave out everything that a clock decides; runs may then have read experts in different ways.
    may_be_empty : bool
        Do not insist on a common metric.

    Raises
    ------
    ExperimentError
        When a run did not finish, both are the same, one of `metrics` is not in both, or one is warm and the other
        cold.
    """
    for run in (a, b):
        if run.status != "FINISHED":
            reason = f" ({run.tags[ERROR_TAG]})" if ERROR_TAG in run.tags else ""
            raise ExperimentError(
                f"{run.describe()} is {run.status.lower()}{reason}: only finished runs are compared. Make it again."
            )
    if a.run_id == b.run_id:
        raise ExperimentError(f"A and B are the same run, {a.describe()}: name two.")
    if not without_times:
        refuse_warm_beside_cold(a, b)

    def wanted(name: str) -> bool:
        return not (without_times and metric_of(name).group == "time")

    paired = prompt_changes(a, b)
    over_prompts = [change for change in paired.changes if wanted(change.metric)]
    told = {change.metric for change in paired.changes}
    common = [name for name in a.metrics if name in b.metrics and name not in told and wanted(name)]
    values = {name: [np.array([run.metrics[name]]) for run in (a, b)] for name in common}
    single = [paired_change(name, *both) for name, both in values.items() if np.isfinite(both).all()]
    shown = {name: [show(name, run.metrics[name]) for run in (a, b)] for name in common}
    endless = [
        f"{title_of(name)}: {shown[name][0]} in A, {shown[name][1]} in B; the difference is no number."
        for name, both in values.items()
        if not np.isfinite(both).all() and shown[name][0] != shown[name][1]
    ]
    if not over_prompts and not single and not endless and not may_be_empty:
        raise ExperimentError("the runs have no metric in common.")
    differ = parameter_differences(a, b), other_differences(a, b)
    found = RunComparison(a, b, *differ, in_order(over_prompts), in_order(single), [*paired.remarks, *endless])
    return found.only(named_metrics(metrics, found.metrics)) if metrics else found


def in_order(changes: list[Change]) -> list[Change]:
    """Return changes sorted by variant and by what they are about."""
    variants = list(dict.fromkeys(change.variant for change in changes))
    return sorted(changes, key=lambda change: (variants.index(change.variant), metric_of(change.metric).rank))


def _identity(run: RunRecord) -> dict[str, Any]:
    return {"run_id": run.run_id, "name": run.name, "notebook": run.notebook_name, "params": run.params}
