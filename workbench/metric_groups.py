"""What a metric is about, read from its name: memory, quality, time or something else, and which way is better.

A metric belongs to the first group of `GROUPS` that names a part of it. Times are whatever a clock or the load of the
machine decides; they are the only metrics that a second run of the same code cannot be expected to repeat. *Measured*
memory is the operating system's: it repeats within a few percent; memory that is computed (slots) repeats exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# In the order in which tables show them.
GROUPS = {
    "memory": (
        *("model_bytes", "peak_bytes", "serving_bytes", "slot_bytes", "slot_share", "dense_bytes", "expert_bytes"),
        "memory",
    ),
    "quality": ("perplexity", "kl_", "agreement", "similarity", "accuracy", "identical"),
    "time": ("ttft", "tpot", "stall", "_s", "per_s", "cpu_share"),
}
OTHER = "other"
MEASURED_MEMORY = (
    "peak_bytes",
    "model_bytes",
    "serving_bytes",
    "control_bytes",
    "mapped_bytes",
    "memory_ratio",
    "serving_ratio",
)
LOWER_IS_BETTER = ("perplexity", "kl_", "log_ratio", "_bytes", "bytes_", "memory", "loads", "reroutes", "evictions")
HIGHER_IS_BETTER = ("agreement", "similarity", "accuracy", "hit_rate", "per_s", "attainment", "goodput", "skill")


def group_of(metric: str) -> str:
    """Return the group that a metric belongs to."""
    for group, parts in GROUPS.items():
        if any(metric.endswith(part) if part.startswith("_") else part in metric for part in parts):
            return group
    return OTHER


def rank_of(metric: str) -> int:
    """Return the place of a metric's group in tables."""
    return [*GROUPS, OTHER].index(group_of(metric))


def in_order(metrics: Iterable[str], named: Sequence[str]) -> list[str]:
    """Return metrics by group; within one, those that the sweep file names come first, in its order."""
    places = {name: place for place, name in enumerate(named)}
    return sorted(metrics, key=lambda name: (rank_of(name), places.get(name, len(named)), name))


def is_measured_memory(metric: str) -> bool:
    """Say whether a metric is memory as the operating system reports it."""
    return any(metric.endswith(ending) for ending in MEASURED_MEMORY)


def better_direction(metric: str) -> int:
    """Return -1 where lower is better, 1 where higher is, 0 where neither can be said."""
    if any(part in metric for part in HIGHER_IS_BETTER):
        return 1
    if group_of(metric) == "time" and not metric.endswith(("cpu_share", "spread_s")):
        return -1
    return -1 if any(part in metric for part in LOWER_IS_BETTER) else 0


def main_metrics(named: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the metrics of the main table, in the order of `every`.

    These are the ones that the sweep file named (all when it named none), and every quality metric when one of them is
    about memory and none about quality.
    """
    chosen = set(named) & set(every)
    if not chosen:
        return list(every)
    groups = {group_of(name) for name in chosen}
    if "memory" in groups and "quality" not in groups:
        chosen |= {name for name in every if group_of(name) == "quality"}
    return [name for name in every if name in chosen]
