"""Promises of what objects show of themselves in a notebook: figures that are right, and one legible look."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import emoe_core
from emoe_core.experts.trace import HIT, LOAD, REROUTE, RoutingTrace
from emoe_core.planning.planner import make_plan
from workbench.explore.displays import DISPLAYS, show_in_notebooks
from workbench.explore.html_view import Part, bar, layer_map, served_bar
from workbench.models.reference.tiny import tiny_moe
from workbench.replay.trace_statistics import outcomes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> emoe_core.Engine:
    """Return a closed engine that answered two prompts of different length at half tolerance, one padded."""
    folder = tmp_path_factory.mktemp("html")
    with emoe_core.load(tiny_moe(folder), budget="3 slots", tolerance=0.5, record=True, pack_dir=folder) as engine:
        engine.generate(["What is a heron?", "Count."], ["qa", "code"], max_new_tokens=5, batch_size=2)
    return engine


def test_recorded_outcomes_are_the_counted_ones(served: emoe_core.Engine, tmp_path: Path) -> None:
    trace, counters = served.trace(), served.stats().counters
    found = outcomes(trace)
    assert found is not None
    counted = [counters.token_hits, counters.token_loads, counters.token_reroutes, counters.token_drops]
    assert found.sum(axis=0).tolist() == counted
    assert all(counted[:3]), "the run has hits, loads and reroutes"
    again = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert (again.outcome == trace.outcome).all()


def test_only_rerouted_choices_were_served_by_other_experts(served: emoe_core.Engine) -> None:
    trace = served.trace()
    kept = np.isin(trace.outcome, (HIT, LOAD))
    assert (trace.chosen[kept] == trace.served[kept]).all()
    rerouted = trace.outcome == REROUTE
    assert (trace.chosen[rerouted] != trace.served[rerouted]).all()


def objects(served: emoe_core.Engine) -> list[object]:
    plan = make_plan(np.array([[3.0, 0, 1], [0, 0, 0]]), [2, 2])
    return [served, served.plan, served.memory(), served.stats(), served.trace(), plan]


def test_a_notebook_shows_every_object_as_html_and_a_script_is_left_alone(served: emoe_core.Engine) -> None:
    show_in_notebooks()
    shell = InteractiveShell.instance()
    try:
        show_in_notebooks()
        for shown in objects(served):
            data, _ = shell.display_formatter.format(shown)
            assert data["text/html"] == DISPLAYS[type(shown)](shown)
    finally:
        InteractiveShell.clear_instance()


def test_every_object_is_shown_without_the_colours_of_one_theme(served: emoe_core.Engine) -> None:
    for shown in objects(served):
        html = DISPLAYS[type(shown)](shown)
        assert len(html) < 40_000
        assert "<script" not in html
        # Black stands on the coloured parts only; anything else takes the page's colour.
        assert all(f"background:{color}" in html for color in re.findall(r"background:(#\w+);color:#000", html))
        assert not re.search(r"(?<!background:#[0-9a-f]{6};)(?<!-)color:#", html)


def test_a_bar_has_letters_shares_and_numbers() -> None:
    html = served_bar([6, 3, 1, 0], "choices")
    assert [float(share) for share in re.findall(r"flex:([\d.]+)", html)] == [0.6, 0.3, 0.1]
    assert "aria-label='choices: 6 (60.0%) hit, 3 (30.0%) loaded, 1 (10.0%) rerouted'" in html
    assert html.count(">H<") == html.count(">L<") == html.count(">R<") == 2
    assert "onload=&#x27;" in bar([Part("a' onload='x", 1.0, "", "#fff")], "")


def test_a_map_of_thousands_of_experts_stays_small() -> None:
    values = np.random.default_rng(0).random((48, 128))
    html = layer_map(values, values > 0.9, "map", "note")
    assert len(html) < 400_000
    assert html.count("<path") == 9
    assert "fill-opacity" not in layer_map(np.zeros((2, 3)), None, "empty", "")
