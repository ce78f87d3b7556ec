"""Whether a machine was busy with something else while times were taken, and what to tell people then."""

from __future__ import annotations

import os
import time

import psutil

# A quiet machine shows a few percent; a second busy process on two cores half.
BUSY_SHARE = 0.15


class OtherWork:
    """How much of the processor time of the cores that this process may use went to others since this was made.

    Where it is much, times of this process say little: threads that wait for each other wait for a core as well.
    """

    def __init__(self) -> None:
        self._started = self._now()

    def share(self) -> float:
        """Return the share, 0 to 1, of these cores' time."""
        used, busy, whole = (now - before for now, before in zip(self._now(), self._started, strict=True))
        return max(0.0, min(1.0, (busy - used) / max(whole, 1e-9)))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return this process's seconds, and the busy and all seconds of the cores that it may run on."""
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        busy = whole = 0.0
        for number, core in enumerate(psutil.cpu_times(percpu=True)):
            if mine is not None and number not in mine:
                continue
            idle = core.idle + getattr(core, "iowait", 0.0)
            # Guests are counted in user time already.
            used = sum(getattr(core, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
            busy, whole = busy + used, whole + used + idle
        return time.process_time(), busy, whole


def busy_warning(others_cpu_share: float | None) -> str | None:
    """Return what to tell people about times that were taken on a busy machine; None where they can be trusted."""
    if others_cpu_share is None or not others_cpu_share > BUSY_SHARE:
        return None
    return f"other processes took {others_cpu_share:.0%} of the machine: times are unreliable, run it again alone"
