"""A project folder for tests of sweeps: its own store, and sweep files over the dummy notebook."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from workbench.tracking.place import HOME_VARIABLE
from workbench.tracking.runs import children, current_runs, find_parent
from workbench.tracking.store import open_store

NOTEBOOK = Path(__file__).parent / "fixtures" / "dummy.ipynb"
COMMAND = [sys.executable, "-c", "from workbench.cli import main; main()"]
PATIENCE_S = 120.0


class Bench:
    """A project root with a store; its sweeps are called ``dummy``."""

    answer: subprocess.CompletedProcess[str]

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, *, grid: dict[str, list[Any]], **stage: Any) -> Path:
        """Write a sweep file over the dummy notebook and return its path."""
        entry = {"notebook": str(NOTEBOOK), "kind": "quality", "grid": grid} | stage
        path = self.root / "dummy.yaml"
        path.write_text(yaml.safe_dump({"name": "dummy", "stages": [entry]}))
        return path

    def emoe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in this project."""
        command = [*COMMAND, *arguments]
        return subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the command line in this project without waiting."""
        # A shell ignores interrupts for what it runs in the background, and children inherit that.
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self._environment(),
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def current(self) -> list[Any]:
        """Return the current runs of the newest sweep in the order of its file."""
        client = open_store()
        return current_runs(client, find_parent(client))

    def all_runs(self) -> list[Any]:
        """Return every run that the newest sweep ever made, newest first."""
        client = open_store()
        parent = find_parent(client)
        return children(client, parent) if parent else []

    def statuses(self) -> list[str]:
        """Return the statuses of the current runs."""
        return [item.info.status for item in self.current()]

    def store_is_intact(self) -> bool:
        """Say whether sqlite finds nothing wrong with the store's file."""
        with contextlib.closing(sqlite3.connect(self.root / "mlruns" / "mlflow.db")) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])

    def kernel_of_waiting_run(self, sweep: subprocess.Popen[bytes]) -> int:
        """Return the process id of a kernel that waits at its gate, once there is one."""

        def find() -> list[str]:
            assert sweep.poll() is None, "the sweep ended before its run came to the gate"
            return [pid for item in self.all_runs() if (pid := item.data.tags.get("dummy.pid"))]

        return int(wait_for(find)[0])

    def _environment(self) -> dict[str, str]:
        return {**os.environ, HOME_VARIABLE: str(self.root), "COLUMNS": "200"}


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return the first true value of a condition that another process brings about."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("what the test waits for did not come about")
