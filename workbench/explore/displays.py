"""What objects of the engine show of themselves in a notebook, in place of their plain text.

An engine shows its memory, who is resident and its counters; slots, memory, counters, plans and routing traces show
their part of that. `show_in_notebooks` makes IPython show them so; a `Panel` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
from IPython import get_ipython

from emoe_core.budget import SlotPlan
from emoe_core.engine import Engine
from emoe_core.experts.trace import RoutingTrace
from emoe_core.footprint import MemoryBreakdown
from emoe_core.metrics import RunStats
from emoe_core.planning.planner import Plan
from workbench.explore.html_view import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Part,
    bar,
    bytes_text,
    folded,
    heading,
    layer_map,
    served_bar,
    table,
)
from workbench.replay.trace_statistics import outcomes


def engine_html(engine: Engine) -> str:
    """Return what an engine is, its memory, who is resident and what it counted."""
    plan = engine.plan
    told = f"{engine.index.path.name}, {engine.index.dtype}, {engine.device}, budget {plan.budget.text}"
    resident = np.zeros((len(plan.num_experts), max(plan.num_experts)))
    for entry in engine.loader.table.entries():
        resident[entry.layer, entry.expert] = 1
    return (
        heading(engine.index.model_type, f"{told}, tolerance {engine.tolerance}")
        + memory_html(engine.memory())
        + layer_map(resident, None, "which experts are resident", "Filled: resident.")
        + stats_html(engine.stats())
    )


def slots_html(plan: SlotPlan) -> str:
    """Return the share of experts that have a slot, and what a budget comes to."""
    held = plan.resident_share
    parts = [Part("resident", held, f"{held:.1%}", BLUE), Part("on disk", 1 - held, f"{1 - held:.1%}", GREY)]
    warned = f"<p>{escape(plan.warning)}</p>" if plan.warning else ""
    return heading("Slots") + bar(parts, f"{held:.1%} of experts are resident") + table(plan.rows()) + warned


def memory_html(memory: MemoryBreakdown) -> str:
    """Return every term of memory as a part of the whole."""
    total = max(1, memory.total_bytes)
    terms = [
        ("dense weights", memory.dense_bytes, GREY),
        ("slots", memory.slot_bytes, BLUE),
        ("KV cache", memory.kv_bytes, GREEN),
        ("workspace", memory.workspace_bytes, ORANGE),
        ("logits", memory.logits_bytes, PINK),
        ("libraries", memory.library_bytes, GREY),
    ]
    parts = [Part(name, count / total, bytes_text(count), color) for name, count, color in terms if count]
    told = f"{bytes_text(memory.total_bytes)}, computed, for {memory.batch} x {memory.max_tokens:,} tokens"
    return heading("Memory", told) + bar(parts, f"memory: {told}")


def stats_html(stats: RunStats) -> str:
    """Return how experts were served, and folded below it every figure."""
    counters = stats.counters
    rows = [
        ("expert slots", f"{bytes_text(stats.slot_bytes)} of {bytes_text(stats.expert_bytes)}"),
        ("resident experts", f"{stats.resident_experts:,} of {stats.experts:,}"),
        ("read from storage", bytes_text(counters.bytes_loaded)),
        ("waited for experts", f"{counters.stall_s:.3g} s"),
        ("requests served", stats.requests_served),
    ]
    served = served_bar([counters.hits, counters.loads, counters.reroutes, counters.drops], "expert lookups")
    told = "no plan yet (cold start)" if stats.cold_start else f"predictor {stats.predictor}, policy {stats.policy}"
    everything = folded("all figures", table(stats.to_dict().items()))
    return heading("Run", told) + served + table(rows) + everything


def plan_html(plan: Plan) -> str:
    """Return the expected tokens of each expert, the planned ones framed."""
    kept = sum(not experts for experts in plan.experts)
    told = f"{sum(map(len, plan.experts)):,} experts in {len(plan.experts) - kept} layers"
    html = heading("Plan", f"{told}, {kept} layers keep what they hold" if kept else told)
    if plan.demand.size:
        planned = np.zeros(plan.demand.shape, dtype=bool)
        for layer, experts in enumerate(plan.experts):
            planned[layer, list(experts)] = True
        note = f"The fuller, the more tokens expected (up to {plan.demand.max():,.0f}). Framed: planned."
        html += layer_map(plan.demand, planned, "expected tokens per expert, planned experts framed", note)
    rows = [(f"layer {layer}", ", ".join(map(str, who)) or "kept") for layer, who in enumerate(plan.experts)]
    return html + folded("experts by expected tokens", table(rows))


def trace_html(trace: RoutingTrace) -> str:
    """Return how choices were served, where that is known, and how often each expert was chosen."""
    layers, choices = trace.chosen.shape[1:]
    rows = [
        ("tokens", f"{len(trace):,}, {int(trace.prefill.sum()):,} of them in prompts"),
        ("requests", f"{len(trace.tasks):,} ({', '.join(sorted(set(trace.tasks.values())))})"),
        ("routed", f"{choices} of {trace.experts} experts in each of {layers} layers"),
    ]
    html = heading("Routing trace") + table(rows)
    served = outcomes(trace)
    if served is not None:
        html += served_bar(served.sum(axis=0).tolist(), "choices")
    if len(trace):
        shares = np.mean(list(trace.shares().values()), axis=0)
        note = f"The fuller, the more often chosen: up to {shares.max():.0%} of a layer's choices."
        html += layer_map(shares, None, "how often each layer chose each expert", note)
    return html


DISPLAYS: dict[type, Callable[[Any], str]] = {
    Engine: engine_html,
    SlotPlan: slots_html,
    MemoryBreakdown: memory_html,
    RunStats: stats_html,
    Plan: plan_html,
    RoutingTrace: trace_html,
}


def show_in_notebooks() -> None:
    """Let the notebook that runs this show the types of `DISPLAYS` as HTML; outside of IPython nothing happens."""
    shell = get_ipython()
    if shell is not None:
        formatter = shell.display_formatter.formatters["text/html"]
        for shown, html in DISPLAYS.items():
            formatter.for_type(shown, html)
