"""Operating points of runs: what a configuration saves in memory beside what it costs in quality and in time.

A point comes from a run's metrics, or from one row of the table ``summary`` of a notebook that compares several
configurations. The *bounds* are points too: everything resident, experts on demand by LRU, a random subset, and
the oracle, which knows every prompt to come. A point is *on the front* when no other point that a system could choose
is at least as good in memory, quality and time and better in one; unknown times are left out of the judgement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from emoe_core.experts.rerouting import DROP, REROUTE
from workbench.paper.memory import expert_memory_share
from workbench.quality.configuration import ORACLE
from workbench.tracking.store import decode

if TYPE_CHECKING:
    from workbench.tracking.record import RunRecord

ALL_RESIDENT, ON_DEMAND, RANDOM = "all resident", "LRU on demand", "random subset"
BOUNDS = (ALL_RESIDENT, ON_DEMAND, RANDOM, ORACLE)
COLUMNS = (
    *("notebook", "run_id", "run_name", "model", "mix", "configuration", "strategy", "budget", "tolerance", "interval"),
    *("bound", "memory_share", "memory_ratio", "measured_bytes", "stock_bytes"),
    *("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high", "kl_nats", "top1_agreement", "prompts"),
    *("tpot_ratio", "ttft_ratio", "others_cpu_share", "on_front"),
)
OBJECTIVES = ("memory_share", "perplexity_ratio", "tpot_ratio")
NAMES = {
    "frequency": "decayed frequency",
    "activation_map": "activation map",
    "q8_0": "8-bit experts",
    "q4_0": "4-bit experts",
}


def points_of(record: RunRecord) -> pd.DataFrame:
    """Return the operating points of one run, columns `COLUMNS`; empty where it lacks memory or quality."""
    summary = record.table("summary")
    if summary is None or not {"strategy", "perplexity_ratio"} <= set(summary.columns):
        if not {"perplexity_ratio", "slot_share"} <= set(record.metrics):
            return pd.DataFrame(columns=list(COLUMNS))
        summary = pd.DataFrame([{**record.params, **record.metrics}])
    rows = summary.assign(memory_share=expert_memory_share(summary)).to_dict("records")
    found = [_point(record, row) for row in rows]
    return pd.DataFrame([row for row in found if np.isfinite(row["memory_share"])], columns=list(COLUMNS))


def judge(points: pd.DataFrame) -> pd.DataFrame:
    """Return comparable points (of one model and stream) with ``on_front`` filled in."""
    values = points[list(OBJECTIVES)].astype(float).to_numpy()
    eligible = ~points["bound"].isin([ORACLE, RANDOM]).to_numpy()
    on_front = [bool(eligible[place]) and not _beaten(values, eligible, place) for place in range(len(points))]
    return points.assign(on_front=on_front)


def bound_of(strategy: str, tolerance: float, memory_share: float, kind: str = "auto") -> str:
    """Return which bound a configuration is, an empty text when it is none."""
    if (memory_share >= 1 and strategy not in NAMES) or (memory_share >= 1 and kind == "auto"):
        return ALL_RESIDENT
    if strategy == "lru" and tolerance == 0:
        return ON_DEMAND
    return {ORACLE: ORACLE, "random": RANDOM}.get(strategy, "")


def label_of(strategy: str, tolerance: float, bound: str, on_miss: str = REROUTE) -> str:
    """Return a configuration's series as legends call it."""
    if bound:
        return bound
    dropped = ", absent dropped" if on_miss == DROP else ""
    exact = "" if strategy.startswith("q") else ", exact" if tolerance == 0 else dropped
    return f"{NAMES.get(strategy, strategy.replace('_', ' '))}{exact}"


def _point(record: RunRecord, row: dict[str, Any]) -> dict[str, Any]:
    strategy, tolerance = str(row.get("strategy", "?")), float(row.get("tolerance") or 0.0)
    share = float(row["memory_share"])
    bound = bound_of(strategy, tolerance, share, str(row.get("expert_dtype", "auto")))
    kept = {name: row[name] for name in COLUMNS if name in row and name not in ("bound", "on_front")}
    interval = row.get("interval")
    return kept | {
        "notebook": record.notebook_name,
        "run_id": record.run_id,
        "run_name": record.name,
        "model": str(row.get("model") or record.params.get("model", "?")),
        "mix": str(row.get("mix") or record.params.get("mix", "?")),
        "configuration": label_of(strategy, tolerance, bound, str(row.get("on_miss", REROUTE))),
        "strategy": strategy,
        "budget": "" if row.get("budget") is None or row["budget"] != row["budget"] else str(row["budget"]),
        "tolerance": tolerance,
        "interval": "" if interval is None else str(decode(str(interval))),
        "bound": bound,
        "memory_share": share,
        "measured_bytes": row.get("fresh_serving_bytes"),
        "stock_bytes": row.get("stock_serving_bytes"),
    }


def _beaten(values: np.ndarray, eligible: np.ndarray, place: int) -> bool:
    own = values[place]
    for other in np.flatnonzero(eligible):
        both = np.isfinite(own) & np.isfinite(values[other])
        # Who is not timed cannot be said to be beaten by one that is, nor the other way round.
        if other == place or bool((np.isfinite(own) != np.isfinite(values[other])).any()):
            continue
        if bool((values[other][both] <= own[both]).all()) and bool((values[other][both] < own[both]).any()):
            return True
    return False
