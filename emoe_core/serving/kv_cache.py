"""The KV cache of a batch whose members come and go, one row each, padded on the left.

A prompt is run alone and brings its own cache; `join` adds it as a row, `keep` drops the rows of those who are done and
the padding that nobody needs any more. Both copy the whole cache, which is the price of a plain tensor: it happens when
the batch changes, not at every step. Rows are padded to the longest, so memory is rows times the longest sequence.

What cannot be padded so shares no batch (`obstacle`): caches that are not one growing tensor a layer (sliding windows,
states, indexed or compressed attention), and rotary embeddings that go by the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from emoe_core.serving.rope import rope_by_length


def obstacle(cache: Any, config: PreTrainedConfig) -> str | None:
    """Return why sequences of a model cannot share a padded batch, or None if they can.

    Parameters
    ----------
    cache : Any
        What a pass of the model over some tokens returned as its cache.
    config : PreTrainedConfig
    """
    if cache is None:
        return "it keeps no cache that could be seen"
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    foreign = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if foreign:
        return f"its cache has layers of {', '.join(foreign)}"
    rope = rope_by_length(config)
    return None if rope is None else f"its rotary embedding ({rope}) goes by the longest row"


class BatchCache:
    """Rows of a decoding batch.

    Attributes
    ----------
    cache : DynamicCache or None
        What the model is given: keys and values [rows, heads, longest, head size] of each layer. None without rows.
    lengths : list of int
        Real tokens of each row.
    """

    def __init__(self) -> None:
        self.cache: DynamicCache | None = None
        self.lengths: list[int] = []

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def join(self, cache: DynamicCache, length: int) -> None:
        """Add a row: the cache of one sequence of ``length`` tokens, without padding. The cache given is taken over.

        A second row may join only where there is no `obstacle`.
        """
        if self.cache is None:
            self.cache, self.lengths = cache, [length]
            return
        layers: list[Any] = list(self.cache.layers)
        added: list[Any] = list(cache.layers)
        width = max(self.longest, length)
        try:
            for mine, new in zip(layers, added, strict=True):
                keys = torch.cat([_padded(mine.keys, width), _padded(new.keys, width)])
                mine.values = torch.cat([_padded(mine.values, width), _padded(new.values, width)])
                mine.keys = keys
        except BaseException:
            # Memory may run out at any layer: those who were here before stay as they were.
            self.restore()
            raise
        self.lengths.append(length)

    def restore(self) -> None:
        """Drop what a join that failed midway has added to some layers."""
        assert self.cache is not None
        rows, width = len(self.lengths), self.longest
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            # A join pads on the left and adds a row.
            layer.keys, layer.values = (part[:rows, :, -width:] for part in (layer.keys, layer.values))

    def alone(self, row: int) -> DynamicCache:
        """Return a copy of one row's cache without padding, as it was before a pass that has not been counted."""
        assert self.cache is not None
        single = DynamicCache()
        own = slice(self.longest - self.lengths[row], self.longest)
        layers: list[Any] = list(self.cache.layers)
        for place, layer in enumerate(layers):
            # A pass adds tokens on the right, to some layers where it failed.
            keys, values = (part[row : row + 1, :, own].clone() for part in (layer.keys, layer.values))
            single.update(keys, values, place)
        return single

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in the order given."""
        if self.cache is None or list(rows) == list(range(len(self.lengths))):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not self.lengths:
            self.cache = None
            return
        width = self.longest
        kept: list[Any] = list(self.cache.layers)
        for layer in kept:
            chosen = torch.tensor(list(rows), device=layer.keys.device)
            layer.keys = layer.keys.index_select(0, chosen)[..., -width:, :].contiguous()
            layer.values = layer.values.index_select(0, chosen)[..., -width:, :].contiguous()

    def next_inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask [rows, longest + 1] and positions [rows, 1] for one more token of every row."""
        width = self.longest + 1
        lengths = torch.tensor(self.lengths, device=device).unsqueeze(-1)
        mask = torch.arange(width, device=device) >= width - 1 - lengths
        return mask.long(), lengths

    def grew(self) -> None:
        """Take note that the model has added one token to every row."""
        self.lengths = [length + 1 for length in self.lengths]


def _padded(states: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
