"""Experts in 8 bits: half the memory and half the reads of 16-bit ones, for a small loss.

Every matrix of an expert is rounded to integers of [-127, 127] with one scale for each of its rows (symmetric, round to
nearest): ``w[row] ~ q[row] * scale[row]``. Biases keep their dtype. Products of bfloat16 tokens on the CPU read the
integers as they are, by PyTorch's own kernel; elsewhere a matrix is restored before its product.

An engine that serves such experts is exact with respect to the rounded model, not to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from emoe_core.device import aligned_starts
from emoe_core.errors import OptionError

if TYPE_CHECKING:
    from emoe_core.checkpoint.index import MoeLayer

SCALE = "_scale"
LARGEST = 127
_ALIGN_BYTES = 64
_PAGE_BYTES = 4096
# With native bfloat16 products, restoring a matrix pays from so many rows on.
_FEW_ROWS = 32


def int8_layer(layer: MoeLayer) -> MoeLayer:
    """Return a layer's record layout with matrices as integers, each followed by its rows' scales.

    Raises
    ------
    OptionError
        When the layer's experts have no matrix of floating point.
    """
    specs, offset = [], 0
    for spec in layer.params:
        parts = [spec]
        if len(spec.shape) == 2 and spec.dtype.is_floating_point:
            rows, columns = spec.shape
            parts = [
                replace(spec, dtype=torch.int8, nbytes=rows * columns),
                replace(spec, name=spec.name + SCALE, shape=(rows,), nbytes=rows * spec.dtype.itemsize),
            ]
        for part in parts:
            specs.append(replace(part, offset_bytes=offset))
            offset = -(-(offset + part.nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES
    if len(specs) == len(layer.params):
        raise OptionError(f"the experts of {layer.name} hold no matrix that 8 bits could hold: use expert_dtype='auto'")
    end = max(offset, aligned_starts(spec.nbytes for spec in specs)[-1])
    return replace(layer, params=tuple(specs), record_bytes=-(-end // _PAGE_BYTES) * _PAGE_BYTES)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix [N, K] to int8 [N, K] and scales [N] of the matrix's dtype."""
    scale = (weight.float().abs().amax(dim=1) / LARGEST).to(weight.dtype)
    scale[scale == 0] = 1
    rounded = (weight.float() / scale.float().unsqueeze(1)).round().clamp(-LARGEST, LARGEST)
    return rounded.to(torch.int8), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Restore a matrix [N, K] in the dtype of its scales."""
    return weight.to(scale.dtype) * scale.unsqueeze(1)


def parameter(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return an expert's parameter by name, restored if it rests in 8 bits."""
    scale = tensors.get(name + SCALE)
    return tensors[name] if scale is None else dequantize(tensors[name], scale)


def product(states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply tokens [n, K] with a matrix [N, K] in 8 bits: [n, N]."""
    packed = states.device.type == "cpu" and states.dtype == scale.dtype == torch.bfloat16
    if packed and (states.shape[0] <= _FEW_ROWS or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.ops.aten._weight_int8pack_mm(states.contiguous(), weight, scale)
    return linear(states, dequantize(weight, scale))
