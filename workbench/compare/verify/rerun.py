"""Execute a plan in a process of its own and record it as a run of the experiment ``verify``.

The recorded run is left as it is, but for a tag that says how it was judged. An interrupt ends the process and its
kernel and leaves the new run as KILLED.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.compare.verify.plan import Plan
from workbench.sweep.executors.notebook_process import execute_text
from workbench.sweep.executors.protocol import Ending
from workbench.sweep.resume import ERROR_LETTERS, owner_tag
from workbench.sweep.run import terminated_like_interrupted
from workbench.tracking.place import HOME_VARIABLE, project_root
from workbench.tracking.record import RunRecord
from workbench.tracking.run import NOTEBOOK_FOLDER, new_run
from workbench.tracking.runs import ERROR_TAG, KIND_TAG, NOTEBOOK_TAG, OWNER_TAG, SOURCE_TAG
from workbench.tracking.store import machine_held

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "verify"
VERIFIES_TAG = "emoe.verifies"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def rerun(client: MlflowClient, run: RunRecord, plan: Plan, tell: Callable[[str], object]) -> RunRecord:
    """Execute the plan and return what it recorded, failed or not.

    Parameters
    ----------
    client : MlflowClient
    run : RunRecord
        The run that is verified.
    plan : Plan
    tell : callable
        Called with a sentence when the machine has to be waited for.
    """
    tags = {
        VERIFIES_TAG: run.run_id,
        NOTEBOOK_TAG: run.notebook_name or Path(plan.name).stem,
        OWNER_TAG: owner_tag(),
        SOURCE_TAG: plan.name,
    }
    # Runs that measure time must not be disturbed by this one, and this one's times only matter if it is such a run.
    alone = run.tags.get(KIND_TAG) == "timing"
    with terminated_like_interrupted(), machine_held(alone, tell):
        run_id = new_run(client, EXPERIMENT, f"verify {run.name}", tags=tags)
        status = "KILLED"
        try:
            outcome = _execute(client, run_id, plan)
            status = "FINISHED" if outcome.ok else "FAILED"
            if not outcome.ok:
                client.set_tag(run_id, ERROR_TAG, outcome.error[:ERROR_LETTERS])
        finally:
            client.set_terminated(run_id, status)
    return RunRecord.of(client, client.get_run(run_id))


def _execute(client: MlflowClient, run_id: str, plan: Plan) -> Ending:
    environment = {HOME_VARIABLE: str(project_root())}
    if plan.threads is not None:
        environment |= dict.fromkeys(THREAD_VARIABLES, str(plan.threads))
    with tempfile.TemporaryDirectory(prefix="emoe-verify-") as folder:
        ending = execute_text(
            run_id, plan.name, json.dumps(plan.content), plan.parameters, Path(folder), environment, plan.working_folder
        )
        for file in ending.files:
            if file.name == plan.name:
                client.log_artifact(run_id, str(file), NOTEBOOK_FOLDER)
        return ending
