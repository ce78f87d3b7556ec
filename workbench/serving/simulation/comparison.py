"""Several services on the same requests: schedulers over rates, routers over replicas.

Terms
-----
variant
    A scheduler and what it is told of lengths, under a name for people.
reference load
    The load at which order of arrival still meets a given share of objectives: where schedulers are compared.
reachable load
    The same of any variant: the load up to which it meets the share, goodput as DistServe (OSDI 2024) defines it.
    At the reference load itself nobody can have more than 1 / share of the goodput of order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from emoe_core.errors import OptionError, require_known
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.simulation.cluster import Progress
from workbench.serving.simulation.experiment import ServingConfig, ServingResult, simulate_serving

VARIANTS = {
    "fcfs": ("FCFS", "fcfs", "profile"),
    "edf": ("EDF", "edf", "profile"),
    "shortest": ("shortest expected first", "shortest", "profile"),
    "affine": ("task-affine", "affine", "profile"),
    "emoe": ("eMoE", "emoe", "profile"),
    "emoe_no_loading": ("eMoE, dE = 0", "emoe_no_loading", "profile"),
    "emoe_oracle": ("eMoE, oracle lengths", "emoe", "oracle"),
    "shortest_oracle": ("shortest, oracle lengths", "shortest", "oracle"),
}
HALVINGS = 9


def variant(base: ServingConfig, name: str) -> ServingConfig:
    """Return a configuration under another variant; `OptionError` when there is none of the name."""
    require_known(name, VARIANTS, "variant")
    _, scheduler, lengths = VARIANTS[name]
    return replace(base, scheduler=scheduler, lengths=lengths)


def compare_schedulers(
    base: ServingConfig,
    costs: ServingCosts,
    names: Sequence[str],
    loads: Sequence[float],
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[str, float], ServingResult]]:
    """Simulate every variant at every load, all on the same requests.

    Returns
    -------
    DataFrame
        One row a run: ``variant, label, load`` and the metrics.
    dict
        The results by (variant, load).
    """
    configs = {(name, load): replace(variant(base, name), load=load) for load in loads for name in names}
    found = _simulate_all(configs, costs, progress)
    rows = [
        {"variant": name, "label": VARIANTS[name][0], "load": load} | result.metrics
        for (name, load), result in found.items()
    ]
    return pd.DataFrame(rows), found


def compare_routers(
    base: ServingConfig,
    costs: ServingCosts,
    routers: Sequence[str],
    loads: Sequence[float],
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[str, float], ServingResult]]:
    """Simulate every router at every load, as `compare_schedulers`; rows have ``router`` and ``load``."""
    configs = {(router, load): replace(base, router=router, load=load) for load in loads for router in routers}
    found = _simulate_all(configs, costs, progress)
    rows = [{"router": router, "load": load} | result.metrics for (router, load), result in found.items()]
    return pd.DataFrame(rows), found


def _simulate_all(
    configs: Mapping[tuple[str, float], ServingConfig], costs: ServingCosts, progress: Progress | None
) -> dict[tuple[str, float], ServingResult]:
    found = {}
    for place, (key, config) in enumerate(configs.items()):
        found[key] = simulate_serving(config, costs)
        if progress is not None:
            progress("services", place + 1, len(configs))
    return found


def load_at_attainment(
    base: ServingConfig, costs: ServingCosts, share: float = 0.9, progress: Progress | None = None
) -> float:
    """Return the largest load at which a configuration meets a share of objectives, by halving 0.02..1.5.

    Attainment falls with the load but for chance; 0.02 comes back where even that is too much.
    """
    if not 0 < share < 1:
        raise OptionError(f"a share of {share} of objectives cannot be aimed at; give one between 0 and 1")
    low, high = 0.02, 1.5
    attained = partial(_attainment, base, costs)
    for step in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if attained(middle) >= share else (low, middle)
        if progress is not None:
            progress("reference load", step + 1, HALVINGS)
    return low


def reachable_loads(
    base: ServingConfig,
    costs: ServingCosts,
    names: Sequence[str],
    share: float = 0.9,
    progress: Progress | None = None,
    baseline: str = "fcfs",
) -> pd.DataFrame:
    """Return the load up to which each variant meets a share of objectives: ``variant, label, load, ratio``.

    ``ratio`` is over the baseline's, which is simulated too where it is not named.
    """
    found = {}
    for place, name in enumerate(dict.fromkeys([baseline, *names])):
        found[name] = load_at_attainment(variant(base, name), costs, share)
        if progress is not None:
            progress("reachable loads", place + 1, len({baseline, *names}))
    rows = [
        {"variant": name, "label": VARIANTS[name][0], "load": load, "ratio": load / found[baseline]}
        for name, load in found.items()
    ]
    return pd.DataFrame(rows)


def bounds(result: ServingResult, costs: ServingCosts) -> dict[str, float]:
    """Return what no scheduler can gain more than on a result: ``latency_change`` and ``goodput_ratio``, as in `gains`.

    Mean latency is at least that of the same requests, each alone with its experts resident; and no more requests can
    meet their objectives than there are.
    """
    served = result.requests
    step_s = float(costs.step_table_s(1)[1])
    alone_s = [costs.prefill_s(size) for size in served["input_tokens"]] + step_s * (served["output_tokens"] - 1)
    attained = result.metrics["attainment_share"]
    return {
        "latency_change": float(alone_s.mean() / result.metrics["latency_mean_s"] - 1),
        "goodput_ratio": 1 / attained if attained else float("inf"),
    }


def gains(table: pd.DataFrame, baseline: str = "fcfs") -> pd.DataFrame:
    """Return what each variant gains on a baseline at each load.

    Returns
    -------
    DataFrame
        ``label, load, latency_change, ttft_change, goodput_ratio, attainment_share, held_mass``; changes are relative
        (-0.17: 17% less).
    """
    rows = []
    for load, group in table.groupby("load"):
        ground = group[group["variant"] == baseline]
        if ground.empty:
            raise OptionError(f"the baseline {baseline!r} is not among the variants: add it")
        base = ground.iloc[0]
        for row in group.to_dict("records"):
            rows.append(
                {
                    "label": row["label"],
                    "load": load,
                    "latency_change": row["latency_mean_s"] / base["latency_mean_s"] - 1,
                    "ttft_change": row["ttft_mean_s"] / base["ttft_mean_s"] - 1,
                    "goodput_ratio": row["goodput_per_s"] / base["goodput_per_s"] if base["goodput_per_s"] else None,
                    "attainment_share": row["attainment_share"],
                    "held_mass": row["held_mass"],
                }
            )
    return pd.DataFrame(rows)


def _attainment(base: ServingConfig, costs: ServingCosts, load: float) -> float:
    return simulate_serving(replace(base, load=load), costs).metrics["attainment_share"]
