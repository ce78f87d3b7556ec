"""What the operating system counts for this process: peak memory and bytes read. Imports nothing heavy.

A process that measures a small program must not itself be large, so this module is free of torch and of `emoe_core`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def status_bytes(name: str) -> int | None:
    """Return an entry of ``/proc/self/status`` in bytes (``VmHWM``, ``RssAnon``, ``RssFile``), None where missing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def read_bytes() -> int:
    """Return the bytes that this process made the disk read, direct reads and page faults alike; 0 where unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0
