"""Replay of recorded routing through expert caches: what each eviction policy would have loaded, beside the bound.

The replay is the engine's own residency table, leases and eviction policies over a loader that moves nothing, so that
its counts are those of an engine in exact mode (tolerance 0, no predictor) on the same routing.

Terms
-----
miss
    A request (distinct step, layer, expert) whose expert was in no slot when its layer was reached; it is loaded.
preload
    An expert that a policy holds from the start (`pinned`); it is loaded too.
gap closed
    (LRU's loads - the policy's) / (LRU's loads - MIN's): 0 is LRU, 1 is hindsight.

Very long passes are the exception: where results would wait in more than 16 MiB, the engine takes experts in ascending
order (`emoe_core/experts/compute.py`), and the last ones of the pass to be kept may be others.

Time is not simulated: a policy that streams more through the one staging slot may load less and yet wait longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from emoe_core.errors import OptionError
from emoe_core.loader.lease import Lease
from emoe_core.loader.slots import Entry, SlotTable
from workbench.replay.accesses import Accesses
from workbench.replay.bound import fewest_misses
from workbench.replay.policies import BOUND, PINNED, POLICY_NAMES, TABLES, require_policy

if TYPE_CHECKING:
    from emoe_core.loader.loader import ExpertLoader


@dataclass
class _Count:
    """What a lease counts."""

    lookups: int = 0
    loads: int = 0


@dataclass
class _ReplayLoader:
    """What a `Lease` asks of a loader, with bytes that are there at once."""

    table: SlotTable
    counters: _Count = field(default_factory=_Count)

    def fetch(self, layer: int, expert: int) -> Entry | None:
        admitted = self.table.allocate(layer, expert)
        if admitted is None:
            return None
        admitted[0].ready = True
        return admitted[0]

    def wait(self, entry: Entry) -> None:
        """Nothing is on its way."""

    def serve(self, entry: Entry) -> None:
        self.table.touch(entry)

    def release(self, entry: Entry) -> None:
        entry.pins -= 1

    def settle(self) -> None:
        """Nothing is on its way."""

    def return_staging(self, layer: int) -> None:
        while (extra := self.table.beyond_capacity(layer)) is not None:
            self.table.evict(extra)

    def tensors(self, entry: Entry) -> dict[str, object]:
        return {}


@dataclass(frozen=True)
class Replay:
    """What one policy did: misses of each step and layer, int64 [S, L], and experts loaded before the first step."""

    policy: str
    capacity: tuple[int, ...]
    misses: np.ndarray
    preloads: int = 0

    @property
    def loads(self) -> int:
        """Experts loaded in all."""
        return int(self.misses.sum()) + self.preloads


def replay_policy(
    accesses: Accesses, policy: str, capacity: Sequence[int], *, warm: Accesses | None = None, seed: int = 0
) -> Replay:
    """Replay accesses under one policy, from empty slots.

    Parameters
    ----------
    accesses : Accesses
    policy : str
        One of `POLICY_NAMES`.
    capacity : sequence of int
        Slots of each layer, 1 to E.
    warm : Accesses, optional
        Earlier accesses; `pinned` holds the experts that these used most.
    seed : int
        Of `random`.

    Raises
    ------
    OptionError
        Unknown policy, slots out of range, or `pinned` without a warm-up.
    """
    require_policy(policy)
    slots = tuple(int(count) for count in capacity)
    if len(slots) != accesses.layers or not all(1 <= count <= accesses.experts for count in slots):
        raise OptionError(
            f"slots per layer are {min(slots, default=0)} to {max(slots, default=0)} in {len(slots)} layers: give 1 to "
            f"{accesses.experts} for each of {accesses.layers} layers"
        )
    if policy == BOUND:
        return Replay(policy, slots, fewest_misses(accesses.needed, slots))
    if policy == PINNED:
        held = most_used(warm, slots)
        return Replay(policy, slots, (accesses.needed & ~held).sum(axis=2), int(held.sum()))
    # The engine keeps one slot to stream through, unless every expert has its own.
    staging = int(any(count < accesses.experts for count in slots))
    return replay_table(accesses, policy, TABLES[policy](slots, staging, accesses.experts, seed))


def replay_table(accesses: Accesses, policy: str, table: SlotTable) -> Replay:
    """Replay accesses on a residency table that holds nothing yet."""
    loader = _ReplayLoader(table)
    lender = cast("ExpertLoader", loader)
    misses = np.zeros((len(accesses), accesses.layers), dtype=np.int64)
    for step, pass_tokens in enumerate(accesses.tokens):
        table.forward = step
        for layer, tokens in enumerate(pass_tokens):
            active = np.flatnonzero(tokens).tolist()
            if not active:
                continue
            table.begin(layer, tokens)
            before = loader.counters.loads
            with Lease(lender, layer, active) as lease:
                while lease.take() is not None:
                    pass
            misses[step, layer] = loader.counters.loads - before
    return Replay(policy, table.capacity, misses)


def most_used(warm: Accesses | None, capacity: Sequence[int]) -> np.ndarray:
    """Return the experts that most tokens chose, as many a layer as it has slots, bool [L, E].

    Raises
    ------
    OptionError
        Without a warm-up.
    """
    if warm is None:
        raise OptionError("the policy 'pinned' holds the experts of a warm-up: record with warm_prompts of 1 or more")
    rank = (-warm.tokens.sum(axis=0, dtype=np.int64)).argsort(axis=1, kind="stable").argsort(axis=1)
    return np.asarray(rank < np.asarray(capacity)[:, None])


def simulate(
    streams: Mapping[str, Accesses],
    capacities: Mapping[str, Sequence[int]],
    policies: Sequence[str] = POLICY_NAMES,
    *,
    warm: Accesses | None = None,
    expert_bytes: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Replay every policy at every size on every stream; LRU and MIN are always among them.

    Parameters
    ----------
    streams : mapping of str to Accesses
    capacities : mapping of str to sequence of int
        Slots of each layer, by the name of the size.
    policies : sequence of str
        Of `POLICY_NAMES`.
    warm, seed
        As in `replay_policy`.
    expert_bytes : int
        Bytes of one expert.
    progress : callable, optional
        Called with (replays done, replays in all).

    Returns
    -------
    DataFrame
        One row a replay: stream, size, slots (mean a layer), slot_share, policy, lookups, misses, prefill_misses,
        decode_misses, compulsory, loads, hit_rate, loaded_bytes, gap_closed (NaN where LRU is MIN).
    """
    for policy in policies:
        require_policy(policy)
    names = list(dict.fromkeys([*policies, "lru", BOUND]))
    rows: list[dict[str, object]] = []
    total = len(streams) * len(capacities) * len(names)
    for stream, accesses in streams.items():
        for size, capacity in capacities.items():
            found = {}
            for name in names:
                found[name] = replay_policy(accesses, name, capacity, warm=warm, seed=seed)
                if progress is not None:
                    progress(len(rows) + len(found), total)
            gap = found["lru"].loads - found[BOUND].loads
            for name, replayed in found.items():
                misses = int(replayed.misses.sum())
                prefill = int(replayed.misses[accesses.prefill].sum())
                rows.append(
                    {
                        "stream": stream,
                        "size": size,
                        "slots": float(np.mean(replayed.capacity)),
                        "slot_share": sum(replayed.capacity) / (accesses.layers * accesses.experts),
                        "policy": name,
                        "lookups": accesses.lookups,
                        "misses": misses,
                        "prefill_misses": prefill,
                        "decode_misses": misses - prefill,
                        "compulsory": accesses.compulsory,
                        "loads": replayed.loads,
                        "hit_rate": 1 - misses / accesses.lookups,
                        "loaded_bytes": replayed.loads * expert_bytes,
                        "gap_closed": (found["lru"].loads - replayed.loads) / gap if gap else float("nan"),
                    }
                )
    return pd.DataFrame(rows)
