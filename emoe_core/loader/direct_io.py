"""Opening a file for reads past the page cache (O_DIRECT), where the file system allows it. Imports nothing heavy."""

from __future__ import annotations

import mmap
import os
from io import FileIO
from pathlib import Path

PAGE_BYTES = 4096


def open_direct(path: str | Path) -> tuple[FileIO | None, str | None]:
    """Open a file for direct reads; return it and None, or None and why that is not possible."""
    if not hasattr(os, "O_DIRECT"):
        return None, "this operating system has no O_DIRECT"
    try:
        file = FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
        # Some file systems accept the flag and refuse the read; an anonymous mapping starts on a page.
        try:
            os.preadv(file.fileno(), [mmap.mmap(-1, PAGE_BYTES)], 0)
        except OSError:
            file.close()
            raise
    except OSError as error:
        return None, f"the file system refuses O_DIRECT: {error.strerror}"
    return file, None
