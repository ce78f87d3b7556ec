"""Telemetry of a run: a written contract.

Terms
-----
lookup
    A distinct (forward pass, MoE layer, expert) that at least one real (not padding) token chose.
hit
    A lookup whose expert was in a slot, or on its way into one, when the layer was reached.
load
    A lookup whose expert was fetched because the layer needed it (on demand).
reroute
    A lookup whose expert stayed absent: every token that chose it was served by resident experts instead.
drop
    A lookup whose expert stayed absent, and nobody took its place (`on_miss="drop"`).
miss
    A load, a reroute or a drop.
prefetch
    An expert brought in by the planner or at warm start, outside any lookup.
wasted
    An expert that was loaded or prefetched and left its slot, or was still in it at the end, without having served a
    lookup; a read that failed too.
stall
    Time in which a forward pass waited for an expert's bytes.

Identities (checked by :meth:`Counters.check` and in the tests)
----------------------------------------------------------------
* ``hits + loads + reroutes + drops == lookups`` and ``misses == loads + reroutes + drops``, in a pass that died midway
  as well
* ``token_hits + token_loads + token_reroutes + token_drops == token_lookups`` (one per token and choice)
* ``bytes_loaded == (loads + prefetches) * record_bytes`` when all records are of one size, failed reads included
* ``wasted_bytes <= bytes_loaded``

Nothing here is estimated: every counter is incremented where the event happens. The class does no locking of its own;
the loader owns one instance and changes it from the thread that runs the model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields


@dataclass
class Counters:
    """Event counts of one engine since it was loaded or last reset. Units are in the names."""

    lookups: int = 0
    hits: int = 0
    loads: int = 0
    reroutes: int = 0
    drops: int = 0
    token_lookups: int = 0
    token_hits: int = 0
    token_loads: int = 0
    token_reroutes: int = 0
    token_drops: int = 0
    prefetches: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    wasted_bytes: int = 0
    stall_s: float = 0.0
    swap_s: float = 0.0
    forwards: int = 0
    predictions: int = 0
    swaps: int = 0

    @property
    def misses(self) -> int:
        """Lookups that found their expert absent."""
        return self.loads + self.reroutes + self.drops

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, in [0, 1]; 1.0 before the first."""
        return self.hits / self.lookups if self.lookups else 1.0

    @property
    def token_hit_rate(self) -> float:
        """Hits per (token, chosen expert), in [0, 1]; 1.0 before the first lookup."""
        return self.token_hits / self.token_lookups if self.token_lookups else 1.0

    def check(self) -> None:
        """Raise AssertionError when an identity of the contract does not hold."""
        assert self.hits + self.misses == self.lookups, self
        tokens = self.token_hits + self.token_loads + self.token_reroutes + self.token_drops
        assert tokens == self.token_lookups, self
        assert self.wasted_bytes <= self.bytes_loaded, self
        assert all(getattr(self, item.name) >= 0 for item in fields(self)), self

    def since(self, earlier: Counters) -> Counters:
        """Return the difference to an earlier snapshot of the same engine."""
        return Counters(**{item.name: getattr(self, item.name) - getattr(earlier, item.name) for item in fields(self)})


@dataclass(frozen=True)
class RunStats:
    """What an engine can say of itself: counters beside the memory that paid for them.

    ``slot_bytes`` is the expert budget as allocated (slots with padding); ``resident_experts`` counts slots in use;
    ``cold_start`` tells that no plan has been applied yet, so residents are what came first. ``compute`` says how
    experts are computed, ``rerouting`` whether tokens can be rerouted; both say why where it is the worse way.
    """

    counters: Counters
    experts: int
    slots: int
    resident_experts: int
    slot_bytes: int
    expert_bytes: int
    dense_bytes: int
    top_k_share: float
    tolerance: float
    on_miss: str
    policy: str
    predictor: str
    interval: int
    cold_start: bool
    storage: str
    requests_served: int
    compute: str
    rerouting: str
    extra: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float | int | str | bool]:
        """Return one flat dictionary, counters first, rates included, for tables and MLflow."""
        flat: dict[str, float | int | str | bool] = dict(asdict(self.counters))
        flat["misses"] = self.counters.misses
        flat["hit_rate"] = self.counters.hit_rate
        flat["token_hit_rate"] = self.counters.token_hit_rate
        for item in fields(self):
            if item.name not in {"counters", "extra"}:
                flat[item.name] = getattr(self, item.name)
        flat["slot_share"] = self.slot_bytes / self.expert_bytes if self.expert_bytes else 0.0
        flat.update(self.extra)
        return flat
