"""A busy machine is noticed, and a quiet one is not accused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from workbench.machine.busy import BUSY_SHARE, OtherWork, busy_warning

# Cores are accounted in ticks of a hundredth of a second.
ROUNDING = 0.05


@pytest.fixture
def one_core() -> Iterator[None]:
    """Let this thread, and what it starts, run on one core: a good part of its time is theirs, whatever else runs."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind threads to cores")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.usefixtures("one_core")
def test_work_of_others_is_counted_and_ones_own_is_not() -> None:
    others, started, own_s, child_s = OtherWork(), time.monotonic(), time.process_time(), children_s()
    child = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        while time.process_time() < own_s + 0.5:
            pass
    finally:
        child.kill()
        child.wait()
    share, elapsed_s = others.share(), time.monotonic() - started
    # Bounds that hold whatever else runs on this core.
    assert share > (children_s() - child_s) / elapsed_s - ROUNDING
    assert share < 1 - (time.process_time() - own_s) / elapsed_s + ROUNDING


def test_only_a_busy_machine_is_warned_about() -> None:
    assert busy_warning(None) is None
    assert busy_warning(float("nan")) is None
    assert busy_warning(BUSY_SHARE / 2) is None
    assert "40% of the machine" in str(busy_warning(0.4))
