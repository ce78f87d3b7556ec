"""`emoe doctor`: every advice is given when its fact calls for it and only then; the real machine gives every row."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench import cli
from workbench.machine import disk as disk_speed
from workbench.machine import facts as machine
from workbench.machine.control_groups import memory_limit_bytes
from workbench.machine.disk import PIECE_BYTES, DiskSpeed, measure_disk
from workbench.machine.doctor import OK, WARN, examine
from workbench.machine.facts import MachineFacts, physical_cores, read_constraints, read_machine

FINE = MachineFacts(
    cpu="A processor",
    cpu_flags=("avx2", "avx512f", "avx512_bf16"),
    torch_capability="AVX512",
    cores=8,
    physical_cores=4,
    threads=4,
    gpus=(),
    driver_gpus=(),
    cache_dir="/cache",
    disk=DiskSpeed(True, 256 << 20, 1.5e9),
    others_cpu_share=0.03,
    control_group="cgroup v2, memory.max",
    control_group_reason="",
    ram_bytes=32 * 10**9,
    available_bytes=30 * 10**9,
    memory_limit_bytes=None,
    free_disk_bytes=100 * 10**9,
    packages={"torch": "2.13.0"},
    pinned={"torch": "2.13.0", "not-installed": "1.0"},
)
BUFFERED = DiskSpeed(False, 256 << 20, 9e9, "the file system refuses O_DIRECT: Invalid argument")


def test_nothing_is_advised_where_all_is_well() -> None:
    findings = examine(FINE)
    assert [finding.name for finding in findings if finding.status != OK or finding.advice] == []
    assert len({finding.name for finding in findings}) == len(findings) == 12


def test_one_thread_is_no_threads() -> None:
    (threads,) = [row for row in examine(replace(FINE, cores=1, physical_cores=1, threads=1)) if row.name == "threads"]
    assert threads.value == "1 thread, 1 physical core"


@pytest.mark.parametrize(
    ("row", "changes", "advice"),
    [
        ("processor", {"cpu_flags": ("avx512_bf16",), "torch_capability": "DEFAULT"}, "Without AVX2"),
        ("processor", {"torch_capability": "AVX2"}, "leaves AVX512 unused"),
        ("processor", {"torch_capability": "DEFAULT"}, "unset ATEN_CPU_CAPABILITY"),
        ("bfloat16", {"cpu_flags": ("avx2", "avx512f")}, "--dtype float32"),
        ("threads", {"threads": 8}, "set OMP_NUM_THREADS=4"),
        ("threads", {"threads": 1}, "Cores stay idle"),
        ("other work", {"others_cpu_share": 0.5}, "End other programs"),
        ("GPU", {"driver_gpus": ("A card",)}, "install a CUDA build"),
        ("disk", {"disk": DiskSpeed(True, 256 << 20, 1e8)}, "on a faster one"),
        ("control groups", {"control_group": "", "control_group_reason": "read-only"}, "run as root"),
        ("memory", {"available_bytes": 10**9}, "End other programs"),
        ("memory limit", {"memory_limit_bytes": 10**9}, "raise it to 4 GB"),
        ("free disk", {"free_disk_bytes": 10**9}, "emoe cache clear"),
        ("versions", {"packages": {"torch": "2.12.0"}}, r"pip install -c constraints\.txt"),
    ],
)
def test_an_advice_is_given_for_its_fact_alone(row: str, changes: dict[str, Any], advice: str) -> None:
    warned = {finding.name: finding for finding in examine(replace(FINE, **changes)) if finding.status == WARN}
    assert list(warned) == [row]
    assert re.search(advice, warned[row].advice)


@pytest.mark.parametrize(
    ("disk", "advice"),
    [
        (BUFFERED, ("the memory's speed and not the disk's", "page cache, which nobody budgeted")),
        (DiskSpeed(False, 0, None, "no file can be made there: Read-only file system"), ("may write to", "page cache")),
    ],
)
def test_without_direct_reads_both_rows_of_the_disk_say_so(disk: DiskSpeed, advice: tuple[str, str]) -> None:
    warned = [finding for finding in examine(replace(FINE, disk=disk)) if finding.status == WARN]
    assert [finding.name for finding in warned] == ["disk", "direct reads"]
    for finding, expected in zip(warned, advice, strict=True):
        assert expected in finding.advice


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu_flags": ("asimd", "bf16"), "torch_capability": "DEFAULT"},
        {"cpu_flags": ("avx2",), "torch_capability": "AVX2", "gpus": ("A card",)},
        {"memory_limit_bytes": 16 * 10**9},
        {"pinned": {}, "packages": {}},
        {"gpus": ("A card",), "driver_gpus": ("A card",)},
    ],
)
def test_an_uncommon_machine_without_a_fault_gets_no_advice(changes: dict[str, Any]) -> None:
    assert all(finding.status == OK for finding in examine(replace(FINE, **changes)))


def test_many_other_versions_are_counted(tmp_path: Path) -> None:
    names = [f"package-{number}" for number in range(7)]
    facts = replace(FINE, pinned=dict.fromkeys(names, "1"), packages=dict.fromkeys(names, "2"))
    assert next(row for row in examine(facts) if row.name == "versions").value.endswith("and 3 more")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Measure a few MiB in a cache of the test's own."""
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        machine, "measure_disk", lambda folder, progress: measure_disk(folder, 4 * PIECE_BYTES, progress=progress)
    )
    return tmp_path / "cache"


def test_this_machine_is_read_and_left_as_it_was(quick_disk: Path) -> None:
    seen: list[tuple[int, int]] = []
    facts = read_machine(lambda done, total: seen.append((done, total)))
    assert 1 <= facts.physical_cores <= facts.cores
    assert facts.disk.read_bytes == 4 * PIECE_BYTES and facts.disk.bytes_per_s
    assert facts.packages["torch"] == facts.pinned["torch"]
    assert bool(facts.control_group) != bool(facts.control_group_reason)
    assert seen[-1] == (8 * PIECE_BYTES, 8 * PIECE_BYTES) and seen == sorted(seen)
    assert list(quick_disk.iterdir()) == []
    for finding in examine(facts):
        assert finding.value and (finding.status == OK) == (finding.advice == "")


def test_the_command_prints_a_table_and_json(
    quick_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def emoe(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["emoe", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    said = json.loads(emoe("--json"))
    assert said.keys() == {"findings", "facts"} and said["facts"]["disk"]["read_bytes"] == 4 * PIECE_BYTES
    assert all(set(row) == {"name", "value", "status", "advice"} for row in said["findings"])
    table = emoe()
    assert all(row["name"] in table for row in said["findings"])


def test_time_bounds_the_measurement(tmp_path: Path) -> None:
    ticks = iter(range(1000))
    # Every look at the clock is a second later: three pieces are written in 2.5 seconds, and at most as many read.
    found = measure_disk(tmp_path, 100 * PIECE_BYTES, max_seconds=2.5, clock=lambda: float(next(ticks)))
    assert PIECE_BYTES <= found.read_bytes <= 3 * PIECE_BYTES


def test_a_file_system_that_refuses_direct_reads_is_read_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: Any, **more: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(disk_speed.os, "open", refuse)
    found = measure_disk(tmp_path, 2 * PIECE_BYTES)
    assert not found.direct and found.read_bytes == 2 * PIECE_BYTES and "refuses O_DIRECT" in (found.reason or "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_room_or_existence_is_a_reason_and_no_error(tmp_path: Path) -> None:
    assert "No such file" in (measure_disk(tmp_path / "none").reason or "")
    assert measure_disk(tmp_path, PIECE_BYTES - 1) == DiskSpeed(False, 0, None, "too little free space to measure")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores of a process are a matter of Linux")
def test_hyperthreads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 9})
    for core, siblings in ((0, "0,2"), (1, "1,3"), (2, "0,2")):
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores(tmp_path) == 3


def test_constraints_are_read_without_comments_and_markers(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# all\ntorch==2.13.0\nuvloop==1.0 ; sys_platform != 'win32'\n\nloose>=1\n")
    assert read_constraints(file) == {"torch": "2.13.0", "uvloop": "1.0"}
    assert read_constraints(tmp_path / "none") == {}


def test_the_lowest_limit_around_a_process_is_found(tmp_path: Path) -> None:
    mount, proc = tmp_path / "cgroup", tmp_path / "proc"
    (mount / "a" / "b").mkdir(parents=True)
    proc.mkdir()
    (proc / "cgroup").write_text("0::/a/b\n")
    (proc / "mountinfo").write_text(f"1 0 0:1 / {mount} rw - cgroup2 cgroup2 rw\n")
    assert memory_limit_bytes(proc) is None
    (mount / "a" / "b" / "memory.max").write_text("max\n")
    (mount / "a" / "memory.max").write_text("1000000\n")
    assert memory_limit_bytes(proc) == 1000000
