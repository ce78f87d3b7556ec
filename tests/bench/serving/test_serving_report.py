"""Promises of comparisons and tables of simulated services, and of the costs that come with the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from serving_bench import make_costs

from emoe_core.errors import OptionError
from emoe_core.planning.tasks import TASK_TYPES, Profile
from emoe_core.scheduler.costs import ServingCosts
from workbench.models.reference import RECIPES
from workbench.paper import scheduling as report
from workbench.serving.simulation.comparison import (
    VARIANTS,
    bounds,
    compare_routers,
    compare_schedulers,
    gains,
    load_at_attainment,
    reachable_loads,
    variant,
)
from workbench.serving.simulation.experiment import ServingConfig, simulate_serving

BASE = ServingConfig(n_requests=60)
COSTS = make_costs(steps={1: 1.0, 8: 2.0}, expert_load_s=0.1)


@pytest.fixture(scope="module")
def compared() -> pd.DataFrame:
    return compare_schedulers(BASE, COSTS, list(VARIANTS), [0.3, 0.8])[0]


def test_every_variant_serves_the_same_requests(compared: pd.DataFrame) -> None:
    assert len(compared) == 2 * len(VARIANTS)
    assert (compared["requests"] == 60).all()
    assert compared.groupby("load")["rate_per_s"].nunique().tolist() == [1, 1]
    alone = simulate_serving(replace(variant(BASE, "edf"), load=0.8), COSTS).metrics
    row = compared[(compared["variant"] == "edf") & (compared["load"] == 0.8)].iloc[0]
    assert row["latency_mean_s"] == alone["latency_mean_s"]


def test_gains_are_relative_to_the_baseline_at_the_same_load(compared: pd.DataFrame) -> None:
    gained = gains(compared)
    own = gained[gained["label"] == "FCFS"]
    assert own["latency_change"].tolist() == [0.0, 0.0] and own["goodput_ratio"].tolist() == [1.0, 1.0]
    picked = compared[compared["load"] == 0.8].set_index("variant")["latency_mean_s"]
    emoe = gained[(gained["label"] == "eMoE") & (gained["load"] == 0.8)].iloc[0]
    assert emoe["latency_change"] == pytest.approx(picked["emoe"] / picked["fcfs"] - 1)
    with pytest.raises(OptionError, match="add it"):
        gains(compared[compared["variant"] != "fcfs"])


def test_the_reference_load_is_where_attainment_falls_below_the_share() -> None:
    fcfs = variant(replace(BASE, n_requests=200), "fcfs")
    load = load_at_attainment(fcfs, COSTS, 0.9)
    assert simulate_serving(replace(fcfs, load=load), COSTS).metrics["attainment_share"] >= 0.9
    assert simulate_serving(replace(fcfs, load=3 * load), COSTS).metrics["attainment_share"] < 0.9
    with pytest.raises(OptionError, match="between 0 and 1"):
        load_at_attainment(fcfs, COSTS, 1.0)


def test_no_variant_gains_more_than_the_bounds(compared: pd.DataFrame) -> None:
    for load, gained in gains(compared).groupby("load"):
        bound = bounds(simulate_serving(replace(variant(BASE, "fcfs"), load=load), COSTS), COSTS)
        assert (gained["latency_change"] >= bound["latency_change"]).all()
        # Goodput counts until the last completion, which a scheduler may bring forward a little.
        assert (gained["goodput_ratio"].dropna() <= 1.1 * bound["goodput_ratio"]).all()


def test_a_reachable_load_is_where_the_variant_itself_falls_below_the_share() -> None:
    base = replace(BASE, n_requests=100)
    reachable = reachable_loads(base, COSTS, ["emoe"]).set_index("variant")
    assert reachable.loc["fcfs", "ratio"] == 1 and list(reachable.index) == ["fcfs", "emoe"]
    assert reachable.loc["emoe", "load"] == load_at_attainment(variant(base, "emoe"), COSTS)


def test_closing_tables_state_this_runs_figures(compared: pd.DataFrame) -> None:
    gained = gains(compared)
    reachable = pd.DataFrame({"label": ["FCFS", "eMoE"], "load": [0.2, 0.3], "ratio": [1.0, 1.5]})
    reference = pd.Series({"load": 0.8, "latency_change": -0.9, "goodput_ratio": 2.0})
    closing = report.schedulers_beside_paper(gained, reachable, reference)
    assert "eMoE 0.30 (1.50x)" in closing["here"].iloc[2]
    assert closing.columns.tolist() == ["what", "paper", "here", "why they differ"]
    emoe = gained[(gained["label"] == "eMoE") & (gained["load"] == 0.8)].iloc[0]
    assert f"{emoe['latency_change']:+.1%}" in closing.iloc[0]["here"]
    assert closing["what"].str.contains("oracle|true output").sum() == 1 and len(closing) == 6
    routed, _ = compare_routers(replace(BASE, replicas=2), COSTS, ["round_robin", "least_loaded", "affinity"], [0.5])
    table = report.routers_beside_paper(routed)
    assert table["what"].tolist() == [
        "least_loaded at load 0.50, against round robin",
        "affinity at load 0.50, against round robin",
    ]


def test_figures_show_every_line(compared: pd.DataFrame) -> None:
    figure = report.service_figure(compared, reference_load=0.4)
    assert [len(axis.get_lines()) for axis in figure.axes] == [len(VARIANTS) + 1] * 3
    assert set(report.FIRST) - set(compared.columns) == {"router"}


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown variant 'lottery'"):
        variant(BASE, "lottery")


def test_the_embedded_models_costs_belong_to_it_and_say_how_busy_the_machine_was() -> None:
    costs = ServingCosts.load(RECIPES / "upcycled" / "costs.json")
    costs.require_model(Profile.load(RECIPES / "upcycled" / "profile.json").model_hash)
    assert set(costs.tasks) == set(TASK_TYPES)
    assert costs.settings["budget"] in report.caveat(costs)
    assert f"{sum(costs.slots_per_layer)} in 30 layers, here 90 in 30 layers" in report.caveat(costs, 3)
    busy = replace(costs, environment={"others_cpu_share": 0.5})
    assert "unreliable" in report.caveat(busy) and "unreliable" not in report.caveat(replace(costs, environment={}))
