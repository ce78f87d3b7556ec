"""Run a command in a fresh process that the kernel ends when it needs more memory than it was given.

The limit is a control group's (`machine/control_groups.py`), made for each command and removed afterwards. The
command's process waits until it is a member, and only then becomes the command, so all that the command allocates is
counted. Where the limit or the membership does not hold, `LimitError` is raised and the command never runs.

What counts in the group: anonymous memory, kernel memory, and the page cache of files that the group was the first to
read. The kernel drops clean page cache before it kills, so cached files do not fail a command, they slow it down near
the limit. Pages that another group read first (shared libraries in use elsewhere, a checkpoint already cached) are not
charged here: `drop_cached` a file first where that matters, and have no other process map it. Memory of a GPU is not
limited.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.machine.control_groups import Controller, find_controller, limited_group

# Dies with its parent (PR_SET_PDEATHSIG), which could no longer end it. Waits for a byte: until it comes, the process
# is under no limit; if it never comes, it ends. Python ignores SIGPIPE, which a command would inherit.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if os.read(0, 1):
    os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class LimitedRun:
    """What became of a command under a limit.

    Attributes
    ----------
    limit_bytes : int
        The limit as the kernel took it: rounded down to whole pages.
    peak_bytes : int or None
        Highest use of the group, page cache included; None where the kernel does not tell (v2 before Linux 5.19).
    limit_hits : int
        How often the group reached its limit and the kernel had to reclaim or kill.
    killed_by_limit : bool
        Whether the kernel ended the command because of the limit.
    timed_out : bool
        Whether it was ended because it took longer than allowed.
    returncode : int
        As `subprocess`: negative is a signal.
    output, errors : str
        What it printed.
    duration_s : float
    """

    limit_bytes: int
    peak_bytes: int | None
    limit_hits: int
    killed_by_limit: bool
    timed_out: bool
    returncode: int
    output: str
    errors: str
    duration_s: float


def run_limited(
    command: Sequence[str],
    limit_bytes: int,
    *,
    controller: Controller | None = None,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> LimitedRun:
    """Run a command under a memory limit and wait for it.

    Parameters
    ----------
    command : sequence of str
    limit_bytes : int
        At least one page.
    controller : Controller, optional
        Found with `find_controller` when missing.
    timeout_s : float, optional
        The command is ended after this long.
    env : mapping, optional
        Environment of the command; this process's when missing.

    Raises
    ------
    LimitError
        When the limit cannot be set, or the process cannot be put under it. The command did not run then.
    """
    with limited_group(controller or find_controller(), limit_bytes) as group:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            # An interrupt from the keyboard is for us: we end the group.
            start_new_session=True,
        )
        timed_out = False
        try:
            group.join(process.pid)
            try:
                output, errors = process.communicate(b"\n", timeout=timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
                group.kill()
                output, errors = process.communicate()
        finally:
            # One that was not put into the group is not among its members.
            if process.poll() is None:
                process.kill()
                process.wait()
        return LimitedRun(
            limit_bytes=group.limit_bytes,
            peak_bytes=group.peak_bytes,
            limit_hits=group.limit_hits,
            # The machine may run out too, and the kernel then counts its kill in the victim's group.
            killed_by_limit=(
                not timed_out and process.returncode == -signal.SIGKILL and group.kills > 0 and group.limit_hits > 0
            ),
            timed_out=timed_out,
            returncode=process.returncode,
            output=output.decode(errors="replace"),
            errors=errors.decode(errors="replace"),
            duration_s=time.perf_counter() - started,
        )


def drop_cached(files: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next reader is charged for them; pages mapped by others stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
