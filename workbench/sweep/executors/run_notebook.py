"""Execute one notebook in this process's own kernel: ``python -m workbench.sweep.executors.run_notebook JOB.json``.

`executors.notebook_process` starts one such process per run, so that a kernel that crashes or is killed for memory
takes only itself down. The job is a JSON file with ``notebook, working_folder, output, parameters, status,
owner_pid``; the outcome is written to ``status`` as JSON with ``ok`` and, after a failure, ``error`` (one line) and
``traceback``. The kernel is this interpreter whatever kernel the notebook names. It does not write to MLflow: the
notebook and the sweep do.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from emoe_core.files import write_whole

KERNEL = "python3"
ORPHAN_POLL_S = 0.5
# Papermill's minute is short on a busy machine; a kernel that dies is noticed at once. One that lives and never answers
# was seen once in thousands of starts: no cell has run by then, so it is simply started anew.
KERNEL_START_S = 150
KERNEL_STARTS = 3
DEAF_KERNEL = "Kernel didn't respond"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def execute(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's notebook and return its outcome."""
    # jsonschema uses this optional checker of web addresses only if it is there, and building its grammar takes
    # longer than everything else that papermill imports.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill
    from papermill.exceptions import PapermillExecutionError

    for left in reversed(range(KERNEL_STARTS)):
        try:
            papermill.execute_notebook(
                job["notebook"],
                job["output"],
                parameters=job["parameters"],
                kernel_name=KERNEL,
                language="python",
                cwd=job["working_folder"],
                progress_bar=False,
                start_timeout=KERNEL_START_S,
            )
        except PapermillExecutionError as error:
            line = f"{error.ename}: {ANSI.sub('', error.evalue)}"
            return {"ok": False, "error": line, "traceback": ANSI.sub("", "\n".join(error.traceback))}
        except Exception as error:
            if not (left and str(error).startswith(DEAF_KERNEL)):
                return {"ok": False, "error": f"{type(error).__name__}: {ANSI.sub('', str(error))}"}
        else:
            break
    return {"ok": True}


def use_this_interpreter(folder: Path) -> None:
    """Put a kernel specification of this interpreter before all others."""
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_PATH")]))


def die_with(owner_pid: int) -> None:
    """End this process and its kernel when the sweep is gone, even if it was killed without a chance to tell."""

    def watch() -> None:
        import psutil

        while os.getppid() == owner_pid:
            time.sleep(ORPHAN_POLL_S)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Run the job file named on the command line; the exit code is 0 when the notebook ran through."""
    job = json.loads(Path(arguments[0]).read_text())
    die_with(job["owner_pid"])
    with tempfile.TemporaryDirectory() as folder:
        use_this_interpreter(Path(folder))
        outcome = execute(job)
    write_whole(job["status"], json.dumps(outcome))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
