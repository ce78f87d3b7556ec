"""Promises of the routing statistics: their ends, their chance, and that expert numbers do not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from emoe_core.experts.trace import RoutingTrace
from workbench.models.reference.tiny import tiny_moe
from workbench.paper import routing as figures_patterns
from workbench.replay import patterns
from workbench.replay.accesses import Accesses
from workbench.replay.pattern_tables import measure_patterns
from workbench.replay.prediction import PromptUse
from workbench.replay.recording import RecordingConfig
from workbench.tracking.findings import Findings, findings_of
from workbench.tracking.recorded import RecordedRun
from workbench.tracking.results_file import SweepResults, read_results, write_results

RENUMBERED = np.array([2, 0, 3, 1])


def use(task: str, *rows: list[float]) -> PromptUse:
    counts = np.array(rows, dtype=float)
    return PromptUse(task, int(counts[0].sum()), counts, counts)


def trace(first: list[list[int]], second: list[list[int]], weights: tuple[float, float] = (0.9, 0.1)) -> RoutingTrace:
    chosen = np.stack([np.array(first), np.array(second)], axis=2).astype(np.uint16)
    n = len(chosen)
    return RoutingTrace(
        request=(np.arange(n) % 2).astype(np.int32),
        position=(np.arange(n) // 2).astype(np.int32),
        prefill=np.ones(n, dtype=bool),
        chosen=chosen,
        served=chosen,
        weight=np.broadcast_to(np.array(weights, dtype=np.float16), chosen.shape).copy(),
        tasks={0: "qa", 1: "code"},
        experts=4,
    )


def test_every_prompt_weighs_the_same_in_its_tasks_shares() -> None:
    found = patterns.task_shares([use("qa", [90, 10]), use("qa", [0, 2]), use("code", [1, 1])])
    assert found["qa"].tolist() == [[0.45, 0.55]] and found["code"].tolist() == [[0.5, 0.5]]


def test_transitions_follow_the_choice_with_the_highest_weight() -> None:
    made = trace([[0, 1], [0, 2], [3, 1]], [[1, 0], [1, 0], [0, 0]])
    counts = patterns.layer_transitions(made)
    assert counts.shape == (1, 4, 4) and counts.sum() == 3
    assert counts[0, 0].tolist() == [0, 1, 1, 0] and counts[0, 3].tolist() == [0, 1, 0, 0]
    assert patterns.layer_transitions(made, "code")[0].sum() == 1
    swapped = trace([[0, 1]], [[1, 3]], weights=(0.1, 0.9))
    assert patterns.layer_transitions(swapped)[0, 1, 3] == 1


def test_association_is_one_when_a_layer_decides_the_next_and_zero_when_not() -> None:
    assert patterns.cramers_v(np.eye(4)[RENUMBERED] * 7) == pytest.approx(1.0)
    assert patterns.cramers_v(np.outer([1, 2, 3], [4, 5, 6])) == pytest.approx(0.0)
    table = np.random.default_rng(0).integers(1, 20, size=(4, 4))
    assert patterns.cramers_v(table) == pytest.approx(patterns.cramers_v(table[RENUMBERED]))
    assert patterns.cramers_v(np.array([[3, 0], [0, 0]])) == 0.0, "one expert only tells nothing"


def test_prompts_that_route_alike_correlate_fully_and_numbers_do_not_matter() -> None:
    stream = [use("qa", [8, 1, 1, 2]), use("code", [1, 7, 2, 2]), use("qa", [16, 2, 2, 4]), use("code", [2, 14, 4, 4])]
    found = patterns.prompt_correlation(stream, [1, 2, 9])
    assert found[2] == pytest.approx(1.0) and found[1] < 0.2 and np.isnan(found[9])
    renumbered = [use(item.task, *item.counts[:, RENUMBERED].tolist()) for item in stream]
    pd.testing.assert_series_equal(found, patterns.prompt_correlation(renumbered, [1, 2, 9]))
    assert np.isnan(patterns.prompt_correlation(stream, [1], same_task=True)[1])
    assert patterns.prompt_correlation(stream, [1], same_task=False)[1] == pytest.approx(found[1])


def test_text_similarity_counts_shared_words() -> None:
    found = patterns.text_similarity(["A heron waits", "the sky", "a HERON waits!"], ["qa"] * 3, [1, 2])
    assert found[2] == pytest.approx(1.0) and found[1] == 0.0


def test_reuse_is_of_the_same_answer_only() -> None:
    # Two answers of three decoded tokens: the first always uses expert 0, the second alternates between 1 and 2.
    experts = [[0, 1], [0], [0], [0], [1, 2], [1], [2], [1]]
    tokens = np.zeros((8, 1, 4), dtype=np.int32)
    for step, active in enumerate(experts):
        tokens[step, 0, active] = 1
    prefill = np.array([True, False, False, False] * 2)
    found, chance = patterns.token_reuse(Accesses(tokens, prefill, ("qa",) * 8), [1, 2, 5])
    assert found[1] == pytest.approx(0.5) and found[2] == pytest.approx(1.0) and np.isnan(found[5])
    assert chance == 0.0


def test_who_knows_more_covers_more_and_everything_covers_all() -> None:
    generator = np.random.default_rng(1)
    stream = [use(("qa", "code")[place % 2], *generator.integers(1, 30, size=(3, 6)).tolist()) for place in range(12)]
    mass = patterns.mass_of_best(stream)
    assert (mass["own"] >= mass["task"] - 1e-12).all() and (mass["task"] >= mass["stream"] - 1e-12).all()
    assert mass.loc[6].tolist() == pytest.approx([1.0] * 4) and mass.loc[1, "even"] == pytest.approx(1 / 6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What is measured on a tiny model: six prompts a stream, short answers."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        checkpoint = str(tiny_moe(tmp_path_factory.mktemp("model"), family="mixtral", seed=3))
        config = RecordingConfig(checkpoint, warm_prompts=6, n_prompts=6, source="fixture", max_new_tokens=6)
        return measure_patterns(config, (0.25, 0.5), 1, lambda stage, done, total: None)


def test_everything_is_measured_and_can_be_kept(measured: Findings, tmp_path: Path) -> None:
    run = RecordedRun("0" * 32, "patterns", "FINISHED", 1, 2, tables=measured.tables)
    write_results(SweepResults("patterns", "", [run]), tmp_path)
    again = findings_of(read_results("patterns", tmp_path).runs[0])
    for name, table in measured.tables.items():
        pd.testing.assert_frame_equal(again[name], table)
    shares = measured["shares"].groupby(["task", "layer"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(np.ones(len(shares)))
    assert measured["transitions"]["layer"].nunique() == 1 and measured["transitions"]["task"].nunique() == 2
    metrics = figures_patterns.pattern_metrics(measured)
    assert metrics["layer_association"] == pytest.approx(
        measured["association"].query("of == 'all tokens'")["cramers_v"].mean()
    )
    assert metrics["sticky_2_slots_min_gap_closed"] == 1.0


def test_figures_show_every_task_stream_and_policy(measured: Findings) -> None:
    maps = figures_patterns.share_maps(measured["shares"], 6)
    tasks = sorted(measured["shares"]["task"].unique())
    assert [axis.get_title(loc="left") for axis in maps.axes if axis.get_visible()][: len(tasks)] == tasks
    curves = figures_patterns.miss_curves(measured["simulation"], 6)
    assert [axis.get_title(loc="left") for axis in curves.axes] == ["sticky stream", "uniform stream"]
    best = figures_patterns.best_policy(measured["simulation"]).replace("_", " ")
    assert [text.get_text() for text in curves.legends[0].get_texts()][1] == best
    assert len(figures_patterns.mass_figure(measured["mass"], 6).axes[0].lines) == 4
    distance = figures_patterns.lag_figure(measured["by_lag"], measured["reuse"], 6)
    assert distance.axes[0].get_ylim()[0] <= 0
    for figure in (maps, curves, distance):
        assert any(axis.get_title(loc="right") == "n = 6 prompts" for axis in figure.axes)


def test_where_few_tokens_go_is_left_blank() -> None:
    rows = [
        {
            "task": task,
            "layer": 2,
            "expert": expert,
            "next_expert": following,
            "tokens": many if expert == following else 0,
        }
        for task, counts in (("a", (40, 40, 40, 40)), ("b", (40, 40, 40, 3)))
        for expert, many in enumerate(counts)
        for following in range(4)
    ]
    arrows = figures_patterns.transition_map(pd.DataFrame(rows), 6)
    assert arrows.axes[0].get_ylabel() == "first choice in layer 2"
    shown = np.asarray(arrows.axes[1].images[0].get_array().filled(np.nan))
    assert shown[0, 0] == 1.0 and np.isnan(shown[3]).all(), "three tokens say nothing"
