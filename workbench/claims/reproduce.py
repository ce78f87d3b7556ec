"""Run claims again: the recorded run behind each is executed by `emoe verify`'s means and the claim's value compared.

A run that several claims rest on is executed once. What a claim tolerates is its own matter (``within``); everything
else that the run recorded is judged as `emoe verify` does, and told, but decides nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from workbench.claims.register import Claim, Found, Results
from workbench.claims.verdicts import NOT, REPRODUCED, WITHIN, Verdict
from workbench.compare.verify.plan import plan_rerun
from workbench.compare.verify.verification import verify_run
from workbench.machine.environment import describe_environment
from workbench.results.taking import take_results
from workbench.tracking.record import RunRecord
from workbench.tracking.runs import RECORDED_TAG, search

if TYPE_CHECKING:
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
    claim, values = found.claim, []
    for run in again:
        tables = {claim.table: run.table(claim.table)} if claim.table and run.status == "FINISHED" else {}
        values.append(claim.value_in(run.metrics, tables) if run.status == "FINISHED" else math.nan)
    value = math.fsum(values) / len(values)
    off = abs(value - found.value)
    same = value == found.value
    word = REPRODUCED if same else WITHIN if off <= claim.within * abs(found.value) else NOT
    here = describe_environment()
    machine = f"{here.cores} cores of {here.cpu}"
    known = None if math.isnan(value) else value
    return Verdict(word, known, f"{datetime.now(UTC):%Y-%m-%d}", here.commit or "unknown", machine)


def _run_again(client: MlflowClient, run: RecordedRun, tell: Callable[[str], object]) -> RunRecord:
    taken = search(client, f"tags.`{RECORDED_TAG}` = '{run.run_id}'")[0]
    record = RunRecord.of(client, taken)
    return verify_run(client, record, plan_rerun(record), tell=tell).again
