"""The peak of this process's resident memory, by stages: until a model is loaded, and from then on.

A peak is the operating system's high-water mark (VmHWM) of a process that does nothing else. `ru_maxrss` is not used:
it survives ``exec``, so a child would start with its parent's. What a *group* of processes needed, page cache included,
is another figure (`machine.control_groups.Group.peak_bytes`). What a GPU's allocator gave out at most is a third.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING

from emoe_core.device.cpu_memory import return_free_memory
from emoe_core.errors import ExperimentError
from workbench.machine.process_counters import status_bytes

if TYPE_CHECKING:
    import torch

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)$")


def process_peak_bytes() -> int:
    """Return the most memory that was resident in this process, since it began or since `reset_peak`.

    Raises
    ------
    ExperimentError
        On an operating system that does not report it.
    """
    peak_bytes = status_bytes("VmHWM")
    if peak_bytes is None:
        raise ExperimentError("this operating system does not report peak memory (no VmHWM in /proc/self/status)")
    return peak_bytes


def reset_peak() -> bool:
    """Start this process's peak anew from what is resident now; False where the kernel does not allow it.

    What loading freed goes back to the system first, so that the C library's heap does not count as the model's.
    """
    gc.collect()
    return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def device_peak_bytes(device: torch.device) -> int:
    """Return the most memory that torch's allocator held on a device, since the process began or `reset_device_peak`.

    0 on the CPU.
    """
    import torch

    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def reset_device_peak(device: torch.device) -> None:
    """Start a device's peak anew from what is held now; nothing on the CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def mapped_checkpoint_bytes(folder: Path, model: torch.nn.Module) -> int:
    """Return the resident bytes of a checkpoint's files that this process still maps but that no weight needs.

    Weights that were copied while loading leave their file's pages mapped as long as one weight of the same file is
    a view of it. They count in the peak, but the system drops them when memory is short.
    """
    found, place = 0, None
    addresses: list[tuple[int, int]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = _MAPPING.match(line)
        if mapping:
            place = mapping if Path(mapping[3]).resolve().is_relative_to(folder.resolve()) else None
            if place is not None:
                addresses.append((int(place[1], 16), int(place[2], 16)))
        elif re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            place = None
        elif place is not None and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    views = {weight.data_ptr(): weight.nbytes for weight in model.state_dict(keep_vars=True).values()}
    needed = sum(size for at, size in views.items() if any(low <= at < high for low, high in addresses))
    return max(0, found - needed)
