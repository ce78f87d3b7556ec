"""Promises of exploring: the same point gives the same figures, refusals change nothing, every choice is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from emoe_core.errors import BudgetError, DataError, ExperimentError, OptionError
from emoe_core.experts.trace import RoutingTrace
from workbench.explore.explorer import Explorer, Observation
from workbench.explore.panel import Panel
from workbench.explore.readout import points_frame
from workbench.explore.token_view import count_steps, step_grid, step_table, steps_table
from workbench.models.reference.tiny import tiny_moe
from workbench.quality.configuration import ExperimentConfig

UNTIMED = ("computed_bytes", "perplexity_ratio", "kl_nats", "top1_agreement", "hit_rate", "loads", "reroutes")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExperimentConfig]:
    model = tiny_moe(tmp_path_factory.mktemp("explore"), family="mixtral", seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ExperimentConfig(
            model=str(model),
            budget="50%",
            tolerance=0.5,
            interval=1,
            replan="interval",
            n_prompts=2,
            source="fixture",
            warm_prompts=0,
            max_new_tokens=5,
        )


@pytest.fixture(scope="module")
def explorer(config: ExperimentConfig) -> Iterator[Explorer]:
    with Explorer() as explorer:
        yield explorer


def untimed(seen: Observation) -> dict[str, float]:
    return {name: seen.metrics[name] for name in UNTIMED}


@pytest.mark.long
def test_a_point_tried_again_gives_the_same_figures_on_the_same_engine(
    config: ExperimentConfig, explorer: Explorer
) -> None:
    first, engine = explorer.observe(config), explorer.engine
    exact = explorer.observe(replace(config, tolerance=0.0))
    again = explorer.observe(config)
    assert explorer.engine is engine
    assert (untimed(exact)["kl_nats"], untimed(exact)["perplexity_ratio"]) == (0.0, 1.0)
    assert untimed(first)["reroutes"] > 0 == untimed(exact)["reroutes"]
    assert untimed(again) == untimed(first)
    assert again.answer.token_ids == first.answer.token_ids
    assert (again.trace.outcome == first.trace.outcome).all()
    frame = points_frame([first, exact])
    assert frame["tolerance"].tolist() == [0.5, 0.0]
    assert frame["task"].tolist() == ["all tasks"] * 2


def test_another_budget_loads_anew_and_takes_other_memory(config: ExperimentConfig, explorer: Explorer) -> None:
    small = explorer.observe(config)
    engine = explorer.engine
    whole = explorer.observe(replace(config, budget="100%"))
    assert explorer.engine is not engine
    assert whole.metrics["hit_rate"] > small.metrics["hit_rate"]
    saved_bytes = whole.metrics["slot_bytes"] - small.metrics["slot_bytes"]
    assert whole.metrics["computed_bytes"] - small.metrics["computed_bytes"] == saved_bytes > 0
    assert small.metrics["measured_bytes"] > 0


def test_what_cannot_work_leaves_the_engine_as_it_is(config: ExperimentConfig, explorer: Explorer) -> None:
    explorer.observe(config)
    engine = explorer.engine
    with pytest.raises(BudgetError, match="bytes short"):
        explorer.observe(replace(config, budget="5%"))
    with pytest.raises(OptionError, match="notebook 08"):
        explorer.observe(replace(config, strategy="oracle"))
    assert explorer.engine is engine
    assert engine is not None
    assert engine.stats().requests_served == 3


def test_a_moved_slider_shows_another_point_and_a_refusal_is_one_line(
    config: ExperimentConfig, explorer: Explorer
) -> None:
    panel = Panel(config, explorer)
    with pytest.raises(ExperimentError, match=r"call update\(\)"):
        _ = panel.latest
    panel.update()
    before, grid = panel.figures.value, panel.tokens.value
    panel.tolerance.value = 0.0
    assert [seen.config.tolerance for seen in panel.observations] == [0.5, 0.0]
    assert panel.figures.value != before
    assert panel.tokens.value != grid
    assert "perplexity ratio 1.000" in panel.figures.value
    assert re.search(r"Speed</b> [\d.,]+ tokens/s", panel.figures.value)
    assert panel.points.value.count("<tr") == 3

    shown = panel.figures.value
    panel.budget.value = 5
    assert panel.figures.value == shown
    assert len(panel.observations) == 2
    assert re.search(r"bytes short\. Pass at least", panel.message.value)
    assert "\n" not in panel.message.value
    assert not any(slider.disabled for slider in panel.sliders)
    panel.budget.value = 50
    assert panel.message.value == ""
    assert panel.latest.config.budget == "50%"

    detail = panel.detail.value
    panel.step.value = 2
    assert panel.detail.value != detail


def test_a_budget_in_slots_is_kept_until_its_slider_moves(config: ExperimentConfig) -> None:
    panel = Panel(replace(config, budget="4 slots"))
    assert panel.config.budget == "4 slots"
    assert panel.budget.value == 54  # 3 layers of 4 slots and the staging one, of 24 experts
    panel.task.unobserve_all()
    panel.task.value = "qa"
    assert (panel.config.budget, panel.config.tasks) == ("4 slots", ("qa",))


def trace() -> RoutingTrace:
    """Return a request of two prompt tokens and one step, 2 layers, top-2, and the first token of another request."""
    chosen = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[3, 1], [0, 1]], [[0, 1], [0, 1]]], dtype=np.uint16)
    served = chosen.copy()
    served[1, 0, 1], served[2, 1, 0] = 1, 2
    outcome = np.array([[[0, 1], [0, 0]], [[0, 2], [0, 1]], [[0, 0], [2, 1]], [[0, 0], [0, 0]]], dtype=np.uint8)
    weight = np.full(chosen.shape, 0.25, dtype=np.float16)
    weight[..., 1] = 0.75
    request, position = np.array([7, 7, 7, 9], dtype=np.int32), np.array([0, 1, 2, 0], dtype=np.int32)
    prefill = np.array([True, True, False, True])
    return RoutingTrace(request, position, prefill, chosen, served, weight, {7: "qa", 9: "qa"}, 4, outcome)


def test_steps_are_counted_and_told_by_hand() -> None:
    counts = count_steps(trace(), 7)
    assert counts.tolist() == [[[2, 1, 1, 0], [3, 1, 0, 0]], [[2, 0, 0, 0], [0, 1, 1, 0]]]
    table = steps_table(counts, ["a", "b"])
    assert table.to_numpy().tolist() == [["a", 5, 2, 1], ["b", 2, 1, 1]]
    told = step_table(trace(), 1, 7)["experts"].tolist()
    assert told == ["1 hit (0.75), 3 hit (0.25)", "1 loaded (0.75), 0 rerouted to 2 (0.25)"]


def test_the_picture_tells_every_choice_and_escapes_text() -> None:
    picture = step_grid(trace(), ["<b>", " x\n"], 7)
    assert "&lt;b&gt;" in picture and "<b>" not in picture
    assert "·x↵" in picture
    assert "<title>layer 1: 0 rerouted to 2 (0.25), 1 loaded (0.75)</title>" in picture
    # Layers in two steps and their sum, and what all layers come to in each step.
    assert picture.count("<title>layer") == 6
    assert picture.count("<title>all layers") == 2
    # Of the prompt's four choices in a layer, one has room for no letter.
    patterned = re.findall(r"url\(#(emoe-\w+-\d)\)", picture)
    assert patterned
    assert set(patterned) <= set(re.findall(r"pattern id='(emoe-\w+-\d)'", picture))
    assert picture == step_grid(trace(), ["<b>", " x\n"], 7)


def test_what_cannot_be_drawn_says_why() -> None:
    with pytest.raises(DataError, match="2 requests: name one"):
        count_steps(trace())
    with pytest.raises(DataError, match="no request 3: it holds 7, 9"):
        count_steps(trace(), 3)
    with pytest.raises(DataError, match="2 steps, but 1 tokens"):
        step_grid(trace(), ["a"], 7)
    with pytest.raises(DataError, match="record=True"):
        count_steps(replace(trace(), outcome=None), 7)
