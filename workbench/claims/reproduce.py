"""Run claims again: the recorded run behind each is executed by `emoe verify`'s means and the claim's value compared.

A run that several claims rest on is executed once. What a claim tolerates is its own matter (``within``); everything
else that the run recorded is judged as `emoe verify` does, and told, but decides nothing here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from emoe_core.errors import ExperimentError
from workbench.claims.register import Claim, Found, Results
from workbench.claims.verdicts import NOT, REPRODUCED, WITHIN, Verdict, machine_name
from workbench.compare.verify.plan import plan_rerun
from workbench.compare.verify.verification import verify_run
from workbench.machine.environment import describe_environment
from workbench.results.taking import take_results
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import RECORDED_TAG, search

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.tracking import MlflowClient

    from workbench.tracking.recorded import RecordedRun


@dataclass(frozen=True)
class Reproduction:
    """A claim as recorded, and what its reruns came to."""

    name: str
    found: Found
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether the value is what was recorded, as far as the claim tolerates."""
        return self.verdict.word != NOT


def reproduce(
    client: MlflowClient,
    claims: dict[str, Claim],
    results: Results,
    tell: Callable[[str], object],
) -> list[Reproduction]:
    """Run claims again and return what came out, in their order.

    Parameters
    ----------
    client : MlflowClient
        Of the store that takes the recorded runs, and gets the reruns.
    claims : dict of str to Claim
    results : Results
    tell : callable
        Called with sentences for people.
    """
    found = {name: claim.found(results) for name, claim in claims.items()}
    take_results(client, results.folder, sorted({claim.sweep for claim in claims.values()}))
    again: dict[str, RunRecord] = {}
    every = {run.run_id: run for item in found.values() for run in item.runs}
    for place, run in enumerate(every.values(), 1):
        tell(f"[{place}/{len(every)}] {run.name} (recorded in {run.duration_s / 60:.1f} min)")
        again[run.run_id] = _run_again(client, run, tell)
    return [
        Reproduction(name, item, judge(item, [again[run.run_id] for run in item.runs])) for name, item in found.items()
    ]


def judge(found: Found, again: Iterable[RunRecord]) -> Verdict:
    """Return how far the value of reruns is from the recorded one."""
    claim, runs = found.claim, list(again)
    value, recorded = math.nan, found.value.value
    if all(run.status == "FINISHED" for run in runs):
        with contextlib.suppress(ExperimentError):  # a table that is not there any more: not reproduced
            value = claim.value_of([(run.metrics, _tables(run, claim)) for run in runs]).value
    off = abs(value - recorded)
    word = REPRODUCED if value == recorded else WITHIN if off <= claim.within * abs(recorded) else NOT
    here = describe_environment()
    machine = machine_name(here.to_dict())
    known = None if math.isnan(value) else value
    return Verdict(word, known, f"{datetime.now(UTC):%Y-%m-%d}", here.commit or "unknown", machine)


def _tables(run: RunRecord, claim: Claim) -> dict[str, pd.DataFrame]:
    found = {name: run.table(name) for name in claim.tables_needed()}
    return {name: table for name, table in found.items() if table is not None}


def _run_again(client: MlflowClient, run: RecordedRun, tell: Callable[[str], object]) -> RunRecord:
    taken = search(client, f"tags.`{RECORDED_TAG}` = '{run.run_id}'")[0]
    record = RunRecord.of(client, taken)
    return verify_run(client, record, plan_rerun(record), tell=tell).again
