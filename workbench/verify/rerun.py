"""Execute a plan in a process of its own and record it as a run of the experiment ``verify``.

The recorded run is left as it is, but for a tag that says how it was judged. An interrupt ends the process and its
kernel and leaves the new run as KILLED.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.executors.notebook_process import NotebookProcess
from workbench.executors.protocol import Ending
from workbench.run_record import RunRecord
from workbench.store import HOME_VARIABLE, disk_errors, locked, project_root
from workbench.sweep import terminated_like_interrupted
from workbench.sweep_state import ERROR_TAG, NOTEBOOK_TAG, OWNER_TAG, owner_tag
from workbench.tracking import NOTEBOOK_FOLDER, new_run
from workbench.verify.plan import Plan

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "verify"
VERIFIES_TAG = "emoe.verifies"
POLL_S = 0.1
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
        "mlflow.source.name": plan.name,
    }
    # Runs that measure time must not be disturbed by this one, and this one's times only matter if it is such a run.
    alone = run.tags.get("emoe.kind") == "timing"
    with terminated_like_interrupted(), contextlib.ExitStack() as stack:
        if not stack.enter_context(locked("machine", shared=not alone, wait=False)):
            tell("Waiting for a sweep that measures time on this machine.")
            stack.enter_context(locked("machine", shared=not alone))
        with disk_errors():
            run_id = new_run(client, EXPERIMENT, f"verify {run.name}", tags=tags)
        status = "KILLED"
        try:
            outcome = _execute(client, run_id, plan)
            status = "FINISHED" if outcome.ok else "FAILED"
            if not outcome.ok:
                client.set_tag(run_id, ERROR_TAG, outcome.error[:2000])
        finally:
            client.set_terminated(run_id, status)
    return RunRecord.of(client, client.get_run(run_id))


def _execute(client: MlflowClient, run_id: str, plan: Plan) -> Ending:
    with tempfile.TemporaryDirectory(prefix="emoe-verify-") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        notebook = folder / "source" / plan.name
        notebook.write_text(json.dumps(plan.content), encoding="utf-8")
        environment = {HOME_VARIABLE: str(project_root())}
        if plan.threads is not None:
            environment |= dict.fromkeys(THREAD_VARIABLES, str(plan.threads))
        process = NotebookProcess(run_id, notebook, plan.parameters, folder / "run", environment, plan.working_folder)
        try:
            while process.runs():
                time.sleep(POLL_S)
        finally:
            process.kill()
        if process.executed.is_file():
            with disk_errors():
                client.log_artifact(run_id, str(process.executed), NOTEBOOK_FOLDER)
        return process.ending()
