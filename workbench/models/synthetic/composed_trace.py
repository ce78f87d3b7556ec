"""Recorded routing of one model, laid out for a shape with another number of layers and experts.

No recording of a model with, say, 64 experts can be had offline, and what a cache lives from (which experts are
popular, how often the last token's are wanted again) cannot be guessed. So it is taken from what was recorded: the
experts of a synthetic layer are those of several recorded layers side by side, and a token chooses the ``top_k`` of
them with the largest recorded router weights. Where recorded layers run out they are used again, at other tokens of
the recording (rotated by a part of it), so that no two experts of a layer move together. A trace of the same experts
and top-k is thereby replayed as it is.

`locality` gives what can be compared before and after: it says how far the composed routing is from the recorded one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from emoe_core.errors import OptionError
from emoe_core.experts.trace import RoutingTrace


@dataclass(frozen=True)
class Locality:
    """How cacheable routing is.

    Attributes
    ----------
    repeat_rate : float
        Share of a token's choices that the token before made as well; k/E if experts were drawn evenly.
    best_half_mass : float
        Share of all choices that go to the half of a layer's experts that is chosen most; 0.5 if even.
    even_rate : float
        k/E.
    """

    repeat_rate: float
    best_half_mass: float
    even_rate: float


def locality(trace: RoutingTrace) -> Locality:
    """Measure a trace; tokens of different requests do not follow each other."""
    chosen = np.zeros((*trace.chosen.shape[:2], trace.experts), dtype=bool)
    np.put_along_axis(chosen, trace.chosen.astype(np.int64), True, axis=2)
    follows = trace.request[1:] == trace.request[:-1]
    again = (chosen[1:] & chosen[:-1])[follows].sum() / max(chosen[1:][follows].sum(), 1)
    counts = np.sort(chosen.sum(axis=0), axis=1)[:, ::-1]
    best = counts[:, : trace.experts // 2].sum() / max(counts.sum(), 1)
    return Locality(float(again), float(best), trace.chosen.shape[2] / trace.experts)


def compose(trace: RoutingTrace, layers: int, experts: int, top_k: int) -> RoutingTrace:
    """Lay a trace out for ``layers`` layers of ``experts`` experts with ``top_k`` choices.

    Raises
    ------
    OptionError
        When the recording chooses too small a share of experts to fill ``top_k``.
    """
    rows, recorded, choices = trace.chosen.shape
    weights = np.zeros((rows, recorded, trace.experts), dtype=np.float32)
    # A weight that rounded to zero in storage was chosen all the same.
    np.put_along_axis(weights, trace.chosen.astype(np.int64), np.maximum(trace.weight.astype(np.float32), 1e-7), axis=2)
    blocks = -(-experts // trace.experts)
    whole = experts // trace.experts
    if whole * choices < top_k:
        raise OptionError(
            f"the recording chooses {choices} of {trace.experts} experts, too few to fill top-{top_k} of {experts}: "
            f"give a recorded trace with a larger share, or --routing own"
        )
    rounds = -(-layers * blocks // recorded)
    chosen = np.empty((rows, layers, top_k), dtype=np.uint16)
    weight = np.empty((rows, layers, top_k), dtype=np.float16)
    for layer in range(layers):
        numbers = range(layer * blocks, (layer + 1) * blocks)
        beside = [np.roll(weights[:, n % recorded], -(n // recorded) * rows // rounds, axis=0) for n in numbers]
        values = np.concatenate(beside, axis=1)[:, :experts]
        best = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
        taken = np.take_along_axis(values, best, axis=1)
        chosen[:, layer] = best
        weight[:, layer] = taken / taken.sum(axis=1, keepdims=True)
    return replace(trace, chosen=chosen, served=chosen, weight=weight, experts=experts)
