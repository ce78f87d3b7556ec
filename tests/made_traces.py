"""Routing made up by rule, for tests that need no model to record."""

from __future__ import annotations

import numpy as np

from emoe_core.experts.trace import RoutingTrace


def trace_of(rows: int, layers: int, experts: int, top_k: int, seed: int = 0, stay: float = 0.0) -> RoutingTrace:
    """Return a trace of two requests, each half prompt; a token keeps the last one's experts with chance ``stay``."""
    generator = np.random.default_rng(seed)
    chosen = np.stack([[generator.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(rows)]).astype(
        np.uint16
    )
    for row in range(1, rows):
        if generator.random() < stay:
            chosen[row] = chosen[row - 1]
    weight = np.sort(generator.dirichlet(np.ones(top_k), (rows, layers)), axis=2)[:, :, ::-1].astype(np.float16)
    request = np.repeat(np.arange(2, dtype=np.int32), [rows // 2, rows - rows // 2])
    position = np.concatenate([np.arange(rows // 2), np.arange(rows - rows // 2)]).astype(np.int32)
    return RoutingTrace(request, position, position < rows // 4, chosen, chosen, weight, {0: "qa", 1: "qa"}, experts)
