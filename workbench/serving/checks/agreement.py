"""How far simulated requests agree with real ones, by metric and by kind of pass. Nothing here serves or simulates."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from emoe_core.scheduler.costs import ServingCosts
from emoe_core.serving.records import Pass
from workbench.serving.simulation.service_metrics import service_metrics

AIM = 0.15
DRIVERS = ("real", "simulated", "refitted")
COMPARED = ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "span_s")


def compare(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics of both drivers beside each other, and simulated over real, for every scheduler."""
    rows = []
    for scheduler, group in requests.groupby("scheduler", sort=False):
        found = {driver: service_metrics(part) for driver, part in group.groupby("driver")}
        for metric in COMPARED:
            real, simulated, refitted = (found[driver][metric] for driver in DRIVERS)
            rows.append((scheduler, metric, real, simulated, simulated / real, refitted, refitted / real))
    return pd.DataFrame(
        rows, columns=["scheduler", "metric", "real", "simulated", "ratio", "refitted", "refitted_ratio"]
    )


def parts_of(passes: Sequence[Pass], costs: ServingCosts) -> pd.DataFrame:
    """Return what prompts and steps took, and what the costs say of the same ones."""
    steps_s = costs.step_table_s(max(one.size for one in passes))
    rows = []
    for name, kind in (("prompts", True), ("steps", False)):
        own = [one for one in passes if one.is_prompt is kind]
        real_s = sum(one.seconds for one in own)
        modelled_s = sum(costs.prefill_s(one.size) if kind else float(steps_s[one.size]) for one in own)
        rows.append({"passes": name, "count": len(own), "real_s": real_s, "modelled_s": modelled_s})
    return pd.DataFrame(rows).assign(ratio=lambda table: table["modelled_s"] / table["real_s"])
