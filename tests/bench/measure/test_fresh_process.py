"""Fresh processes: one over its limit is ended and told apart, groups do not stay, no limit is feigned."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emoe_core.errors import LimitError
from workbench.machine.control_groups import PREFIX, Controller, Group, find_controller, limited_group
from workbench.measure.fresh_process import run_process

MIB = 2**20
LIMIT_BYTES = 96 * MIB
ALLOCATE = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096]); print('done')"


def groups(controller: Controller) -> list[Path]:
    return list(controller.parent.glob(f"{PREFIX}{os.getpid()}-*"))


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def test_a_process_over_its_limit_is_reported_as_killed_by_it(controller: Controller) -> None:
    found = run_process(python(ALLOCATE, 4 * LIMIT_BYTES), limit_bytes=LIMIT_BYTES, controller=controller)
    assert found.killed_by_limit and found.returncode == -9 and not found.timed_out
    assert found.output == "" and found.limit_hits > 0
    assert found.group_peak_bytes is None or 0.9 * LIMIT_BYTES < found.group_peak_bytes <= LIMIT_BYTES
    assert groups(controller) == []


def test_a_process_that_fits_runs_as_usual(controller: Controller) -> None:
    found = run_process(python(ALLOCATE, 32 * MIB), limit_bytes=LIMIT_BYTES, controller=controller)
    assert (found.returncode, found.output, found.killed_by_limit) == (0, "done\n", False), found.errors
    assert found.limit_bytes == LIMIT_BYTES
    assert found.group_peak_bytes is None or 32 * MIB < found.group_peak_bytes < LIMIT_BYTES
    assert groups(controller) == []


def test_the_command_is_a_member_from_its_start(controller: Controller) -> None:
    found = run_process(["cat", "/proc/self/cgroup"], limit_bytes=LIMIT_BYTES, controller=controller)
    assert PREFIX in found.output


def test_other_deaths_are_not_put_down_to_the_limit(controller: Controller) -> None:
    killed = run_process(python("import os; os.kill(os.getpid(), 9)"), limit_bytes=LIMIT_BYTES, controller=controller)
    assert killed.returncode == -9 and not killed.killed_by_limit
    failed = run_process(python("raise SystemExit('a reason')"), limit_bytes=LIMIT_BYTES, controller=controller)
    assert failed.returncode == 1 and failed.errors == "a reason\n" and not failed.killed_by_limit


def test_a_process_that_takes_too_long_is_ended_with_its_children(controller: Controller) -> None:
    # A shell and its child: started long before the time is up, also where others keep the cores busy.
    waiting = ["sh", "-c", "echo on; sleep 600 & wait"]
    found = run_process(waiting, limit_bytes=LIMIT_BYTES, controller=controller, timeout_s=3.0)
    assert found.timed_out and not found.killed_by_limit and found.output == "on\n"
    assert groups(controller) == []


def test_the_group_is_removed_after_an_error(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Group, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_process(["true"], limit_bytes=LIMIT_BYTES, controller=controller)
    assert groups(controller) == []


def test_a_process_that_cannot_be_put_under_the_limit_never_runs(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "members", [])
    with pytest.raises(LimitError, match="did not arrive"):
        run_process(["touch", str(tmp_path / "ran")], limit_bytes=LIMIT_BYTES, controller=controller)
    assert not (tmp_path / "ran").exists()


def test_without_a_limit_a_command_runs_in_no_group_of_its_own_and_says_so() -> None:
    found = run_process(["cat", "/proc/self/cgroup"])
    assert found.returncode == 0 and PREFIX not in found.output
    assert (found.limit_bytes, found.group_peak_bytes, found.killed_by_limit) == (None, None, False)


def test_lines_are_told_while_the_command_runs(tmp_path: Path) -> None:
    gate, told = tmp_path / "gate", []
    os.mkfifo(gate)

    def on_line(line: str) -> None:
        told.append(line)
        if line == "first\n":
            gate.write_text("")  # opens the gate: the command goes on

    command = python("import sys; print('first', flush=True); open(sys.argv[1]).read(); print('last')", gate)
    found = run_process(command, on_line=on_line, timeout_s=120.0)
    assert found.output == "first\nlast\n" and told == ["first\n", "last\n"]


def test_much_that_is_said_on_both_streams_stops_nobody() -> None:
    loud = "import sys; [print('x' * 9999, file=stream) for stream in (sys.stderr, sys.stdout) for _ in range(50)]"
    found = run_process(python(loud))
    assert found.returncode == 0 and len(found.output) == len(found.errors) == 50 * 10_000


def test_without_a_limit_too_a_slow_command_is_ended_with_its_children() -> None:
    found = run_process(["sh", "-c", "echo on; sleep 600 & wait"], timeout_s=3.0)
    assert found.timed_out and found.returncode == -9 and found.output == "on\n"


def fake_proc(folder: Path, mount: str) -> Path:
    (folder / "cgroup").write_text("4:memory:/own\n0::/own\n")
    (folder / "mountinfo").write_text(f"{mount}\n" if mount else "")
    return folder


def test_no_controller_is_an_error_that_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match=r"no cgroup file system .* Run as root"):
        find_controller(fake_proc(tmp_path, ""))


@pytest.mark.parametrize("kind", ["cgroup", "cgroup2"])
def test_a_folder_that_is_no_control_group_is_never_taken_for_one(tmp_path: Path, kind: str) -> None:
    mount = tmp_path / "mount"
    (mount / "own").mkdir(parents=True)
    for folder in (mount, mount / "own"):
        (folder / "cgroup.subtree_control").write_text("memory\n")
    proc = fake_proc(tmp_path, f"35 31 0:32 / {mount} rw,relatime - {kind} {kind} rw,memory")
    with pytest.raises(LimitError, match=r"have no memory\.(limit_in_bytes|max)"):
        find_controller(proc)
    assert list(mount.rglob(f"{PREFIX}*")) == []


def test_version_2_is_used_below_the_nearest_group_that_hands_memory_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    (mount / "own").mkdir(parents=True)
    (mount / "own" / "cgroup.subtree_control").write_text("")
    (mount / "cgroup.subtree_control").write_text("cpu memory\n")
    made = []

    def stand_in(group: Group, limit_bytes: int) -> None:
        made.append((group.controller.version, group.path.parent))

    monkeypatch.setattr("workbench.machine.control_groups._set_limit", stand_in)
    found = find_controller(fake_proc(tmp_path, f"41 31 0:38 / {mount} rw,relatime - cgroup2 cgroup2 rw"))
    assert found == Controller(2, mount) and made == [(2, mount)]


def test_a_limit_above_that_of_the_group_around_it_is_refused(controller: Controller) -> None:
    with limited_group(controller, LIMIT_BYTES) as outer:
        inside = Controller(controller.version, outer.path)
        if controller.version == 2:
            (outer.path / "cgroup.subtree_control").write_text("+memory")
        with pytest.raises(LimitError, match="does not hold"), limited_group(inside, 2 * LIMIT_BYTES):
            pass


def test_the_command_does_not_outlive_a_killed_parent(controller: Controller, tmp_path: Path) -> None:
    written = tmp_path / "pid"
    inner = f"import os, time; open({str(written)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(60)"
    start = f"run_process([sys.executable, '-c', {inner!r}], limit_bytes={LIMIT_BYTES})"
    outer = f"import sys; from workbench.measure.fresh_process import run_process; {start}"
    parent = subprocess.Popen([sys.executable, "-c", outer])
    until(lambda: written.exists() and written.read_text().endswith(" "))
    parent.kill()
    parent.wait()
    until(lambda: gone(int(written.read_text())))
    for left in controller.parent.glob(f"{PREFIX}{parent.pid}-*"):
        until(lambda left=left: not (left / "cgroup.procs").read_text())
        left.rmdir()


def until(holds: Callable[[], bool], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
