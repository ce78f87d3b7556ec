"""The network of the trained predictor: a small transformer encoder over one token per MoE layer and one for the task.

Its output corrects a base: log shares = log_softmax(log base + correction), the correction starting at zero, so an
untrained network *is* the frequency predictor, and training can only be worth something where it beats it.

Variants (paper, section 3.2)
-----------------------------
A
    All layers at once, each layer's token carrying that layer's history.
L
    Layer by layer: the token of layer i carries the shares predicted for layer i - 1 of the same coming prompt, that
    of layer 0 the last prompt's layer 0; a layer sees only the layers before it.

The paper's E is A asked before every prompt: a matter of the interval, not of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import ConfigDict
from torch import nn

from emoe_core.errors import OptionError
from emoe_core.predictor.history import KINDS, SCALARS

VARIANTS = ("A", "L")
MOST = 4096  # layers, experts, width: beyond any model's, and small enough to build for a foreign file
SMOOTHING = 1e-3  # share of the base spread over all experts, so that its logarithm is finite


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of the network; ``tasks`` names the task types it knows, any other being unknown to it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    variant: str
    layers: int
    experts: int
    tasks: tuple[str, ...]
    width: int = 64
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"unknown variant {self.variant!r} of the trained predictor: choose 'A' or 'L'")
        if min(self.layers, self.experts, self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise OptionError(f"width {self.width}, depth {self.depth}, heads {self.heads}: heads must divide width")
        if max(self.layers, self.experts, self.width) > MOST:
            raise OptionError(f"a trained predictor has at most {MOST} layers, experts and width")

    @property
    def inputs(self) -> int:
        """Numbers that a layer's token carries."""
        return (2 * KINDS * self.experts if self.variant == "A" else self.experts) + SCALARS

    def task_index(self, task: str) -> int:
        """Return the task's embedding; the last one stands for unknown."""
        return self.tasks.index(task) if task in self.tasks else len(self.tasks)

    def fits(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Return whether these are the weights of such a network; little is allocated to find out."""
        if self.depth > len(weights):
            return False
        with torch.device("meta"):
            expected = ShareNetwork(self).state_dict()
        return {name: weight.shape for name, weight in expected.items()} == {
            name: weight.shape for name, weight in weights.items()
        } and all(weight.is_floating_point() for weight in weights.values())


class ShareNetwork(nn.Module):
    """Predict log shares; call `predict`, which knows how each variant is asked."""

    def __init__(self, shape: NetworkShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.input = nn.Linear(shape.inputs, width)
        self.layer_embedding = nn.Parameter(torch.randn(shape.layers, width) * 0.02)
        self.task_embedding = nn.Embedding(len(shape.tasks) + 1, width)
        block = nn.TransformerEncoderLayer(width, shape.heads, 2 * width, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, shape.depth, enable_nested_tensor=False)
        self.output = nn.Linear(width, shape.experts)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        order = torch.ones(1 + shape.layers, 1 + shape.layers, dtype=torch.bool).triu(1)
        self.register_buffer("later", order if shape.variant == "L" else torch.zeros_like(order), persistent=False)

    def forward(self, inputs: torch.Tensor, tasks: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return log shares [B, layers, experts].

        Parameters
        ----------
        inputs : torch.Tensor
            [B, layers, inputs].
        tasks : torch.Tensor
            int64 [B], from `NetworkShape.task_index`.
        base : torch.Tensor
            Shares to correct, [B, layers, experts].
        """
        task = self.task_embedding(tasks).unsqueeze(1)
        tokens = torch.cat([task, self.input(inputs) + self.layer_embedding + task], dim=1)
        hidden = self.encoder(tokens, mask=self.later)[:, 1:]
        smooth = base * (1 - SMOOTHING) + SMOOTHING / self.shape.experts
        return torch.log_softmax(smooth.log() + self.output(hidden), dim=-1)

    def predict(
        self, features: torch.Tensor, tasks: torch.Tensor, base: torch.Tensor, passes: int | None = None
    ) -> torch.Tensor:
        """Return log shares [B, layers, experts] from the features of `History`.

        Parameters
        ----------
        passes : int, optional
            Variant L: how often to feed predictions back. After n passes the first n layers are as they will be, so
            the default, one pass a layer, is exact; training makes do with fewer.
        """
        if self.shape.variant == "A":
            return self(features, tasks, base)
        shares = base
        for _ in range((self.shape.layers if passes is None else passes) - 1):
            with torch.no_grad():
                shares = self(self._chained(features, shares), tasks, base).exp()
        return self(self._chained(features, shares), tasks, base)

    def _chained(self, features: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return variant L's inputs: the layer before, the last prompt's layer 0, and how much was seen."""
        last = features[:, :1, : self.shape.experts]
        return torch.cat([torch.cat([last, shares[:, :-1]], dim=1), features[..., -SCALARS:]], dim=-1)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take trained weights."""
        self.load_state_dict(dict(weights))
