"""Promises of the validation: the same requests through both drivers, and simulated clusters within their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest

from emoe_core.errors import OptionError
from emoe_core.scheduler.costs import CostsError, ServingCosts
from emoe_core.serving.records import Pass
from workbench.models.reference.tiny import tiny_moe
from workbench.paper.validation import agreement_figure, beside_paper
from workbench.serving.checks.agreement import DRIVERS
from workbench.serving.checks.validation import Validation, ValidationConfig, validate
from workbench.serving.costs.measure import CostsConfig, measure_costs
from workbench.serving.costs.times import fitted
from workbench.serving.simulation.experiment import ServingConfig
from workbench.serving.simulation.scale import scale_up
from workbench.tracking.place import HOME_VARIABLE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("validation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOE_CACHE", str(folder))
        patch.setenv(HOME_VARIABLE, str(folder))
        yield str(tiny_moe(folder / "model", "mixtral", seed=3))


@pytest.fixture(scope="module")
def costs(model: str) -> ServingCosts:
    return measure_costs(
        CostsConfig(model, prompt_tokens=(4, 16), batches=(1, 4), repeats=2, prompts=1, source="fixture")
    )


@pytest.fixture(scope="module")
def validated(model: str, costs: ServingCosts) -> Validation:
    config = ValidationConfig(
        model, n_requests=12, max_batch=4, max_input_tokens=16, max_output_tokens=6, repeats=2, source="fixture"
    )
    return validate(config, costs)


def test_both_drivers_serve_every_request_once_with_the_same_tokens(validated: Validation) -> None:
    for _, served in validated.requests.groupby(["scheduler", "driver"]):
        assert sorted(served["number"]) == list(range(12))
    kept = ["scheduler", "number", "task", "arrival_s", "input_tokens", "output_tokens"]
    parts = {name: part[kept].sort_values(kept[:2]) for name, part in validated.requests.groupby("driver")}
    assert set(parts) == set(DRIVERS)
    for name in DRIVERS[1:]:
        pd.testing.assert_frame_equal(
            parts["real"].reset_index(drop=True), parts[name].reset_index(drop=True), check_exact=True
        )
    assert (validated.requests["ttft_s"] > 0).all()


def test_the_comparison_is_of_the_records(validated: Validation) -> None:
    fcfs = validated.requests[validated.requests["scheduler"] == "fcfs"].groupby("driver")["latency_s"].mean()
    row = validated.table.set_index(["scheduler", "metric"]).loc["fcfs", "latency_mean_s"]
    assert row["real"] == pytest.approx(fcfs["real"]) and row["ratio"] == pytest.approx(
        fcfs["simulated"] / fcfs["real"]
    )
    # No timing is judged here, but an error of a whole order would be one of the model, not of a busy machine.
    assert 0.05 < row["ratio"] < 20


def test_passes_are_counted_and_compared_with_the_costs(validated: Validation) -> None:
    parts = validated.parts.set_index(["scheduler", "passes"])
    assert parts.loc["fcfs", "prompts"]["count"] == parts.loc["emoe", "prompts"]["count"] == 12
    longest = validated.requests["output_tokens"].max() - 1
    assert longest <= parts.loc["fcfs", "steps"]["count"] <= (validated.requests["output_tokens"] - 1).sum()
    busy = parts.loc["fcfs"]["real_s"].sum()
    span = validated.table.set_index(["scheduler", "metric"]).loc[("fcfs", "span_s"), "real"]
    assert 0 < busy < span


def test_times_are_those_of_the_passes() -> None:
    passes = [Pass(True, 10, 3.0), Pass(True, 20, 5.0), Pass(False, 1, 1.0), Pass(False, 1, 2.0), Pass(False, 3, 4.0)]
    times = fitted(passes)
    assert (times.prefill_token_s, times.prefill_fixed_s) == pytest.approx((0.2, 1.0))
    assert (times.decode_batches, times.decode_step_s) == ((1, 3), (1.5, 4.0))
    with pytest.raises(CostsError, match="two or more tokens"):
        fitted(passes[:2])


def test_clusters_stay_within_their_bounds(validated: Validation) -> None:
    scaled = scale_up(ServingConfig(max_batch=4), validated.costs, [1, 20], 0.7, 30)
    assert scaled["requests"].tolist() == [30, 600]
    assert (scaled["latency_mean_s"] >= scaled["alone_s"]).all()
    assert (scaled["throughput_per_s"] <= scaled["capacity_per_s"]).all()
    assert scaled["rate_per_s"].iloc[1] == pytest.approx(20 * scaled["rate_per_s"].iloc[0], rel=0.3)
    closing = beside_paper(validated.table, scaled)
    assert len(closing) == 3 and "20 replicas" in closing["what"].iloc[-1]
    assert len(agreement_figure(validated.requests).axes) == 2


def test_costs_of_another_budget_are_measured_anew_or_refused(model: str, costs: ServingCosts) -> None:
    config = ValidationConfig(
        model, "3 slots", ("fcfs",), n_requests=4, max_batch=2, max_input_tokens=8, max_output_tokens=3, repeats=1,
        source="fixture",
    )  # fmt: skip
    found = validate(config, costs).costs
    assert found.slots_per_layer == (3,) * len(costs.slots_per_layer) != costs.slots_per_layer
    assert found.settings["budget"] == "3 slots"
    with pytest.raises(CostsError, match=r"expert slots .* here .*emoe model costs MODEL"):
        validate(replace(config, remeasure=False), costs)


def test_nonsense_is_refused(validated: Validation) -> None:
    with pytest.raises(OptionError, match="n_requests"):
        ValidationConfig(n_requests=1)
    with pytest.raises(OptionError, match="size of cluster"):
        scale_up(ServingConfig(), validated.costs, [], 0.5, 1)
