"""What a system's own policy loads when the bench's routing is replayed: it splits the gap to Belady in two.

    bytes read / Belady's bytes = (bytes read / replayed bytes) x (replayed bytes / Belady's bytes)

The first factor is the engine's: near 1 it read what its policy had to load and nothing else. The second is the price
of not knowing the future, and is the policy's alone. Only systems whose loads follow from the routing are replayed: the
engine, exact, on demand.
"""

from __future__ import annotations

import numpy as np

from emoe_core.budget import plan_slots
from workbench.bench.prepare import Prepared
from workbench.replay.cache import replay_policy
from workbench.systems.systems import System


def replayed_loads(prepared: Prepared, system: System) -> np.ndarray | None:
    """Return the experts that a system's policy loads in each timed step, int64 [timed steps]; None: not replayed."""
    options = system.options
    chooses = options.get("predictor") is not None or options.get("tolerance")
    if system.adapter != "emoe" or system.resident or chooses:
        return None
    slots = prepared.slots if system.budgeted else plan_slots(prepared.index, options["budget"])
    accesses = prepared.routing.accesses
    replay = replay_policy(accesses, options["policy"], slots.slots_per_layer)
    loads: np.ndarray = replay.misses[prepared.routing.timed_steps].sum(axis=1)
    return loads
