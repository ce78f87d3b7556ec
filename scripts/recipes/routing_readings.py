"""How a model's routers choose on held-out text, in figures that compare models of different shapes.

Terms: the share of an expert is its part of all choices of a layer; reuse and chance, and the correlation of two
prompts, are those of `workbench.replay.patterns`, every block being a prompt and every token a step of its own. *LRU*
is the hit rate of a per-layer least-recently-used cache of some share of the experts, over all blocks in turn, domains
mixed; a *hot list* holds as many experts a layer, the most used on every other block of each domain, and is scored on
the rest.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import Tensor

from emoe_core.experts.trace import RoutingTrace
from recipes.summary import normalised_mutual_information
from workbench.replay import patterns
from workbench.replay.accesses import Accesses, accesses_of
from workbench.replay.cache import replay_policy
from workbench.replay.policies import BOUND, PINNED
from workbench.replay.prediction import prompt_uses

SHARES = (0.25, 0.5, 0.75)


def readings(chosen: dict[str, Tensor], experts: int, replayed_blocks: int = 6) -> dict[str, Any]:
    """Return how the routers chose.

    Parameters
    ----------
    chosen : dict of Tensor, shape [blocks, layers, tokens, k]
        By domain.
    experts : int
        Of a layer.
    replayed_blocks : int
        Blocks of each domain whose choices are replayed through caches.
    """
    trace = trace_of(chosen, experts)
    shares = np.stack(list(patterns.task_shares(prompt_uses(trace)).values()))
    overall = shares.mean(axis=0)
    part = trace_of({name: blocks[:replayed_blocks] for name, blocks in chosen.items()}, experts)
    uses = prompt_uses(part)
    steps = _steps(part)
    reuse, chance = patterns.token_reuse(steps, [1])
    apart = range(1, len(uses))
    return {
        "experts": experts,
        "top_k": int(trace.chosen.shape[2]),
        "least_share": float(overall.min()),
        "most_share": float(overall.max()),
        "nmi": float(np.mean([normalised_mutual_information(shares[:, i]) for i in range(shares.shape[1])])),
        "reuse": float(reuse[1]),
        "chance": chance,
        "same_domain": float(patterns.prompt_correlation(uses, apart, same_task=True).mean()),
        "other_domain": float(patterns.prompt_correlation(uses, apart, same_task=False).mean()),
        "hit_rates": [hit_rates(part, share) for share in SHARES],
    }


def hit_rates(trace: RoutingTrace, share: float) -> dict[str, float]:
    """Return the hit rates of an LRU, of the best cache in hindsight, and of a hot list, at a share of the experts."""
    steps, slots = _steps(trace), [max(1, round(share * trace.experts))] * trace.chosen.shape[1]
    halves = _halves(trace)
    learned, scored = (_steps(_only(trace, np.isin(trace.request, half))) for half in halves)
    hot = replay_policy(scored, PINNED, slots, warm=learned).misses.sum() / scored.lookups
    found = {name: replay_policy(steps, name, slots).misses.sum() / steps.lookups for name in ("lru", BOUND)}
    return {
        "share": share,
        "lru": float(1 - found["lru"]),
        "belady": float(1 - found[BOUND]),
        "hot_list": float(1 - hot),
    }


def trace_of(chosen: dict[str, Tensor], experts: int) -> RoutingTrace:
    """Return the choices as a trace: a block of each domain in turn, numbered in that order."""
    rounds = max(len(blocks) for blocks in chosen.values())
    order = [(name, i) for i in range(rounds) for name, blocks in chosen.items() if i < len(blocks)]
    rows = [chosen[name][i].permute(1, 0, 2).numpy().astype(np.uint16) for name, i in order]
    picked = np.concatenate(rows)
    lengths = [len(row) for row in rows]
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return RoutingTrace(
        request=np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
        position=position,
        prefill=position == 0,
        chosen=picked,
        served=picked,
        # Weights are not read here; all choices count the same.
        weight=np.full(picked.shape, 1 / picked.shape[2], np.float16),
        tasks={number: name for number, (name, _) in enumerate(order)},
        experts=experts,
    )


def _steps(trace: RoutingTrace) -> Accesses:
    return accesses_of(trace, [1] * len(np.unique(trace.request)))


def _halves(trace: RoutingTrace) -> tuple[list[int], list[int]]:
    """Return every other request of each task, and the rest."""
    halves: tuple[list[int], list[int]] = ([], [])
    seen: Counter[str] = Counter()
    for request in sorted(trace.tasks):
        task = trace.tasks[request]
        halves[seen[task] % 2].append(request)
        seen[task] += 1
    return halves


def _only(trace: RoutingTrace, rows: np.ndarray) -> RoutingTrace:
    kept = {
        name: getattr(trace, name)[rows] for name in ("request", "position", "prefill", "chosen", "served", "weight")
    }
    tasks = {number: trace.tasks[number] for number in sorted(set(kept["request"].tolist()))}
    return RoutingTrace(**kept, tasks=tasks, experts=trace.experts)
