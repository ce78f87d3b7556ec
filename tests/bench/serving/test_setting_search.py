"""The search for where Algorithm 1 helps and where it hurts."""

from __future__ import annotations

import numpy as np

from workbench.serving.costs.measure import stored_costs
from workbench.serving.simulation.experiment import ServingConfig
from workbench.serving.simulation.search import SETTING, draw_settings, search_settings

BASE = ServingConfig(n_requests=40, seed=3)


def test_a_seed_draws_the_same_settings_and_a_longer_search_goes_on_from_a_shorter_one() -> None:
    assert draw_settings(BASE, 4) == draw_settings(BASE, 9)[:4]
    assert draw_settings(BASE, 4) != draw_settings(ServingConfig(n_requests=40, seed=4), 4)


def test_a_search_tells_both_schedulers_on_the_same_requests_best_first() -> None:
    costs = stored_costs("reference")
    found = search_settings(BASE, costs, 3)
    assert found["latency_change"].is_monotonic_increasing
    assert {tuple(row) for row in found[list(SETTING)].to_numpy()} == {
        tuple(float(getattr(setting, name)) for name in SETTING) for setting in draw_settings(BASE, 3)
    }
    change = found["emoe_latency_mean_s"] / found["fcfs_latency_mean_s"] - 1
    assert np.allclose(change, found["latency_change"])
