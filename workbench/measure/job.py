"""The inside of a process that is made for one measurement: its spec comes as JSON, its answer goes as JSON.

What went wrong is told by the exit code: `NO_MEMORY` when memory could not be had, `REFUSED` with one line on the
standard error when a user can mend it. Imports nothing heavy, so that the process of a small program stays small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe_core.errors import EmoeError, is_out_of_memory
from workbench.machine.process_counters import status_bytes

NO_MEMORY, REFUSED = 3, 2
PROGRESS = "done"


def answer_job(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Do the work that the command line names, and return the exit code of the process.

    The command line is ``SPEC ANSWER``, two files. To the work's answer comes ``peak_bytes``: the most memory that was
    resident in the process's life (VmHWM), also where the work started the peak anew after its ``load_peak_bytes``.
    """
    spec, target = (Path(name) for name in sys.argv[1:])
    try:
        answer = work(json.loads(spec.read_text()))
    except EmoeError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return NO_MEMORY
    peak_bytes = status_bytes("VmHWM")
    if peak_bytes is not None:
        answer["peak_bytes"] = max(peak_bytes, answer.get("load_peak_bytes", 0))
    target.write_text(json.dumps(answer))
    return 0


def report_progress(done: int, total: int) -> None:
    """Tell the process that waits for this one how far the work is."""
    print(PROGRESS, done, total, flush=True)
