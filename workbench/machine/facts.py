"""What this machine offers to inference, as facts: `emoe doctor` judges them (`doctor.py`).

Facts are read from torch, the operating system and a small measurement of the cache's disk. Nothing is advised here,
and nothing is left changed: the file that is measured with is gone afterwards.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from emoe_core.errors import LimitError
from workbench.machine.busy import OtherWork
from workbench.machine.control_groups import find_controller, memory_limit_bytes
from workbench.machine.disk import DiskSpeed, measure_disk
from workbench.machine.environment import (
    PACKAGES,
    PROJECT,
    available_cores,
    compute_threads,
    describe_cpu,
    driver_gpus,
    gpu_names,
    installed_versions,
)

TOPOLOGY = Path("/sys/devices/system/cpu")
CONSTRAINTS = PROJECT / "constraints.txt"


@dataclass(frozen=True)
class MachineFacts:
    """One machine, as this process sees it.

    Attributes
    ----------
    cpu : str
    cpu_flags : tuple of str
        Notable instruction sets that the processor has.
    torch_capability : str
        Instruction set that torch's kernels were chosen for: "AVX512", "AVX2", "DEFAULT" and the like.
    cores, physical_cores, threads : int
        Logical and physical cores that this process may use; threads that torch computes with.
    gpus, driver_gpus : tuple of str
        GPUs that torch can use; GPUs that the driver lists.
    cache_dir : str
    disk : DiskSpeed
    others_cpu_share : float
        Of the processor's time while the disk was measured, what other processes took, 0 to 1.
    control_group : str
        The controller that hard limits can be set with; empty where there is none.
    control_group_reason : str
        Why there is none.
    ram_bytes, available_bytes : int
    memory_limit_bytes : int or None
        The limit of this process's control groups where it is lower than the machine's memory.
    free_disk_bytes : int
        Free space for the cache.
    packages, pinned : dict of str to str
        Installed versions; versions in constraints.txt (empty where the file is not at hand).
    """

    cpu: str
    cpu_flags: tuple[str, ...]
    torch_capability: str
    cores: int
    physical_cores: int
    threads: int
    gpus: tuple[str, ...]
    driver_gpus: tuple[str, ...]
    cache_dir: str
    disk: DiskSpeed
    others_cpu_share: float
    control_group: str
    control_group_reason: str
    ram_bytes: int
    available_bytes: int
    memory_limit_bytes: int | None
    free_disk_bytes: int
    packages: dict[str, str]
    pinned: dict[str, str]


def read_machine(progress: Callable[[int, int], None] | None = None) -> MachineFacts:
    """Read the facts of this machine; takes some seconds, most of them for the disk.

    Parameters
    ----------
    progress : callable, optional
        Called with (bytes done, bytes in all) while the disk is measured.
    """
    import torch

    from emoe_core.loader.cache_folder import cache_dir

    folder, others = cache_dir(), OtherWork()
    name, flags = describe_cpu()
    memory = psutil.virtual_memory()
    limit_bytes = memory_limit_bytes()
    group, reason = _control_group()
    pinned = read_constraints(CONSTRAINTS)
    disk = measure_disk(folder, progress=progress)
    return MachineFacts(
        cpu=name,
        cpu_flags=tuple(flags),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        cores=available_cores(),
        physical_cores=physical_cores(),
        threads=compute_threads(),
        gpus=tuple(gpu_names()),
        driver_gpus=tuple(driver_gpus()),
        cache_dir=str(folder),
        disk=disk,
        others_cpu_share=others.share(),
        control_group=group,
        control_group_reason=reason,
        ram_bytes=memory.total,
        available_bytes=memory.available,
        memory_limit_bytes=limit_bytes if limit_bytes is not None and limit_bytes < memory.total else None,
        free_disk_bytes=shutil.disk_usage(folder).free,
        # Without torch's build label.
        packages={name: found.partition("+")[0] for name, found in installed_versions([*PACKAGES, *pinned]).items()},
        pinned=pinned,
    )


def physical_cores(topology: Path = TOPOLOGY) -> int:
    """Return how many different physical cores this process may run on; hyperthreads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or available_cores()
    siblings = set()
    for core in os.sched_getaffinity(0):
        try:
            siblings.add((topology / f"cpu{core}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(core))
    return len(siblings)


def read_constraints(path: Path) -> dict[str, str]:
    """Return pinned versions by name; empty where there is no such file, as in an installation from a wheel."""
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in path.read_text().splitlines())
    return {name: version for name, pin, version in (line.partition("==") for line in lines) if pin}


def _control_group() -> tuple[str, str]:
    if not sys.platform.startswith("linux"):
        return "", "control groups are a matter of Linux"
    try:
        return find_controller().description, ""
    except LimitError as error:
        return "", str(error)
