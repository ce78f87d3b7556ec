"""What stands between this machine and good measurements, and what to do about it, in one sentence a row.

`examine` judges facts (`facts.py`) and measures nothing, so that each advice can be tested with facts made up for it.
A warning never says that something cannot run, only that it will be slow, or that a claim cannot be checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.machine.busy import BUSY_SHARE
from workbench.machine.facts import MachineFacts
from workbench.metrics.show import show_bytes, show_count

OK, WARN = "ok", "warn"
# A disk miss costs about 13 hits at 1 GB/s; below half of that, a token waits for little else.
SLOW_DISK_BYTES_PER_S = 500e6
# The embedded model fully resident beside its stock reference, with the libraries.
LOW_MEMORY_BYTES = 4e9
# What the cache comes to after `make run`.
CACHE_BYTES = 6e9
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
# What torch's kernels may be built for, the widest last, with the processor flag that each needs.
WIDTHS = (("AVX2", "avx2"), ("AVX512", "avx512f"))
MAX_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, whether that is fine, and what to do when it is not."""

    name: str
    value: str
    status: str
    advice: str = ""


def examine(facts: MachineFacts) -> list[Finding]:
    """Return a row for everything that was looked at, in the order of the table."""
    return [_finding(name, judge(facts)) for name, judge in _JUDGES.items()]


def _finding(name: str, judged: tuple[str, str]) -> Finding:
    value, advice = judged
    return Finding(name, value, WARN if advice else OK, advice)


def _instructions(facts: MachineFacts) -> tuple[str, str]:
    value = f"{facts.cpu}: {', '.join(facts.cpu_flags) or 'no notable sets'}; torch uses {facts.torch_capability}"
    if "asimd" in facts.cpu_flags:
        return value, ""
    has = [kind for kind, flag in WIDTHS if flag in facts.cpu_flags]
    if not has:
        return value, "Without AVX2, matrix products are several times slower; use another machine for timings."
    kinds = [kind for kind, _ in WIDTHS]
    used = kinds.index(facts.torch_capability) if facts.torch_capability in kinds else -1
    if used < kinds.index(has[-1]):
        return value, f"torch leaves {has[-1]} unused: unset ATEN_CPU_CAPABILITY, or install another build of torch."
    return value, ""


def _bfloat16(facts: MachineFacts) -> tuple[str, str]:
    has = [flag for flag in BFLOAT16_FLAGS if flag in facts.cpu_flags]
    if has or facts.gpus:
        return ", ".join(has) or "on the GPU", ""
    return "none", (
        "The processor converts bfloat16 to compute with it: compare with --dtype float32 (twice the memory)."
    )


def _threads(facts: MachineFacts) -> tuple[str, str]:
    spare = facts.cores - facts.physical_cores
    beside = f" ({facts.cores} with hyperthreads)" if spare else ""
    value = f"{show_count(facts.threads, 'thread')}, {show_count(facts.physical_cores, 'physical core')}{beside}"
    if facts.threads > facts.physical_cores:
        return value, f"More threads than cores wait for each other: set OMP_NUM_THREADS={facts.physical_cores}."
    if facts.threads < facts.physical_cores:
        return value, f"Cores stay idle: unset OMP_NUM_THREADS, or set it to {facts.physical_cores}."
    return value, ""


def _other_work(facts: MachineFacts) -> tuple[str, str]:
    value = f"{facts.others_cpu_share:.0%} of the processor"
    return value, "End other programs before you measure times." if facts.others_cpu_share > BUSY_SHARE else ""


def _gpu(facts: MachineFacts) -> tuple[str, str]:
    if facts.gpus:
        return ", ".join(facts.gpus), ""
    if facts.driver_gpus:
        return f"{', '.join(facts.driver_gpus)}, not usable", (
            "The driver lists a GPU that torch cannot use: install a CUDA build of torch that fits the driver."
        )
    return "none, models run on the processor", ""


def _disk(facts: MachineFacts) -> tuple[str, str]:
    disk = facts.disk
    if disk.bytes_per_s is None:
        return f"not measured in {facts.cache_dir}: {disk.reason}", (
            "Set EMOE_CACHE to a folder with free space that this user may write to."
        )
    value = f"{show_bytes(disk.bytes_per_s)}/s over {show_bytes(disk.read_bytes)} in {facts.cache_dir}"
    if not disk.direct:
        return f"{value}, through the page cache", (
            "This is the memory's speed and not the disk's: set EMOE_CACHE to a file system that allows direct reads."
        )
    if disk.bytes_per_s < SLOW_DISK_BYTES_PER_S:
        return value, "Every missed expert waits for this disk: set EMOE_CACHE to a folder on a faster one."
    return value, ""


def _direct(facts: MachineFacts) -> tuple[str, str]:
    if facts.disk.direct:
        return "works", ""
    return f"does not work: {facts.disk.reason}", (
        "Experts are then read through the page cache, which nobody budgeted: set EMOE_CACHE to a local ext4 or xfs."
    )


def _control_groups(facts: MachineFacts) -> tuple[str, str]:
    if facts.control_group:
        return f"{facts.control_group}, writable", ""
    return f"not usable: {facts.control_group_reason}", (
        "Hard memory limits (notebook 10) cannot be set: run as root, or with the memory controller delegated."
    )


def _memory(facts: MachineFacts) -> tuple[str, str]:
    value = f"{show_bytes(facts.available_bytes)} available of {show_bytes(facts.ram_bytes)}"
    if facts.available_bytes < LOW_MEMORY_BYTES:
        return value, f"End other programs: the embedded model's comparisons want {show_bytes(LOW_MEMORY_BYTES)}."
    return value, ""


def _memory_limit(facts: MachineFacts) -> tuple[str, str]:
    if facts.memory_limit_bytes is None:
        return "none", ""
    value = show_bytes(facts.memory_limit_bytes)
    if facts.memory_limit_bytes < LOW_MEMORY_BYTES:
        return value, (
            f"The kernel ends processes beyond this limit: raise it to {show_bytes(LOW_MEMORY_BYTES)}, or give small "
            f"budgets."
        )
    return value, ""


def _free_disk(facts: MachineFacts) -> tuple[str, str]:
    value = f"{show_bytes(facts.free_disk_bytes)} in {facts.cache_dir}"
    if facts.free_disk_bytes < CACHE_BYTES:
        return value, (
            f"Models and packs take about {show_bytes(CACHE_BYTES)}: free space (emoe cache clear), or set EMOE_CACHE."
        )
    return value, ""


def _versions(facts: MachineFacts) -> tuple[str, str]:
    if not facts.pinned:
        return "constraints.txt is not at hand, nothing to compare with", ""
    both = [name for name in facts.pinned if name in facts.packages]
    other = [
        f"{name} {facts.packages[name]} (pinned {facts.pinned[name]})"
        for name in both
        if facts.packages[name] != facts.pinned[name]
    ]
    if not other:
        return f"{len(both)} packages as pinned", ""
    more = f" and {len(other) - MAX_NAMED} more" if len(other) > MAX_NAMED else ""
    return f"{', '.join(other[:MAX_NAMED])}{more}", (
        "Results are compared with the pinned versions: pip install -c constraints.txt -e '.[dev]'"
    )


_JUDGES: dict[str, Callable[[MachineFacts], tuple[str, str]]] = {
    "processor": _instructions,
    "bfloat16": _bfloat16,
    "threads": _threads,
    "other work": _other_work,
    "GPU": _gpu,
    "disk": _disk,
    "direct reads": _direct,
    "control groups": _control_groups,
    "memory": _memory,
    "memory limit": _memory_limit,
    "free disk": _free_disk,
    "versions": _versions,
}
