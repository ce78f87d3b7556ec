"""How fast a folder's disk answers reads past the page cache: what a missed expert costs, before any model is at hand.

A file of random bytes is written, synced and read back in pieces of 1 MiB, one at a time, as an expert is. The file
has no name while it is used, so nothing stays behind even when the process is killed. Both halves end early when their
time is over; the measurement then rests on fewer bytes and says how many.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from emoe_core.loader.direct_io import open_direct

PIECE_BYTES = 1 << 20
MAX_BYTES = 256 << 20
MAX_SECONDS = 4.0
# More than this share of what is free is never written.
FREE_SHARE = 0.05


@dataclass(frozen=True)
class DiskSpeed:
    """What was measured in one folder.

    Attributes
    ----------
    direct : bool
        Whether reads went past the page cache (O_DIRECT).
    read_bytes : int
        Bytes behind the figure; 0 when nothing could be measured.
    bytes_per_s : float or None
        Sequential, one read at a time. Without direct reads this is the page cache's speed, not the disk's.
    reason : str or None
        Why reads were not direct, or nothing could be measured.
    """

    direct: bool
    read_bytes: int
    bytes_per_s: float | None
    reason: str | None = None


def measure_disk(
    folder: Path,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = MAX_SECONDS,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> DiskSpeed:
    """Measure how fast a folder is read.

    Parameters
    ----------
    folder : Path
        An existing folder; a nameless file is made in it.
    max_bytes, max_seconds : int, float
        Bounds of what is written, and of writing and reading each.
    progress : callable, optional
        Called with (bytes done, bytes in all), writing and reading together.
    clock : callable
        Seconds, ever rising.
    """
    report = progress or (lambda done, total: None)
    try:
        free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        pieces = min(max_bytes, int(free_bytes * FREE_SHARE)) // PIECE_BYTES
        if pieces < 1:
            return DiskSpeed(False, 0, None, "too little free space to measure")
        descriptor, name = tempfile.mkstemp(prefix=".emoe-disk-", dir=folder)
    except OSError as error:
        return DiskSpeed(False, 0, None, f"no file can be made there: {error.strerror}")
    reader: FileIO | None = None
    try:
        try:
            reader, reason = open_direct(name)
        finally:
            Path(name).unlink()
        written = _write(descriptor, pieces, max_seconds, clock, report)
        direct, done, spent_s = reader is not None, 0, 0.0
        if reader is not None:
            try:
                done, spent_s = _read(reader.fileno(), written, max_seconds, clock, report)
            except OSError as error:  # some file systems accept the flag and refuse the read
                direct, reason = False, f"the file system refuses direct reads: {error.strerror}"
        if not direct:
            done, spent_s = _read(descriptor, written, max_seconds, clock, report)
        return DiskSpeed(direct, done, done / spent_s if spent_s > 0 else None, reason)
    except OSError as error:
        return DiskSpeed(False, 0, None, f"the measurement failed: {error.strerror}")
    finally:
        os.close(descriptor)
        if reader is not None:
            reader.close()


def _write(
    descriptor: int, pieces: int, max_seconds: float, clock: Callable[[], float], report: Callable[[int, int], None]
) -> int:
    # Random, so that no file system compresses it; one piece repeated is enough for that.
    piece = os.urandom(PIECE_BYTES)
    started, done = clock(), 0
    while done < pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]
        done += 1
        report(done * PIECE_BYTES, 2 * pieces * PIECE_BYTES)
        if clock() - started > max_seconds:
            break
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return done


def _read(
    descriptor: int, pieces: int, max_seconds: float, clock: Callable[[], float], report: Callable[[int, int], None]
) -> tuple[int, float]:
    """Return bytes read and seconds spent."""
    buffer = mmap.mmap(-1, PIECE_BYTES)  # page-aligned, as direct reads need
    started, done = clock(), 0
    while done < pieces * PIECE_BYTES:
        got = os.preadv(descriptor, [buffer], done)
        done += got
        report(pieces * PIECE_BYTES + done, 2 * pieces * PIECE_BYTES)
        if got < PIECE_BYTES or clock() - started > max_seconds:
            break
    return done, clock() - started
