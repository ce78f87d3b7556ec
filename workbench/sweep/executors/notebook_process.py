"""One job as a process of this machine: `workbench.sweep.executors.run_notebook` with its files in a folder.

The process runs in a session of its own, so that an interrupt from the keyboard reaches only the sweep, and it ends by
itself when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from workbench.sweep.executors.protocol import Ending
from workbench.tracking.run import RUN_VARIABLE

KILL_WAIT_S = 5.0
POLL_S = 0.1


class NotebookProcess:
    """A notebook that is being executed.

    Parameters
    ----------
    run_id : str
        The MLflow run that the notebook writes to.
    notebook, working_folder : Path
    parameters : dict
    folder : Path
        Made if missing; holds the executed notebook, the output of the process and its outcome.
    environment : mapping
        Added to that of this process.
    """

    def __init__(
        self,
        run_id: str,
        notebook: Path,
        parameters: dict[str, Any],
        folder: Path,
        environment: Mapping[str, str],
        working_folder: Path | None = None,
    ) -> None:
        self.run_id, self.folder = run_id, folder
        self.executed, self._status, self._log = folder / notebook.name, folder / "status.json", folder / "process.log"
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "notebook": str(notebook),
            "working_folder": str(working_folder or notebook.parent),
            "output": str(self.executed),
            "parameters": parameters,
            "status": str(self._status),
            "owner_pid": os.getpid(),
        }
        (folder / "job.json").write_text(json.dumps(job))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workbench.sweep.executors.run_notebook", str(folder / "job.json")],
                env={**os.environ, **environment, RUN_VARIABLE: run_id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def runs(self) -> bool:
        """Say whether the process still runs."""
        return self._process.poll() is None

    def ending(self) -> Ending:
        """Return how a process that ended did."""
        files = tuple(file for file in (self.executed, self._log) if file.is_file() and file.stat().st_size)
        if self._status.is_file() and self._status.stat().st_size:
            return Ending(self.run_id, files=files, **json.loads(self._status.read_text()))
        code = self._process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = f" {lines[-1]}" if lines else ""
        return Ending(self.run_id, False, f"the run's process ended without a result ({how}){last}", files=files)

    def kill(self) -> None:
        """End the process and its kernel."""
        victims: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            victims = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims, timeout=KILL_WAIT_S)


def execute_text(
    run_id: str,
    name: str,
    text: str,
    parameters: dict[str, Any],
    folder: Path,
    environment: Mapping[str, str],
    working_folder: Path | None = None,
) -> Ending:
    """Execute a notebook that is given as text, and wait for its end; an interrupt ends its process as well.

    Parameters
    ----------
    run_id, parameters, environment, working_folder
        As for `NotebookProcess`.
    name, text : str
        File name and content of the notebook.
    folder : Path
        Keeps the notebook and the files of the ending.
    """
    source = folder / "source"
    source.mkdir()
    notebook = source / name
    notebook.write_text(text, encoding="utf-8")
    process = NotebookProcess(run_id, notebook, parameters, folder / "run", environment, working_folder)
    try:
        while process.runs():
            time.sleep(POLL_S)
    finally:
        process.kill()
    return process.ending()
