"""A busy machine is noticed, and a quiet one is not accused."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

from workbench.busy import BUSY_SHARE, OtherWork, busy_warning


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_work_of_others_is_counted_and_ones_own_is_not() -> None:
    others = OtherWork()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        spin(1.0)
    finally:
        child.kill()
        child.wait()
    assert others.share() < 0.9, "this process's own loop is not others' work"
    # The child takes up to one core of all, and at least a good part of it whatever else runs.
    assert others.share() > 0.2 / psutil.cpu_count()


def test_only_a_busy_machine_is_warned_about() -> None:
    assert busy_warning(None) is None
    assert busy_warning(float("nan")) is None
    assert busy_warning(BUSY_SHARE / 2) is None
    assert "40% of the machine" in str(busy_warning(0.4))
