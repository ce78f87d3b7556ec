"""Opening a file for reads past the page cache (O_DIRECT), where the file system allows it. Imports nothing heavy."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

PAGE_BYTES = 4096


def open_direct(path: str | Path) -> tuple[int, str | None]:
    """Open a file for direct reads; return its descriptor and None, or -1 and why that is not possible."""
    if not hasattr(os, "O_DIRECT"):
        return -1, "this operating system has no O_DIRECT"
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        # Some file systems accept the flag and refuse the read; an anonymous mapping starts on a page.
        os.preadv(descriptor, [mmap.mmap(-1, PAGE_BYTES)], 0)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        return -1, f"the file system refuses O_DIRECT: {error.strerror}"
    return descriptor, None
