"""Control groups with a memory limit: where they can be made, made with a limit that holds, and removed.

cgroup v1 (``memory.limit_in_bytes``) or v2 (``memory.max``), whichever the machine offers; swap is forbidden. A group
is made below a group of this process where that is allowed, else below one of its ancestors. The limit is read back,
and those of the groups around it are too: where it does not hold, `LimitError` says why.

Running something in a group is `measure/fresh_process.py`'s matter.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emoe_core.errors import LimitError

PROC = Path("/proc/self")
PREFIX = "emoe-limit-"
STALE_AFTER_S = 60.0
PROBE_BYTES = 64 * 2**20
FIX = (
    "Run as root, in a container with a writable cgroup file system, or in a group of your own with the memory "
    "controller delegated (systemd-run --user --scope -p Delegate=yes)."
)
_numbers = itertools.count()


@dataclass(frozen=True)
class Controller:
    """A memory controller (cgroup v1 or v2) and the group of it below which this process may make groups."""

    version: int
    parent: Path

    @property
    def limit_file(self) -> str:
        return "memory.limit_in_bytes" if self.version == 1 else "memory.max"

    @property
    def description(self) -> str:
        """The version and the file that sets the limit, for people."""
        return f"cgroup v{self.version}, {self.limit_file}"


@dataclass(frozen=True)
class Group:
    """A group with a limit; made by `limited_group`."""

    controller: Controller
    path: Path

    @property
    def limit_bytes(self) -> int:
        """The limit as the kernel took it: rounded down to whole pages."""
        return _number(self.path / self.controller.limit_file) or 0

    @property
    def peak_bytes(self) -> int | None:
        """Highest use so far, page cache included; None where the kernel does not tell (v2 before Linux 5.19)."""
        return _number(self.path / ("memory.max_usage_in_bytes" if self.controller.version == 1 else "memory.peak"))

    @property
    def limit_hits(self) -> int:
        """How often the group reached its limit, and the kernel had to reclaim or to kill."""
        if self.controller.version == 2:
            return _counter(self.path / "memory.events", "max")
        return _number(self.path / "memory.failcnt") or 0

    @property
    def kills(self) -> int:
        """Processes of the group that the kernel ended for want of memory."""
        name = "memory.oom_control" if self.controller.version == 1 else "memory.events"
        return _counter(self.path / name, "oom_kill")

    @property
    def members(self) -> list[int]:
        """Ids of the group's processes."""
        return [int(line) for line in _text(self.path / "cgroup.procs").split()]

    def join(self, pid: int) -> None:
        """Put a process into the group, and see that it is there; LimitError otherwise."""
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise LimitError(f"no process can be put into {self.path.parent} ({error.strerror}). {FIX}") from error
        if pid not in self.members:
            raise LimitError(f"the process did not arrive in {self.path}. {FIX}")

    def kill(self) -> None:
        """End every process of the group."""
        for pid in self.members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid:  # 0 stands for a process of another namespace
                    os.kill(pid, signal.SIGKILL)


def find_controller(proc: Path = PROC) -> Controller:
    """Return the memory controller that limits can be set with.

    Parameters
    ----------
    proc : Path
        Folder with this process's ``mountinfo`` and ``cgroup``.

    Raises
    ------
    LimitError
        When there is none, with the reason for each place that was tried.
    """
    reasons = []
    for version, parent in _candidates(proc):
        controller = Controller(version, parent)
        try:
            with limited_group(controller, PROBE_BYTES):
                _remove_stale(parent)
                return controller
        except LimitError as error:
            reasons.append(str(error))
    why = "; ".join(dict.fromkeys(reasons)) or "no cgroup file system hands a memory controller to this process"
    raise LimitError(f"no hard memory limit can be set here: {why}. {FIX}")


@contextlib.contextmanager
def limited_group(controller: Controller, limit_bytes: int) -> Iterator[Group]:
    """Make a group with a limit; end what is left in it and remove it afterwards, also after an error.

    Raises
    ------
    LimitError
        When the group cannot be made, or the limit would not hold.
    """
    group = Group(controller, controller.parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}")
    try:
        group.path.mkdir()
    except OSError as error:
        raise LimitError(f"no group can be made in {controller.parent} ({error.strerror})") from error
    try:
        _set_limit(group, limit_bytes)
        yield group
    finally:
        group.kill()
        _remove(group.path)


def _set_limit(group: Group, limit_bytes: int) -> None:
    version, file = group.controller.version, group.path / group.controller.limit_file
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    if not file.exists():
        raise LimitError(f"groups in {group.path.parent} have no {file.name}")
    try:
        file.write_text(str(limit_bytes))
        if version == 1 and (group.path / "memory.memsw.limit_in_bytes").exists():
            # A page more than the memory, so that it is the memory's limit that is hit, and counted.
            (group.path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes + page_bytes))
        elif version == 1:
            (group.path / "memory.swappiness").write_text("0")
        elif (group.path / "memory.swap.max").exists():
            (group.path / "memory.swap.max").write_text("0")
    except OSError as error:
        raise LimitError(f"{file} cannot be set to {limit_bytes} ({error.strerror})") from error
    if not limit_bytes - page_bytes < group.limit_bytes <= limit_bytes:
        raise LimitError(f"{file} was set to {limit_bytes} and holds {_text(file).strip()!r}")
    for outer in group.path.parents:
        around = _number(outer / file.name)
        if around is not None and around < group.limit_bytes:
            raise LimitError(f"a limit of {limit_bytes} bytes does not hold in {outer}, which allows {around}")


def memory_limit_bytes(proc: Path = PROC) -> int | None:
    """Return the lowest memory limit of the groups that this process is in; None where none limits it.

    cgroup v1 writes "no limit" as a number near 2**63: compare with the machine's memory before calling it one.
    """
    groups = ((Controller(version, group), group) for version, group in _own_groups(proc))
    limits = (_number(group / controller.limit_file) for controller, group in groups)
    return min((limit for limit in limits if limit is not None), default=None)


def _candidates(proc: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, group) to make groups below."""
    for version, parent in _own_groups(proc):
        if version == 1 or _hands_memory_on(parent):
            yield version, parent


def _own_groups(proc: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, group): this process's own, then its ancestors up to the mount."""
    own = {}
    for line in _text(proc / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        own[1 if "memory" in names.split(",") else 2 if not names else 0] = path
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        version, mount = 1 if kind == "cgroup" else 2, Path(place.encode().decode("unicode_escape"))
        # In a container the mount shows a part of the hierarchy, and paths may be told from the whole one's root.
        path = own.get(version, "/")
        inside = path[len(root) :] if root != "/" and (path + "/").startswith(root + "/") else path
        group = mount / inside.strip("/")
        group = group if group.is_dir() and ".." not in group.parts else mount
        for parent in (group, *group.parents):
            if not parent.is_relative_to(mount):
                break
            yield version, parent


def _hands_memory_on(parent: Path) -> bool:
    """Whether a v2 group's children have the memory controller; it is switched on where the kernel allows that."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in _text(control).split() and "memory" in _text(parent / "cgroup.controllers").split():
        with contextlib.suppress(OSError):
            control.write_text("+memory")
    return "memory" in _text(control).split()


def _remove(path: Path, patience_s: float = 5.0) -> None:
    """Remove a group; killed processes leave it a moment later. What remains, a later run takes for stale."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return path.rmdir()
        except OSError:
            if not path.exists() or time.monotonic() > until:
                return
            time.sleep(0.01)


def _remove_stale(parent: Path) -> None:
    """Remove empty groups of processes that were killed before they could."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            maker = path.name.removeprefix(PREFIX).split("-")[0]
            old = time.time() - path.stat().st_mtime > STALE_AFTER_S
            if old and not (Path("/proc") / maker).exists():
                path.rmdir()  # the kernel refuses it while a process is in it


def _counter(file: Path, name: str) -> int:
    rows = dict(line.split(maxsplit=1) for line in _text(file).splitlines() if " " in line)
    return int(rows.get(name, 0))


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
