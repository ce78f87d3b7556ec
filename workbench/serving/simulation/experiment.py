"""One simulated service: a frozen configuration, costs, and what came of it.

Terms
-----
capacity
    Requests a second that one replica could serve with a full batch and nothing to load: the mean prompt and the mean
    answer, each step shared by a full batch. ``load`` is a share of it, so that a configuration means the same for
    every model; a service near 1 is saturated.
unloaded
    A request alone, its experts resident: its prompt's time, then a step of one sequence for each token. Objectives are
    multiples of a task's median: one number for all tasks would make EDF the order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emoe_core.errors import OptionError, require_known
from emoe_core.scheduler import MAX_BYPASSED, BatchLimits, Objective, Request
from emoe_core.scheduler.costs import ServingCosts
from workbench.serving.orders import SCHEDULERS, make_scheduler
from workbench.serving.simulation import request_traces
from workbench.serving.simulation.arrivals import PROCESSES, Arrival, at_rate, draw_arrivals
from workbench.serving.simulation.cluster import Cluster, Progress
from workbench.serving.simulation.residents import Residents
from workbench.serving.simulation.router import ROUTERS
from workbench.serving.simulation.service_metrics import request_table, service_metrics, task_metrics
from workbench.serving.simulation.simulated_engine import SimulatedEngine

LENGTHS = ("profile", "oracle")


@dataclass(frozen=True)
class ServingConfig:
    """Everything a simulated service depends on, but the costs.

    Attributes
    ----------
    scheduler : str
        One of `serving.orders.SCHEDULERS`.
    lengths : str
        What schedulers are told: "profile" (the task's mean) or "oracle" (the truth).
    arrivals : str
        "poisson", "gamma", "azure_conv", "azure_code", "mooncake", "azure" (both, merged), or the path of a trace.
    load : float or None
        Mean rate as a share of all replicas' capacity. None leaves a trace's own rate.
    rate_per_s : float or None
        Mean requests a second; in place of ``load``.
    burstiness : float
        CV of gaps for "gamma".
    n_requests : int
        For a trace: at most so many.
    max_batch, kv_tokens : int
        Limits of each replica; ``kv_tokens`` counts reserved tokens (prompt and output limit).
    max_input_tokens, max_output_tokens : int
        Limits of a request; longer ones of a trace are cut.
    slots : int or None
        Experts a layer; None takes those that the costs were measured with.
    interval, replan
        As in `emoe_core.EngineConfig`.
    replicas : int
    router : str
    affinity_slack : float
        How much busier than the least loaded, as a share of a full batch, a replica may be that fits a task better.
    ttft_factor, tpot_factor : float
        Objectives, as multiples of the unloaded median.
    max_bypassed : int
    trace_folder : str or None
    seed : int
    """

    scheduler: str = "emoe"
    lengths: str = "profile"
    arrivals: str = "poisson"
    load: float | None = 0.7
    rate_per_s: float | None = None
    burstiness: float = 3.0
    n_requests: int = 500
    max_batch: int = 8
    kv_tokens: int = 16384
    max_input_tokens: int = 1024
    max_output_tokens: int = 256
    slots: int | None = None
    interval: int = 40
    replan: str = "admission"
    replicas: int = 1
    router: str = "round_robin"
    affinity_slack: float = 0.0
    ttft_factor: float = 5.0
    tpot_factor: float = 2.0
    max_bypassed: int = MAX_BYPASSED
    trace_folder: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_known(self.scheduler, SCHEDULERS, "scheduler")
        require_known(self.lengths, LENGTHS, "lengths")
        require_known(self.router, ROUTERS, "router")
        if self.n_requests < 2 or self.replicas < 1:
            raise OptionError("n_requests must be 2 or more, and replicas 1 or more")
        if self.load is not None and self.rate_per_s is not None:
            raise OptionError("give load or rate_per_s, not both")
        if self.load is None and self.rate_per_s is None and self.arrivals in PROCESSES:
            raise OptionError(f"{self.arrivals} arrivals need a load or a rate_per_s")
        BatchLimits(self.max_batch, self.kv_tokens)

    def batch(self, costs: ServingCosts) -> int:
        """Return how many requests run at once: one where they cannot share a batch."""
        return 1 if costs.settings.get("one_at_a_time") else self.max_batch


@dataclass(frozen=True)
class ServingResult:
    """One row a request, metrics of the run, and metrics of each task."""

    config: ServingConfig
    requests: pd.DataFrame
    metrics: dict[str, float]
    tasks: pd.DataFrame


def simulate_serving(
    config: ServingConfig,
    costs: ServingCosts,
    arrivals: Sequence[Arrival] | None = None,
    progress: Progress | None = None,
) -> ServingResult:
    """Simulate a service.

    Parameters
    ----------
    config : ServingConfig
    costs : ServingCosts
    arrivals : sequence of Arrival, optional
        In order of arrival; those of the configuration if not given.
    progress : callable, optional
        Called with (stage, done, total).
    """
    if not costs.tasks:
        raise OptionError("these costs describe no task: measure them with `emoe model costs MODEL`")
    coming = make_arrivals(config, costs) if arrivals is None else list(arrivals)
    promised = objectives(coming, costs, config.ttft_factor, config.tpot_factor)
    replicas = [make_replica(config, costs, place) for place in range(config.replicas)]
    cluster = Cluster(replicas, config.router, config.affinity_slack)
    served = cluster.run([make_request(config, costs, promised, one) for one in coming], progress)
    table = request_table(served)
    metrics = service_metrics(table)
    metrics["rate_per_s"] = (len(coming) - 1) / (coming[-1].arrival_s - coming[0].arrival_s)
    metrics["capacity_per_s"] = config.replicas * capacity_per_s(coming, costs, config.batch(costs))
    kept = [replica.residents for replica in cluster.replicas if replica.residents is not None]
    metrics |= {
        "predictions": float(sum(one.predictions for one in kept)),
        "swaps": float(sum(one.swaps for one in kept)),
        "expert_loads": float(sum(one.loads for one in kept)),
        "loading_s": sum(replica.loading_s for replica in cluster.replicas),
        "busy_share": sum(replica.busy_s for replica in cluster.replicas) / (config.replicas * metrics["span_s"]),
        "steps": float(sum(replica.steps for replica in cluster.replicas)),
    }
    return ServingResult(config, table, metrics, task_metrics(table))


def make_arrivals(config: ServingConfig, costs: ServingCosts) -> list[Arrival]:
    """Return the requests of a configuration, in order of arrival.

    Raises
    ------
    DataError
        When a trace is not there; the message says where to put which file.
    """
    if config.arrivals in PROCESSES:
        cv = config.burstiness if config.arrivals == "gamma" else 1.0
        drawn = draw_arrivals(costs.tasks, config.n_requests, 1.0, burstiness=cv, seed=config.seed)
    else:
        names = ("azure_conv", "azure_code") if config.arrivals == "azure" else (config.arrivals,)
        traces = [
            request_traces.read_trace(
                request_traces.trace_path(name, config.trace_folder),
                sorted(costs.tasks),
                max_input_tokens=config.max_input_tokens,
                max_output_tokens=config.max_output_tokens,
                seed=config.seed,
            )
            for name in names
        ]
        drawn = request_traces.merge(traces).arrivals[: config.n_requests]
    if config.rate_per_s is not None:
        return at_rate(drawn, config.rate_per_s)
    if config.load is None:
        return drawn
    return at_rate(drawn, config.load * config.replicas * capacity_per_s(drawn, costs, config.batch(costs)))


def cut_arrivals(config: ServingConfig, costs: ServingCosts) -> list[Arrival]:
    """Return Poisson arrivals at a configuration's load, whose prompts and answers are cut to its limits."""
    assert config.load is not None
    drawn = [
        replace(
            one,
            input_tokens=min(one.input_tokens, config.max_input_tokens),
            output_tokens=min(one.output_tokens, config.max_output_tokens),
        )
        for one in draw_arrivals(costs.tasks, config.n_requests, 1.0, seed=config.seed)
    ]
    return at_rate(drawn, config.load * config.replicas * capacity_per_s(drawn, costs, config.batch(costs)))


def capacity_per_s(arrivals: Sequence[Arrival], costs: ServingCosts, max_batch: int) -> float:
    """Return the requests a second that one replica could serve with a full batch and nothing to load."""
    step_s = float(costs.step_table_s(max_batch)[max_batch]) / max_batch
    prompts = np.mean([costs.prefill_s(one.input_tokens) for one in arrivals])
    return float(1.0 / (prompts + np.mean([one.output_tokens - 1 for one in arrivals]) * step_s))


def objectives(
    arrivals: Sequence[Arrival], costs: ServingCosts, ttft_factor: float, tpot_factor: float
) -> dict[str, Objective]:
    """Return each task's objectives: multiples of its unloaded medians."""
    single_s = float(costs.step_table_s(1)[1])
    inputs: dict[str, list[int]] = {}
    for one in arrivals:
        inputs.setdefault(one.task, []).append(one.input_tokens)
    return {
        task: Objective(
            ttft_factor * float(np.median([costs.prefill_s(count) for count in counts])), tpot_factor * single_s
        )
        for task, counts in inputs.items()
    }


def make_request(
    config: ServingConfig, costs: ServingCosts, promised: Mapping[str, Objective], one: Arrival
) -> tuple[Request, int]:
    """Return an arrival as a scheduler sees it, and its true output length."""
    given = min(one.output_tokens, config.max_output_tokens)
    told = float(given) if config.lengths == "oracle" else costs.tasks[one.task].expected_output_tokens
    request = Request(
        one.task, one.input_tokens, one.number, one.arrival_s, config.max_output_tokens, told, promised[one.task]
    )
    return request, given


def make_replica(config: ServingConfig, costs: ServingCosts, place: int = 0) -> SimulatedEngine:
    """Return an engine of a configuration, nothing resident yet."""
    experts = len(next(iter(costs.tasks.values())).shares[0])
    capacity = costs.slots_per_layer if config.slots is None else (config.slots,) * len(costs.slots_per_layer)
    if not all(1 <= count <= experts for count in capacity):
        raise OptionError(f"slots must be 1 to {experts} experts a layer")
    residents = Residents(
        {task: load.shares for task, load in costs.tasks.items()},
        capacity,
        {task: load.expected_output_tokens for task, load in costs.tasks.items()},
        config.interval,
        config.replan,
    )
    scheduler = make_scheduler(config.scheduler, costs, config.max_bypassed)
    return SimulatedEngine(costs, scheduler, BatchLimits(config.batch(costs), config.kv_tokens), residents, place)


def as_params(config: ServingConfig) -> dict[str, Any]:
    """Return the configuration as flat parameters for a tracker; a folder is the machine's and left out."""
    return {name: value for name, value in asdict(config).items() if name != "trace_folder"}


def known_trace_folder(folder: str | Path | None) -> str | None:
    """Return a folder given by a notebook or a command, where an empty text stands for the cache."""
    return str(folder) if folder else None
