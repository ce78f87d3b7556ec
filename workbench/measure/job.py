"""The inside of a process that is made for one measurement: its task comes as JSON, its result goes as JSON.

What went wrong is told by the exit code: `NO_MEMORY` when memory could not be had, `REFUSED` with one line on the
standard error when a user can mend it. Imports nothing heavy, so that the process of a small program stays small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoe_core.errors import EmoeError

NO_MEMORY, REFUSED = 3, 2


def answer_job(work: Callable[[dict[str, Any]], dict[str, Any]], source: Path, target: Path) -> int:
    """Read a job's spec, do the work, write its result; return the exit code of the process."""
    try:
        result = work(json.loads(source.read_text()))
    except MemoryError:
        return NO_MEMORY
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return NO_MEMORY
    except EmoeError as error:
        print(error, file=sys.stderr)
        return REFUSED
    target.write_text(json.dumps(result))
    return 0
