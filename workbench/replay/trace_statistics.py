"""What a routing trace tells of how its choices were served."""

from __future__ import annotations

import numpy as np

from emoe_core.experts.trace import DROP, HIT, LOAD, REROUTE, RoutingTrace


def outcomes(trace: RoutingTrace, rows: np.ndarray | None = None) -> np.ndarray | None:
    """Return how many choices of each layer were hits, loads, reroutes and drops, int64 [L, 4]; None where unknown.

    ``rows`` of the trace; all when missing.
    """
    if trace.outcome is None:
        return None
    outcome = trace.outcome if rows is None else trace.outcome[rows]
    return np.stack([(outcome == kind).sum(axis=(0, 2)) for kind in (HIT, LOAD, REROUTE, DROP)], axis=1)
