"""Figures of a measured process are those of the device that it was told to use, and of no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emoe_core.errors import OptionError
from workbench.measure import serving_job
from workbench.measure.peak_memory import device_peak_bytes, reset_device_peak
from workbench.measure.serving_job import STOCK, serve
from workbench.models.reference.tiny import tiny_moe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("model"), "olmoe")


def spec(checkpoint: Path, device: str) -> dict[str, Any]:
    options = {"implementation": STOCK, "device": device}
    asked = {"prompts": ["warm", "one"], "tasks": ["qa", "qa"], "max_new_tokens": 2, "warm_trace": None}
    return {"checkpoint": str(checkpoint), "options": options, **asked}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Have CUDA's allocator note which device it is asked about."""
    found: list[tuple[str, Any]] = []
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: found.append((name, device)) or 7)
    return found


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has that device")
def test_stock_does_not_run_on_the_cpu_where_a_gpu_was_asked_for(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="cuda:1"):
        serve(spec(checkpoint, "cuda:1"))


def test_the_peak_is_that_of_the_device_asked_about(asked: list[tuple[str, Any]]) -> None:
    device = torch.device("cuda:1")
    reset_device_peak(device)
    assert device_peak_bytes(device) == 7
    assert asked == [("reset_peak_memory_stats", device), ("max_memory_allocated", device)]


def test_a_run_on_the_cpu_has_no_device_peak_though_there_is_a_gpu(
    checkpoint: Path, asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serving_job, "reset_peak", lambda: True)
    assert serve(spec(checkpoint, "cpu"))["device_peak_bytes"] == 0 and asked == []
