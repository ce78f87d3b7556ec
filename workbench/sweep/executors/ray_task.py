"""The part of a Ray run that happens on a node of the cluster.

The node needs the same installation as the machine that sweeps; that the code is the same is checked by its hash. The
notebook itself is sent along. What it logs goes to the store by the environment that the sweep hands over; the executed
notebook and the output of the process come back as bytes. Threads and GPUs are those that Ray set for the task.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.machine.environment import code_hash
from workbench.sweep.executors.notebook_process import execute_text


@dataclass(frozen=True)
class Parcel:
    """All that a node gets to carry out a job."""

    run_id: str
    notebook_name: str
    notebook_text: str
    working_folder: str
    parameters: dict[str, Any]
    environment: dict[str, str]
    code: str


def carry_out(parcel: Parcel) -> dict[str, Any]:
    """Execute the notebook and return its outcome, with the files to keep under ``contents``."""
    if parcel.code != code_hash():
        error = f"node {os.uname().nodename} has another version of this code: install the same one on every node."
        return {"ok": False, "error": error, "contents": {}}
    with tempfile.TemporaryDirectory(prefix="emoe-run-") as scratch:
        usual = Path(parcel.working_folder)
        ending = execute_text(
            parcel.run_id,
            parcel.notebook_name,
            parcel.notebook_text,
            parcel.parameters,
            Path(scratch),
            parcel.environment,
            usual if usual.is_dir() else None,
        )
        contents = {file.name: file.read_bytes() for file in ending.files}
        return {k: v for k, v in asdict(ending).items() if k in ("ok", "error", "traceback")} | {"contents": contents}
