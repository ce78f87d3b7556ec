"""What the hardware would allow: the bounds that stand beside each figure.

Terms, for one decoded token:

    disk time    = bytes read / measured disk bandwidth
    compute time = the shortest time per token of the same code with every expert resident, where the bench has it;
                   else weights that the token uses / measured memory bandwidth
    bound        = 1 / max(disk time, compute time)          tokens/s that the system's own reads allow
    ideal        = 1 / max(Belady's misses x record / disk bandwidth, weights / memory bandwidth)

`bound` takes a system's reads as they are and asks how well it hides them; `ideal` asks what any system with the
bench's expert slots could do that computes the same model exactly.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from workbench.bench.prepare import Prepared
from workbench.systems.systems import System


@dataclass(frozen=True)
class Roofline:
    """Bounds of a bench's tokens.

    Attributes
    ----------
    disk_bytes_per_s, memory_bytes_per_s : float
    routed_bytes_per_token : float
        Of distinct experts that a timed token routes to.
    belady_bytes_per_token : float
        The fewest that a cache of the bench's slots must load.
    weights_bytes_per_token : float
        Dense weights and routed experts that a token uses.
    """

    disk_bytes_per_s: float
    memory_bytes_per_s: float
    routed_bytes_per_token: float
    belady_bytes_per_token: float
    weights_bytes_per_token: float

    @property
    def memory_s(self) -> float:
        """Least seconds a token that reading its weights from memory takes."""
        return self.weights_bytes_per_token / self.memory_bytes_per_s

    @property
    def ideal_tokens_per_s(self) -> float:
        return 1 / max(self.belady_bytes_per_token / self.disk_bytes_per_s, self.memory_s)

    def bound_tokens_per_s(self, read_bytes_per_token: float, compute_s: float | None) -> float:
        """Return the bound for reads of a token and the resident time per token (None: by memory bandwidth)."""
        return 1 / max(read_bytes_per_token / self.disk_bytes_per_s, compute_s or self.memory_s)


def roofline(prepared: Prepared, tokens: int) -> Roofline:
    """Return the bounds for the first ``tokens`` timed tokens."""
    facts, bandwidths = prepared.facts, prepared.bandwidths
    record = facts["record_bytes"]
    routed = prepared.routing.routed_experts(tokens) * record / tokens
    misses = prepared.routing.belady_misses(prepared.slots.slots_per_layer, tokens)
    return Roofline(
        bandwidths.disk_bytes_per_s,
        bandwidths.memory_bytes_per_s,
        routed,
        misses * record / tokens,
        facts["token_dense_bytes"] + routed,
    )


def resident_times(rows: list[dict[str, Any]], systems: list[System]) -> dict[str, float]:
    """Return by adapter the shortest median time per token with every expert resident.

    llama.cpp has no resident mode of its own: without a limit it is one.
    """
    found: dict[str, float] = {}
    for system in systems:
        whole = system.resident or (system.adapter == "llama.cpp" and not system.limited)
        times = [row["tpot_s"] for row in rows if row["system"] == system.name and row.get("tpot_s")]
        if whole and times:
            found[system.adapter] = min(statistics.median(times), found.get(system.adapter, float("inf")))
    if "stock" in found:
        found.setdefault("accelerate", found["stock"])
    return found
