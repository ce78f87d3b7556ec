"""Names of devices, and what CUDA is asked for, seen without CUDA."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe_core
from emoe_core.config import EngineConfig, open_device, resolve_device
from emoe_core.device import CudaDevice, Device, aligned_buffer, aligned_starts, short_of_memory
from emoe_core.errors import BudgetError, OptionError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_an_index_from_the_start(name: str, index: int) -> None:
    assert resolve_device(name) == torch.device("cuda", index)
    assert isinstance(open_device(name), CudaDevice)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_beyond_the_last_is_refused() -> None:
    EngineConfig(device="cuda:7")
    with pytest.raises(OptionError, match="the last of 2 here is 'cuda:1'"):
        open_device("cuda:7")


def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(OptionError, match="this machine has no CUDA: use 'cpu'"):
        open_device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:", "cuda:x", "cuda:-1", "cpu:1", ""])
def test_a_name_that_stands_for_no_device_is_refused_on_every_machine(name: str) -> None:
    with pytest.raises(OptionError, match="use 'auto', 'cpu' or 'cuda'"):
        EngineConfig(device=name)


def test_memory_is_pinned_for_all_devices_and_under_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    calls: list[Any] = []

    @contextmanager
    def guard(device: torch.device) -> Any:
        current.append(device)
        yield
        current.pop()

    class Runtime:
        def cudaHostRegister(self, *args: int) -> int:
            calls.append((*current, *args))
            return 0

        def cudaHostUnregister(self, *args: int) -> None:
            calls.append((*current, *args))

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    place, buffer = torch.device("cuda", 1), aligned_buffer(8192)
    CudaDevice(place).pin(buffer)
    CudaDevice(place).unpin(buffer)
    assert calls == [(place, buffer.data_ptr(), 8192, 1), (place, buffer.data_ptr())]


def test_what_is_no_lack_of_memory_passes_through() -> None:
    with pytest.raises(RuntimeError, match="broken"), short_of_memory(Device(), "it", 1):
        raise RuntimeError("broken")
    with pytest.raises(BudgetError, match="it needs 1 bytes on cpu: load with"), short_of_memory(Device(), "it", 1):
        raise OSError(12, "Cannot allocate memory")


def test_parameters_are_laid_out_aligned_without_gaps_beyond_that() -> None:
    assert aligned_starts([]) == [0]
    assert aligned_starts([256, 1, 300, 5]) == [0, 256, 512, 1024, 1029]


def test_no_other_module_asks_torch_for_cuda() -> None:
    root = Path(emoe_core.__file__).parent
    asking = {str(path.relative_to(root)) for path in root.rglob("*.py") if "torch.cuda" in path.read_text()}
    assert asking == {"device/__init__.py", "config.py"}
