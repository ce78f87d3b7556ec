"""Write a routing trace into embeddings and routers, so that every system that loads the checkpoint follows it.

Routers of a random model choose nearly evenly, which no cache can use; real ones do not. Replaying a recording through
a hook would reach systems that run in this interpreter only, so the recording is put where all of them read it: the
weights. Token t of the vocabulary stands for row t of the trace. Each (MoE layer, expert) owns a direction of the
residual stream; the token's embedding has a component along the directions of the experts that its row chose, as long
as the logarithm of the recorded router weight asks, and each router looks along its experts' directions. Attention and
experts write little into the stream (`RESIDUAL_SHARE`), so the component is still there in the last layer. A system
that is made to read tokens t, t+1, ... then routes as rows t, t+1, ... did, with stock code.

Directions are axes where the hidden size has one for every (layer, expert), and the routing is then followed in full.
Beyond that they are random signs, which overlap, and many choices come out otherwise (a quarter at one and a half times
as many as axes): `agreement` says how many hold in the weights alone, and the bench records what the model in fact
routed.
"""

from __future__ import annotations

import numpy as np

from emoe_core.experts.trace import RoutingTrace

# Standard deviation of what a layer writes into the stream, against usual initialisation.
RESIDUAL_SHARE = 0.1
# Router logits: of the surest choice, and the least that a choice keeps above experts that were not chosen.
HIGHEST_LOGIT, LOWEST_LOGIT = 7.0, 3.5
# Share of an embedding's energy that routing takes at most.
ROUTING_SHARE = 0.8


class WrittenRouting:
    """Embeddings and router weights that follow a trace.

    Parameters
    ----------
    trace : RoutingTrace
        Of as many layers as the model has MoE layers, and its experts.
    hidden, vocab : int
    seed : int
    """

    def __init__(self, trace: RoutingTrace, hidden: int, vocab: int, seed: int = 0) -> None:
        self.trace = trace
        self.hidden = hidden
        self.vocab = vocab
        self._seed = seed
        self._layers, self._top_k = trace.chosen.shape[1:]
        logits = self._logits(np.arange(len(trace)))
        energy = float((logits.astype(np.float64) ** 2).sum(axis=(1, 2)).max())
        # Norms bring a token to length sqrt(hidden); routing may take a share of that.
        self._gain = max(1.0, np.sqrt(energy / (ROUTING_SHARE * hidden)))

    @property
    def exact_directions(self) -> bool:
        """Whether every (layer, expert) has an axis of its own."""
        return self._layers * self.trace.experts <= self.hidden

    def embeddings(self, start: int, end: int) -> np.ndarray:
        """Return the embeddings of tokens start to end, float32 [end - start, hidden]; rows repeat past the trace."""
        tokens = np.arange(start, end)
        rows = tokens % len(self.trace)
        routed = np.zeros((len(rows), self.hidden), dtype=np.float32)
        lengths = self._logits(rows) / self._gain
        for layer in range(self._layers):
            directions = self._directions(layer)
            components = np.zeros((len(rows), self.trace.experts), dtype=np.float32)
            np.put_along_axis(components, self.trace.chosen[rows, layer].astype(np.int64), lengths[:, layer], axis=1)
            routed += components @ directions
        noise = np.stack([self._noise(token) for token in tokens.tolist()])
        if self.exact_directions:
            noise[:, : self._layers * self.trace.experts] *= 0.05
        rest = np.maximum(self.hidden - (routed**2).sum(axis=1, keepdims=True), 0.02 * self.hidden)
        return routed + noise * np.sqrt(rest / (noise**2).sum(axis=1, keepdims=True))

    def router(self, layer: int) -> np.ndarray:
        """Return a router's weights, float32 [experts, hidden]."""
        return self._directions(layer) * np.float32(self._gain)

    def agreement(self, rows: int = 512) -> float:
        """Return the share of choices that the weights alone reproduce, over the first rows."""
        count = min(rows, len(self.trace), self.vocab)
        embedded = self.embeddings(0, count)
        embedded *= np.sqrt(self.hidden) / np.linalg.norm(embedded, axis=1, keepdims=True)
        same = 0
        for layer in range(self._layers):
            best = np.argsort(-(embedded @ self.router(layer).T), axis=1)[:, : self._top_k]
            wanted = self.trace.chosen[:count, layer]
            same += int((best[:, :, None] == wanted[:, None, :]).any(axis=1).sum())
        return same / (count * self._layers * self._top_k)

    def _logits(self, rows: np.ndarray) -> np.ndarray:
        weight = np.maximum(self.trace.weight[rows].astype(np.float32), 1e-7)
        behind = np.log(weight / weight.max(axis=2, keepdims=True))
        return np.asarray(np.maximum(HIGHEST_LOGIT + behind, LOWEST_LOGIT))

    def _directions(self, layer: int) -> np.ndarray:
        experts = self.trace.experts
        if self.exact_directions:
            directions = np.zeros((experts, self.hidden), dtype=np.float32)
            directions[np.arange(experts), layer * experts + np.arange(experts)] = 1.0
            return directions
        generator = np.random.default_rng([self._seed, 1, layer])
        signs = generator.integers(0, 2, (experts, self.hidden), dtype=np.int8)
        return (signs * 2.0 - 1.0).astype(np.float32) / np.float32(np.sqrt(self.hidden))

    def _noise(self, token: int) -> np.ndarray:
        # By token, so that any part of the embeddings can be made anew.
        return np.random.default_rng([self._seed, 2, int(token)]).standard_normal(self.hidden, dtype=np.float32)
