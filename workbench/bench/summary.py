"""The table of a bench: one row a system, medians over its processes with their spread, beside the bounds.

Terms: *spread* is the range from the smallest to the largest process; *read amplification* is bytes that the disk
delivered while decoding over the bytes of the experts that the tokens route to; *agreement* is how often a system's own
likeliest next token is the reference's (exact systems differ by rounding only). A system that did not survive keeps its
row, with the outcome in place of figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from emoe_core.errors import OptionError
from workbench.bench.plan import LEAST_REPEATS, BenchPlan
from workbench.bench.prepare import Prepared
from workbench.bench.replay import replayed_loads
from workbench.bench.roofline import Roofline, resident_times, roofline
from workbench.machine.busy import busy_warning
from workbench.measure.launch import FAILED, MEASURED
from workbench.systems.systems import System

# Figures that get a median and a spread.
FIGURES = (
    "import_s", "load_s", "cold_ttft_s", "ttft_s", "tpot_s", "tokens_per_s", "peak_bytes", "anonymous_bytes",
    "group_peak_bytes", "read_bytes_per_token", "read_amplification", "hit_rate", "stall_share", "wasted_bytes",
    "agreement",
)  # fmt: skip


def derive(row: dict[str, Any], prepared: Prepared, likeliest: Sequence[int] | None) -> dict[str, Any]:
    """Return a measured result with the figures that follow from it."""
    tokens = row["decoded_tokens"]
    seconds = sum(row["token_s"])
    counters = row.get("counters") or {}
    routed = prepared.routing.routed_experts(tokens) * prepared.facts["record_bytes"]
    lookups = counters.get("lookups")
    pairs = list(zip(row["likeliest"], likeliest or (), strict=False))
    return {
        **row,
        "tpot_s": seconds / tokens,
        "tokens_per_s": tokens / seconds,
        "read_bytes_per_token": row["decode_read_bytes"] / tokens,
        "read_amplification": row["decode_read_bytes"] / routed,
        "hit_rate": counters["hits"] / lookups if lookups else None,
        "stall_share": counters["stall_s"] / seconds if lookups else None,
        "wasted_bytes": counters.get("wasted_bytes") if lookups else None,
        "agreement": sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else None,
    }


def summarise(
    plan: BenchPlan, prepared: Prepared, results: list[dict[str, Any]], reference: str | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the table, and what belongs beside it.

    Parameters
    ----------
    plan : BenchPlan
    prepared : Prepared
    results : list of dict
        Of `runner.read_results`.
    reference : str, optional
        System that ratios are to; the first that was measured when missing.

    Returns
    -------
    table : DataFrame
        One row a system: ``system, outcome, processes, limited``, each of `FIGURES` with ``_low`` and ``_high``,
        ``speed_ratio``, ``bound_tokens_per_s``, ``share_of_bound``, ``ideal_tokens_per_s``, ``reads_over_belady``, and
        where the system's policy can be replayed, ``replay_bytes_per_token`` and ``reads_over_replay``.
    notes : dict
        Bounds, bandwidths, budget, and ``warnings`` that people must see.
    """
    systems = plan.found_systems()
    measured = [row for row in results if row["outcome"] == MEASURED]
    likeliest = _reference_tokens(measured, systems)
    rows = [derive(row, prepared, likeliest) for row in measured]
    bounds = {tokens: roofline(prepared, tokens) for tokens in {row["decoded_tokens"] for row in rows} | {plan.tokens}}
    resident = resident_times(rows, systems)
    table = pd.DataFrame([_system_row(system, results, rows, bounds, resident, prepared) for system in systems])
    table["speed_ratio"] = table["tokens_per_s"] / _reference_speed(table, reference)
    whole = bounds[plan.tokens]
    notes = {
        "tokens_from": prepared.facts["tokens_from"],
        "routing_agreement": prepared.facts["routing_agreement"],
        "limit_by": prepared.facts["limit_by"],
        "budget_terms": prepared.facts["budget_terms"],
        "expert_budget": prepared.facts["expert_budget"],
        "slots_per_layer": list(prepared.slots.slots_per_layer),
        "bandwidths": prepared.bandwidths.to_dict(),
        "routed_bytes_per_token": whole.routed_bytes_per_token,
        "belady_bytes_per_token": whole.belady_bytes_per_token,
        "weights_bytes_per_token": whole.weights_bytes_per_token,
        "ideal_tokens_per_s": whole.ideal_tokens_per_s,
        "warnings": _warnings(plan, prepared, results, rows),
    }
    return table, notes


def as_metrics(table: pd.DataFrame, notes: dict[str, Any]) -> dict[str, float]:
    """Return what `summarise` found as metrics, ``SYSTEM/FIGURE``; figures that a system lacks are left out."""
    metrics = {"ideal_tokens_per_s": float(notes["ideal_tokens_per_s"])}
    for row in table.to_dict("records"):
        system = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in row["system"])
        for figure in ("tokens_per_s", "tpot_s", "ttft_s", "load_s", "peak_bytes", "share_of_bound"):
            if pd.notna(row.get(figure)):
                metrics[f"{system}/{figure}"] = float(row[figure])
    return metrics


def _system_row(
    system: System,
    results: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    bounds: dict[int, Roofline],
    resident: dict[str, float],
    prepared: Prepared,
) -> dict[str, Any]:
    mine = [row for row in rows if row["system"] == system.name]
    others = [row for row in results if row["system"] == system.name and row["outcome"] != MEASURED]
    found: dict[str, Any] = {
        "system": system.name,
        "outcome": others[-1]["outcome"] if others else MEASURED if mine else "not run",
        "error": others[-1]["error"] if others else "",
        "processes": len(mine),
        "limited": any(row["limited"] for row in mine + others),
        "description": mine[-1]["description"] if mine else "",
        "decoded_tokens": min((row["decoded_tokens"] for row in mine), default=0),
    }
    for name in FIGURES:
        values = [row[name] for row in mine if row.get(name) is not None]
        found[name] = statistics.median(values) if values else float("nan")
        found[f"{name}_low"], found[f"{name}_high"] = (min(values), max(values)) if values else (float("nan"),) * 2
    if mine:
        bound = bounds[found["decoded_tokens"]]
        found["bound_tokens_per_s"] = bound.bound_tokens_per_s(
            found["read_bytes_per_token"], resident.get(system.adapter)
        )
        found["share_of_bound"] = found["tokens_per_s"] / found["bound_tokens_per_s"]
        found["ideal_tokens_per_s"] = bound.ideal_tokens_per_s
        found |= _read_ratios(found, bound, replayed_loads(prepared, system), prepared.facts["record_bytes"])
    return found


def _read_ratios(row: dict[str, Any], bound: Roofline, loads: np.ndarray | None, record_bytes: int) -> dict[str, float]:
    """Return a system's reads over Belady's, and over those of its own policy replayed (`replay.py`)."""
    read, tokens = row["read_bytes_per_token"], row["decoded_tokens"]
    replayed = float("nan") if loads is None else float(loads[:tokens].sum()) * record_bytes / tokens
    return {
        "reads_over_belady": read / bound.belady_bytes_per_token if bound.belady_bytes_per_token else float("nan"),
        "replay_bytes_per_token": replayed,
        "reads_over_replay": read / replayed if replayed else float("nan"),
    }


def _reference_tokens(measured: list[dict[str, Any]], systems: list[System]) -> list[int] | None:
    """Return the likeliest tokens of an exact system: the engine's reference path, else stock eager, else any."""
    exact = [system.name for system in systems if system.adapter == "emoe" and not system.options.get("tolerance")]
    eager = [system.name for system in systems if system.adapter == "stock"]
    for name in (*eager, *exact):
        for row in measured:
            if row["system"] == name:
                return list(row["likeliest"])
    return None


def _reference_speed(table: pd.DataFrame, reference: str | None) -> float:
    if reference is not None and reference not in set(table["system"]):
        raise OptionError(f"the reference {reference!r} is not among the systems: {', '.join(table['system'])}")
    known = table[table["tokens_per_s"].notna()]
    if reference is not None:
        known = known[known["system"] == reference]
    return float(known["tokens_per_s"].iloc[0]) if len(known) else float("nan")


def _warnings(
    plan: BenchPlan, prepared: Prepared, results: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[str]:
    found = []
    if plan.repeats < LEAST_REPEATS or plan.tokens < 128:
        found.append(f"a trial: figures need at least {LEAST_REPEATS} repeats of 128 tokens")
    if not prepared.bandwidths.disk_direct:
        found.append("the disk was read through the page cache: its bandwidth here may be the memory's")
    busy = busy_warning(max((row["others_cpu_share"] for row in rows), default=None))
    if busy:
        found.append(busy)
    cut = sorted({row["system"] for row in rows if row["decoded_tokens"] < plan.tokens})
    if cut:
        found.append(f"stopped after {plan.max_seconds:g} s, before all {plan.tokens} tokens: {', '.join(cut)}")
    failed = sorted({row["system"] for row in results if row["outcome"] == FAILED})
    if failed:
        found.append(f"failed, and tried again by the same command: {', '.join(failed)}")
    return found
