"""Schedulers on one engine and routers before several, on the same requests, as tables; if wanted, served for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.checks.throughput import ThroughputConfig, measure_throughput, summary
from workbench.serving.simulation.cluster import Progress
from workbench.serving.simulation.comparison import (
    bounds,
    compare_routers,
    compare_schedulers,
    gains,
    load_at_attainment,
    reachable_loads,
    variant,
)
from workbench.serving.simulation.experiment import ServingConfig, ServingResult
from workbench.serving.simulation.search import search_settings
from workbench.tracking.findings import Findings

BASELINE = "fcfs"
# Of objectives, that order of arrival still meets at the reference load.
ATTAINED = 0.9


def compare_services(
    base: ServingConfig,
    costs: ServingCosts,
    variants: Sequence[str],
    loads: Sequence[float],
    *,
    cluster: ServingConfig,
    routers: Sequence[str] = (),
    searched: int = 0,
    throughput: ThroughputConfig | None = None,
    progress: Progress,
) -> Findings:
    """Simulate every scheduler at every load and at the reference load, and every router at every load.

    Parameters
    ----------
    base : ServingConfig
        One engine.
    costs : ServingCosts
    variants : sequence of str
        Of `simulation.comparison.VARIANTS`; order of arrival is always among them.
    loads : sequence of float
        Shares of capacity.
    cluster : ServingConfig
        Several engines, before which routers are compared.
    routers : sequence of str
    searched : int
        Random settings at which to look for where Algorithm 1 helps and where it hurts; 0: none.
    throughput : ThroughputConfig, optional
        What to serve for real.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Findings
        ``services``, ``gains``, ``reachable`` (see `simulation.comparison`), ``reference`` (one row: the reference
        load, and what no scheduler can gain more than there) and ``tasks`` (of the last variant there);
        ``routed`` and ``placed`` (requests by router, load, task and replica); ``searched`` (`search_settings`);
        ``throughput`` and its ``rounds``.
    """
    names = list(dict.fromkeys([BASELINE, *variants]))
    reference_load = load_at_attainment(variant(base, BASELINE), costs, ATTAINED, progress)
    services, results = compare_schedulers(base, costs, names, sorted({*loads, reference_load}), progress)
    bound = bounds(results[BASELINE, reference_load], costs)
    tables = {
        "services": services,
        "gains": gains(services, BASELINE),
        "reachable": reachable_loads(base, costs, names, ATTAINED, progress, BASELINE),
        "reference": pd.DataFrame([{"load": reference_load, **bound}]),
        "tasks": results[names[-1], reference_load].tasks,
    }
    if routers:
        tables["routed"], placed = compare_routers(cluster, costs, routers, loads, progress)
        tables["placed"] = _placed(placed)
    if searched:
        tables["searched"] = search_settings(base, costs, searched, progress)
    if throughput is not None:
        tables["rounds"] = measure_throughput(throughput, progress)
        tables["throughput"] = summary(tables["rounds"])
    return Findings(tables, {"model_hash": costs.model_hash, "seed": base.seed}, int(services["requests"].max()))


def _placed(results: Mapping[tuple[str, float], ServingResult]) -> pd.DataFrame:
    parts = [
        result.requests.value_counts(["task", "replica"]).reset_index(name="requests").assign(router=name, load=load)
        for (name, load), result in results.items()
    ]
    return pd.concat(parts, ignore_index=True)
