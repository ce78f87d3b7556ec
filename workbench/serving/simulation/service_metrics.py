"""How well requests were served: latencies, objectives met, goodput.

Terms
-----
TTFT
    Arrival to first token: waiting, loading and the prompt. Seconds.
TPOT
    Mean time of each further output token; none for an answer of one token.
end-to-end
    Arrival to last token.
attainment
    Share of requests that met both objectives: TTFT, and TPOT where there is one.
goodput
    Requests a second that met their objectives, from the first arrival to the last completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from workbench.serving.simulation.simulated_engine import Served

PERCENTILES = (50, 90, 99)


def request_table(served: Sequence[Served]) -> pd.DataFrame:
    """Return one row a request: its record, ``wait_s, ttft_s, tpot_s, latency_s``, and if objectives were ``met``."""
    table = pd.DataFrame([asdict(record) for record in served])
    table["wait_s"] = table["admitted_s"] - table["arrival_s"]
    table["ttft_s"] = table["first_token_s"] - table["arrival_s"]
    further = table["output_tokens"] - 1
    table["tpot_s"] = (table["finished_s"] - table["first_token_s"]) / further.where(further > 0)
    table["latency_s"] = table["finished_s"] - table["arrival_s"]
    table["met_ttft"] = table["ttft_s"] <= table["ttft_objective_s"]
    # Rounding of a sum of steps must not decide.
    table["met_tpot"] = table["tpot_s"].isna() | (table["tpot_s"] <= table["tpot_objective_s"] * (1 + 1e-9))
    table["met"] = table["met_ttft"] & table["met_tpot"]
    return table


def service_metrics(requests: pd.DataFrame) -> dict[str, float]:
    """Return the metrics of a run, names with units."""
    span_s = float(requests["finished_s"].max() - requests["arrival_s"].min())
    metrics = {
        "requests": float(len(requests)),
        "span_s": span_s,
        "throughput_per_s": len(requests) / span_s,
        "output_tokens_per_s": float(requests["output_tokens"].sum()) / span_s,
        "attainment_share": float(requests["met"].mean()),
        "ttft_attainment_share": float(requests["met_ttft"].mean()),
        "tpot_attainment_share": float(requests["met_tpot"].mean()),
        "goodput_per_s": float(requests["met"].sum()) / span_s,
        "held_mass": float(requests["held_mass"].mean()),
    }
    for name in ("ttft_s", "tpot_s", "latency_s"):
        values = requests[name].dropna().to_numpy()
        stem = name.removesuffix("_s")
        if len(values):
            metrics[f"{stem}_mean_s"] = float(values.mean())
            metrics |= {f"{stem}_p{q}_s": float(np.percentile(values, q)) for q in PERCENTILES}
    return metrics


def task_metrics(requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row a task: requests, attainment, held mass, mean and P90 of TTFT, TPOT and end-to-end latency."""
    rows = []
    for task, group in requests.groupby("task"):
        found = service_metrics(group)
        kept = ["requests", "attainment_share", "held_mass"]
        kept += [f"{stem}_{what}_s" for stem in ("ttft", "tpot", "latency") for what in ("mean", "p90")]
        rows.append({"task": task} | {name: found.get(name, float("nan")) for name in kept})
    return pd.DataFrame(rows)
