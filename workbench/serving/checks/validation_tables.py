"""Everything that says how far a simulation can be trusted, and how far it goes, measured at once, as tables."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from workbench.serving.checks.validation import Progress, ValidationConfig, validate
from workbench.serving.costs.measure import costs_of
from workbench.serving.simulation.experiment import ServingConfig
from workbench.serving.simulation.scale import scale_up
from workbench.tracking.findings import Findings


def measure_validation(
    model: str,
    config: ValidationConfig,
    replicas: Sequence[int],
    scale_load: float,
    scale_requests: int,
    progress: Progress,
) -> Findings:
    """Serve requests twice, and simulate the first scheduler on ever more replicas.

    Parameters
    ----------
    model : str
        By the name under which its costs are stored.
    config : ValidationConfig
    replicas : sequence of int
        Sizes of the simulated clusters.
    scale_load : float
        Their load, as a share of capacity.
    scale_requests : int
        Requests for each replica.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Findings
        ``requests``, ``validation`` and ``parts`` (of a `Validation`), ``machine`` (one row: how busy others kept it)
        and ``scale`` (`scale_up`).
    """
    found = validate(config, costs_of(model, progress), progress)
    base = ServingConfig(scheduler=config.schedulers[0], max_batch=config.max_batch, seed=config.seed)
    tables = {
        "requests": found.requests,
        "validation": found.table,
        "parts": found.parts,
        "machine": pd.DataFrame([{"others_cpu_share": found.others_cpu_share}]),
        "scale": scale_up(base, found.costs, replicas, scale_load, scale_requests, progress),
    }
    return Findings(tables, {"model_hash": found.costs.model_hash, "seed": config.seed}, config.n_requests)
