"""Verify a recorded run: check, execute, judge, and record the judgement."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from emoe_core.errors import ExperimentError
from workbench.compare.differences import Difference, environment_differences
from workbench.compare.verify.checks import check_data, check_model, machine_differences
from workbench.compare.verify.judge import FAILING, PROSE_TABLES, Judgement, Tolerances, judge_metrics, judge_table
from workbench.compare.verify.plan import Plan
from workbench.compare.verify.rerun import rerun
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import ERROR_TAG
from workbench.tracking.store import finite

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

VERIFIED_TAG = "emoe.verified"
# Of the environment that the notebook's process records: another value means that something else was run.
IDENTIFYING = ("model", "data", "seed", "data type", "reference")


@dataclass(frozen=True)
class Verification:
    """How a run was reproduced.

    Attributes
    ----------
    run, again : RunRecord
        The recorded run, and its second execution.
    metrics, tables : list of Judgement
    differences : list of Difference
        What was not as recorded while it ran again: machine, libraries, model, data, seed.
    """

    run: RunRecord
    again: RunRecord
    plan: Plan
    metrics: list[Judgement]
    tables: list[Judgement]
    differences: list[Difference]

    @property
    def failures(self) -> list[str]:
        """What was not reproduced."""
        identity = [f"{d.what}: {d.a}, now {d.b}" for d in self.differences if d.what in IDENTIFYING]
        failed = "" if self.again.status == "FINISHED" else self.again.tags.get(ERROR_TAG, self.again.status)
        judged = [f"{item.name} {item.status}" for item in [*self.metrics, *self.tables] if item.status in FAILING]
        return [*([f"the notebook failed: {failed}"] if failed else []), *identity, *judged]

    def counts(self) -> dict[str, int]:
        """Return how many metrics and columns there are of each status."""
        return dict(Counter(item.status for item in [*self.metrics, *self.tables]))

    def to_dict(self) -> dict[str, Any]:
        """Return the verification as JSON has it."""
        return {
            "run_id": self.run.run_id,
            "again_run_id": self.again.run_id,
            "reproduced": not self.failures,
            "executed": self.plan.origin,
            "parameters": self.plan.parameters,
            "threads": self.plan.threads,
            "remarks": self.plan.remarks,
            "differences": [{"what": d.what, "recorded": d.a, "now": d.b} for d in self.differences],
            "failures": self.failures,
            "metrics": [finite(asdict(item)) for item in self.metrics],
            "tables": [finite(asdict(item)) for item in self.tables],
        }


def verify_run(
    client: MlflowClient,
    run: RunRecord,
    plan: Plan,
    *,
    tolerances: Tolerances | None = None,
    anyway: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> Verification:
    """Make a run again and judge what came out.

    Parameters
    ----------
    client : MlflowClient
    run : RunRecord
    plan : Plan
        See `plan_rerun`.
    tolerances : Tolerances, optional
    anyway : bool
        Also where the model's content hash or the data changed.
    tell : callable
        Called with sentences for people: what differs beforehand, what was checked.

    Raises
    ------
    ExperimentError
        When the model or the data is not what was recorded, without `anyway`.
    """
    limits = tolerances or Tolerances()
    for item in machine_differences(run, plan):
        tell(f"differs: {item.what}: recorded {item.a}, here {item.b}{f' ({item.why})' if item.why else ''}")
    if anyway:
        tell("model and data: not compared beforehand (--anyway)")
    else:
        tell(check_model(run, plan))
        said, other = check_data(run)
        if other is not None:
            raise ExperimentError(
                f"the prompts of {run.describe()} are not those that it ran on: their hash is {other.b}, recorded was "
                f"{other.a}. Prepare the data of that commit again (`emoe data prepare`), or give --anyway."
            )
        tell(said)
    again = rerun(client, run, plan, tell)
    metrics: list[Judgement] = []
    tables: list[Judgement] = []
    differences = environment_differences(run.environment, again.environment) if run.environment else []
    if again.status == "FINISHED":
        metrics = judge_metrics(run.metrics, again.metrics, limits)
        for name in run.table_names:
            recorded = run.table(name)
            if recorded is not None and name not in PROSE_TABLES:
                tables += judge_table(name, recorded, again.table(name), limits)
    found = Verification(run, again, plan, metrics, tables, differences)
    client.log_text(again.run_id, json.dumps(found.to_dict(), indent=1), "verification.json")
    word = "not reproduced" if found.failures else "reproduced"
    client.set_tag(run.run_id, VERIFIED_TAG, f"{word} by {again.run_id}")
    return found
