"""Run a command in a fresh process and wait for it, under a memory limit of the kernel where one is given.

The limit is a control group's (`machine/control_groups.py`), made for each command and removed afterwards. The
command's process waits until it is a member, and only then becomes the command, so all that the command allocates is
counted. Where the limit or the membership does not hold, `LimitError` is raised and the command never runs. With or
without a limit, the command and what it started end when they take too long, and when this process does.

What counts in the group: anonymous memory, kernel memory, and the page cache of files that the group was the first to
read. The kernel drops clean page cache before it kills, so cached files do not fail a command, they slow it down near
the limit. Pages that another group read first (shared libraries in use elsewhere, a checkpoint already cached) are not
charged here: drop a file from the cache first where that matters, and have no other process map it. Memory of a GPU is
not limited.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
class ProcessRun:
    """What became of a command.

    Attributes
    ----------
    returncode : int
        As `subprocess`: negative is a signal.
    output, errors : str
        What it printed.
    duration_s : float
    timed_out : bool
        Whether it was ended because it took longer than allowed.
    limit_bytes : int or None
        The limit as the kernel took it: rounded down to whole pages; None without one, as the next.
    group_peak_bytes : int or None
        Highest use of the group, page cache included; None where the kernel does not tell (v2 before Linux 5.19).
    limit_hits : int
        How often the group reached its limit and the kernel had to reclaim or kill.
    killed_by_limit : bool
        Whether the kernel ended the command because of the limit.
    """

    returncode: int
    output: str
    errors: str
    duration_s: float
    timed_out: bool = False
    limit_bytes: int | None = None
    group_peak_bytes: int | None = None
    limit_hits: int = 0
    killed_by_limit: bool = False


def run_process(
    command: Sequence[str],
    *,
    limit_bytes: int | None = None,
    controller: Controller | None = None,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> ProcessRun:
    """Run a command and wait for it.

    Parameters
    ----------
    command : sequence of str
    limit_bytes : int, optional
        At least one page; without it the process runs in this process's groups.
    controller : Controller, optional
        What sets the limit; found with `find_controller` when missing.
    timeout_s : float, optional
        The command is ended after this long.
    env : mapping, optional
        Environment of the command; this process's when missing.
    on_line : callable, optional
        Called with each line that the command prints, when it does.

    Raises
    ------
    LimitError
        When the limit cannot be set, or the process cannot be put under it. The command did not run then.
    """
    limit = (
        contextlib.nullcontext() if limit_bytes is None else limited_group(controller or find_controller(), limit_bytes)
    )
    started, too_late = time.perf_counter(), threading.Event()
    output: list[str] = []
    errors: list[str] = []
    with (
        limit as group,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if env is None else dict(env),
            # A group of processes to end at once; and an interrupt from the keyboard is for us.
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None

        def end() -> None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if group is not None:
                group.kill()

        def give_up() -> None:
            too_late.set()
            end()

        # Both pipes are read at once: a full one would stop the command.
        reader = threading.Thread(target=lambda stream: errors.append(stream.read()), args=(process.stderr,))
        timer = threading.Timer(threading.TIMEOUT_MAX if timeout_s is None else timeout_s, give_up)
        timer.daemon = True
        try:
            if group is not None:
                group.join(process.pid)
            reader.start()
            timer.start()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.close()
            for line in process.stdout:
                output.append(line)
                if on_line is not None:
                    on_line(line)
            process.wait()
            reader.join()
        finally:
            timer.cancel()
            # One that was not put into the group is not among its members.
            if process.poll() is None:
                end()
        run = ProcessRun(
            returncode=process.returncode,
            output="".join(output),
            errors="".join(errors),
            duration_s=time.perf_counter() - started,
            timed_out=too_late.is_set(),
        )
        if group is None:
            return run
        killed = process.returncode == -signal.SIGKILL and not run.timed_out
        return replace(
            run,
            limit_bytes=group.limit_bytes,
            group_peak_bytes=group.peak_bytes,
            limit_hits=group.limit_hits,
            # The machine may run out too, and the kernel then counts its kill in the victim's group.
            killed_by_limit=killed and group.kills > 0 and group.limit_hits > 0,
        )
