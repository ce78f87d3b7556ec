"""One carved feed-forward: the parts that a recipe stores, the weights they stand for, and what these compute.

With ``m_j`` = 1/2 for neurons of the shared expert, the router's probability for those of a chosen expert, else 0,

    h = silu(W_g x) * (W_u x)        y = W (m * h)        W[:, j] = f_j (W_d[:, j] + d_j)

f is 2 for shared neurons (the family's shared expert passes a sigmoid gate, here zero, that is one half) and the number
of experts for routed ones (a chosen expert is weighed by its probability among all, without renormalisation), so that
f_j m_j is near one. d is the repair: what W_d gains to make up for the experts left out, stored in 4 bits with one
scale for each neuron.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emoe_core.errors import OptionError

SHARED_GATE = 0.5
LARGEST_CODE = 7


@dataclass(frozen=True)
class Shape:
    """Routed experts per layer, experts per token, and neurons of the shared expert."""

    experts: int = 24
    top_k: int = 12
    shared: int = 384

    def width(self, neurons: int) -> int:
        """Return the neurons of one routed expert when a feed-forward of `neurons` is carved."""
        width, rest = divmod(neurons - self.shared, self.experts)
        if width < 1 or rest:
            raise OptionError(
                f"{neurons} neurons less {self.shared} shared ones cannot be cut into {self.experts} equal experts"
            )
        return width


@dataclass(frozen=True)
class CarvedLayer:
    """Weights of one layer as they are stored in the checkpoint (rounded to bfloat16), in float32.

    Attributes
    ----------
    shape : Shape
    gate, up : Tensor, shape [neurons, hidden]
        In the order of the experts, the shared one first.
    down : Tensor, shape [hidden, neurons]
        With the factors f.
    router : Tensor, shape [experts, hidden]
    """

    shape: Shape
    gate: Tensor
    up: Tensor
    down: Tensor
    router: Tensor

    def weigh(self, x: Tensor) -> Tensor:
        """Return ``m * h`` [tokens, neurons] for inputs [tokens, hidden]."""
        probabilities = torch.softmax(functional.linear(x, self.router), dim=-1)
        best = probabilities.topk(self.shape.top_k, dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(1, best.indices, best.values)
        width = self.shape.width(len(self.gate))
        shared = torch.full((len(x), self.shape.shared), SHARED_GATE)
        weights = torch.cat([shared, chosen.repeat_interleave(width, dim=1)], dim=1)
        return weights * functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs [tokens, hidden] for inputs [tokens, hidden]."""
        return functional.linear(self.weigh(x), self.down)


def factors(shape: Shape, neurons: int) -> Tensor:
    """Return f [neurons], in the order of the experts."""
    values = torch.full((neurons,), float(shape.experts))
    values[: shape.shared] = 1 / SHARED_GATE
    return values


def assemble(shape: Shape, dense: tuple[Tensor, Tensor, Tensor], parts: dict[str, Tensor]) -> CarvedLayer:
    """Return the layer that stored parts and the parent's matrices make, by elementwise operations only.

    Parameters
    ----------
    shape : Shape
    dense : tuple of Tensor
        W_g and W_u [neurons, hidden] and W_d [hidden, neurons], float32.
    parts : dict of str to Tensor
        ``order`` [neurons], ``router`` [experts, hidden], and the repair ``codes`` [hidden, neurons / 2], two to a
        byte, with ``steps`` [neurons]; without codes nothing is repaired.
    """
    gate, up, down = dense
    order = parts["order"].long()
    down = down[:, order]
    if "codes" in parts:
        down = down + unpack(parts["codes"]) * parts["steps"].float()
    down = down * factors(shape, len(order))
    rounded = (tensor.to(torch.bfloat16).float() for tensor in (gate[order], up[order], down, parts["router"]))
    return CarvedLayer(shape, *rounded)


def pack(repair: Tensor) -> dict[str, Tensor]:
    """Return ``codes`` and ``steps`` of a repair [hidden, neurons]; a neuron's largest value has the largest code."""
    steps = (repair.abs().amax(dim=0) / LARGEST_CODE).to(torch.bfloat16)
    safe = steps.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = (repair / safe).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int16) + 8
    return {"codes": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), "steps": steps}


def unpack(codes: Tensor) -> Tensor:
    """Return the integers from -7 to 7 [hidden, neurons], as float32, out of packed bytes [hidden, neurons / 2]."""
    pairs = torch.stack([codes % 16, codes // 16], dim=-1)
    return pairs.flatten(-2).float() - 8
