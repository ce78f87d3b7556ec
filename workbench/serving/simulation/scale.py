"""How far the simulation goes: one service on ever more replicas, and how long simulating it takes.

Bounds stand beside each cluster. ``alone_s``: mean latency of the same requests if each had an engine to itself, every
expert resident; queueing, sharing and loading only add to it. ``capacity_per_s``: full batches on all replicas, nothing
to load.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from emoe_core.errors import OptionError
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.simulation.cluster import Progress
from workbench.serving.simulation.experiment import ServingConfig, simulate_serving

KEPT = ("rate_per_s", "capacity_per_s", "throughput_per_s", "latency_mean_s", "latency_p99_s", "attainment_share")


def scale_up(
    base: ServingConfig,
    costs: ServingCosts,
    replicas: Sequence[int],
    load: float,
    requests_each: int,
    progress: Progress | None = None,
    router: str = "least_loaded",
) -> pd.DataFrame:
    """Simulate a service on several sizes of cluster, at the same load of each replica.

    Parameters
    ----------
    base : ServingConfig
    costs : ServingCosts
    replicas : sequence of int
    load : float
        Share of capacity.
    requests_each : int
        Requests for each replica.
    progress : callable, optional
        Called with (stage, done, total).
    router : str

    Returns
    -------
    DataFrame
        One row a size: ``replicas, requests``, arrivals a second, metrics, the bounds, ``wall_s`` of simulating on this
        machine, and ``simulated_per_wall_s``: requests simulated in a second of it.
    """
    if requests_each < 1 or not replicas:
        raise OptionError("scaling needs at least one size of cluster and one request for each replica")
    rows = []
    for count in replicas:
        config = replace(
            base, replicas=count, router=router, load=load, rate_per_s=None, n_requests=max(2, count * requests_each)
        )
        started = time.perf_counter()
        result = simulate_serving(config, costs, progress=_named(progress, f"{count} replicas"))
        wall_s = time.perf_counter() - started
        served = result.requests
        single_s = float(costs.step_table_s(1)[1])
        alone_s = np.mean([costs.prefill_s(size) for size in served["input_tokens"]])
        rows.append(
            {"replicas": count, "requests": len(served)}
            | {name: result.metrics[name] for name in KEPT}
            | {
                "alone_s": float(alone_s + single_s * (served["output_tokens"] - 1).mean()),
                "wall_s": wall_s,
                "simulated_per_wall_s": len(served) / wall_s,
            }
        )
    return pd.DataFrame(rows)


def _named(progress: Progress | None, stage: str) -> Progress | None:
    return None if progress is None else lambda _, done, total: progress(stage, done, total)
