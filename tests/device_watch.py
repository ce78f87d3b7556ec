"""What torch's operations do to a simulated device: which of them use slots, and which would wait for a real device.

`SlotUse` tells the device of every operation of the thread whose operands lie in slots. `HiddenWaits` follows which
tensors of one call would lie on the device and counts what would wait for it, other than through the device itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import emoe_core
from emoe_core.device import KINDS
from emoe_core.experts.layer import LayerHandle
from workbench.machine.simulated_device import SimulatedDevice

# Of torch on CUDA: methods that hand out values, and operations whose result's shape or check needs them.
_VALUES = (
    "tolist",
    "item",
    "cpu",
    "numpy",
    "__array__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
)
_COUNTING = ("nonzero", "bincount", "_unique2", "unique_dim", "masked_select", "equal", "_local_scalar_dense")


@contextmanager
def engine_on(device: SimulatedDevice, path: Path, **options: Any) -> Iterator[emoe_core.Engine]:
    """Load on a given simulated device, which hears of all uses of slots meanwhile."""
    before = KINDS["simulated"]
    KINDS["simulated"] = lambda _: device
    try:
        with emoe_core.load(path, device="simulated", **options) as engine, SlotUse(device):
            yield engine
    finally:
        KINDS["simulated"] = before


class SlotUse(TorchDispatchMode):
    """Tells a simulated device of every operation with operands in slots, before it runs."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_view(function):
            for tensor in _tensors(args, kwargs):
                self._device.used(tensor)
        return function(*args, **(kwargs or {}))


class HiddenWaits:
    """Counts, layer call by layer call, waits for the device: those through it, and those that it is not told of.

    Attributes
    ----------
    told : list of int
        Of each call of a MoE layer: waits through the device.
    hidden : list of str
        What else would have waited, or mixed tensors of host and device, by operation.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self.told: list[int] = []
        self.hidden: list[str] = []
        self._device = device

    @contextmanager
    def __call__(self) -> Iterator[HiddenWaits]:
        device, forward = self._device, LayerHandle.forward
        to_host, to_device, copy = device.to_host, device.to_device, device.copy

        def watched(handle: LayerHandle, module: Any, hidden: Any, index: Any, weights: Any) -> Any:
            tags = _Tags(device, self.hidden)
            logits = [] if handle.router_logits is None else [handle.router_logits]
            tags.on_device(hidden, index, weights, *logits)
            before = device.host_waits
            device.to_host = _untracked(tags, to_host, tags.on_host)  # type: ignore[method-assign]
            device.to_device = _untracked(tags, to_device, tags.on_device)  # type: ignore[method-assign]
            device.copy = _untracked(tags, copy, lambda event: None)  # type: ignore[method-assign]
            with tags, _Values(tags):
                result = forward(handle, module, hidden, index, weights)
            self.told.append(device.host_waits - before)
            return result

        LayerHandle.forward = watched  # type: ignore[method-assign]
        try:
            yield self
        finally:
            LayerHandle.forward = forward  # type: ignore[method-assign]
            for name in ("to_host", "to_device", "copy"):
                vars(device).pop(name, None)


class _Off(threading.local):
    """Whether the device itself is at work in a thread: a reading thread's copy hides nothing of the pass beside it."""

    now = False


class _Tags(TorchDispatchMode):
    """Follows where tensors of one call would lie."""

    def __init__(self, device: SimulatedDevice, hidden: list[str]) -> None:
        super().__init__()
        self.off = _Off()
        self.hidden = hidden
        self._device = device
        # Storages are kept: another one would take the number of one that is gone.
        self._there: dict[int, Any] = {}
        self._here: dict[int, Any] = {}

    def on_device(self, *tensors: torch.Tensor) -> None:
        self._there |= {_number(tensor): tensor.untyped_storage() for tensor in tensors}

    def on_host(self, *tensors: torch.Tensor) -> None:
        self._here |= {_number(tensor): tensor.untyped_storage() for tensor in tensors}

    def is_there(self, tensor: torch.Tensor) -> bool:
        return _number(tensor) in self._there or self._device.holds(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.off.now:
            return result
        name = function.overloadpacket.__name__
        tensors = _tensors(args, kwargs)
        there = [tensor for tensor in tensors if self.is_there(tensor)]
        here = [tensor for tensor in tensors if _number(tensor) in self._here and tensor.dim()]
        masks = name in ("index", "index_put_", "index_put") and any(
            t.dtype == torch.bool for t in _tensors(args[1], {})
        )
        if there and (name in _COUNTING or masks):
            self.hidden.append(name)
        if there and here:
            self.hidden.append(f"{name} of host and device")
        outputs = _tensors(result, {})
        (self.on_device if there else self.on_host)(*outputs)
        return result


class _Values(TorchFunctionMode):
    """Notices methods that hand out a device's values."""

    def __init__(self, tags: _Tags) -> None:
        super().__init__()
        self._tags = tags

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _VALUES and not self._tags.off.now and self._tags.is_there(args[0]):
            self._tags.hidden.append(name)
        return function(*args, **(kwargs or {}))


def _untracked(tags: _Tags, act: Callable[..., Any], told: Callable[..., None]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        tags.off.now = True
        try:
            result = act(*args)
        finally:
            tags.off.now = False
        told(*(result if isinstance(result, tuple) else (result,)))
        return result

    return run


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def _number(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(function: Any) -> bool:
    """Return whether an operation reads no element: what it returns is memory of its operand."""
    return any(one.alias_info is not None and not one.alias_info.is_write for one in function._schema.returns)
