"""A profile's tables say what the profile says, and its figures can be drawn for any number of tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emoe_core.checkpoint.index import open_checkpoint
from emoe_core.planning.tasks import TASK_TYPES, Profile, TaskProfile
from workbench.models.reference.tiny import LAYERS, tiny_moe
from workbench.paper import profile as profile_report
from workbench.paper.profile import OUR_RULE, PAPER_RULE
from workbench.quality.configuration import ExperimentConfig

QA = TaskProfile(
    "qa",
    (True,) * 4,
    12.0,
    length_quantiles_tokens=(1.0, 4.0, 9.0, 16.0, 32.0),
    length_cap_tokens=40,
    depths=(2, 4),
    similarities=(0.9, 0.4),
    similarity_intervals=((0.8, 0.95), (0.3, 0.5)),
    layer_kl_nats=(0.01, 0.2, 0.001, 0.005),
)
PROFILE = Profile(
    "model", "data", 4, {"qa": QA, "code": replace(QA, task="code", capped_share=0.8, similarities=(0.8, 0.9))}
)


def test_both_masks_are_held_against_what_they_free_and_cost() -> None:
    table = profile_report.mask_table(PROFILE, 0.01).set_index(["task", "rule"])
    assert table.loc[("qa", PAPER_RULE), "free_layers"] == 2
    assert table.loc[("qa", PAPER_RULE), "kl_nats"] == pytest.approx(0.21)
    assert table.loc[("qa", OUR_RULE), "free_layers"] == 2
    assert table.loc[("qa", OUR_RULE), "kl_nats"] == pytest.approx(0.006)
    assert table.loc[("code", PAPER_RULE), "free_share"] == 0.0


def test_masks_follow_the_rule_that_is_asked_for() -> None:
    assert profile_report.with_mask(PROFILE, PAPER_RULE, 0.01).tasks["qa"].sensitive == (False, False, True, True)
    assert profile_report.with_mask(PROFILE, OUR_RULE, 0.01).tasks["qa"].sensitive == (True, True, False, False)


def test_the_table_beside_the_paper_holds_this_profiles_figures() -> None:
    table = profile_report.beside_paper(PROFILE).set_index("what")
    assert "qa 90% with half random, qa 40% with all" in table.loc["Fig. 5, question answering", "here"]
    assert "code" in table.loc["Fig. 4, output lengths", "why they differ"]
    assert table.loc["most sensitive first", "here"] == "qa, code"
    assert "not measured" in table.loc["Fig. 5, classification and comparison, every layer random", "here"]


@pytest.mark.parametrize("profile", [PROFILE, replace(PROFILE, tasks={"qa": QA})])
def test_figures_show_the_profile_of_every_task(profile: Profile) -> None:
    tasks = profile.tasks
    lengths = profile_report.lengths_figure(profile).axes[0]
    assert [text.get_text() for text in lengths.get_yticklabels()] == list(tasks)
    spans = [list(line.get_xdata()) for line in lengths.lines if line.get_linewidth() < 2][: len(tasks)]
    assert spans == [[task.length_quantiles_tokens[0], task.length_quantiles_tokens[-1]] for task in tasks.values()]
    curves = {line.get_label(): line for line in profile_report.curves_figure(profile).axes[0].lines}
    assert {name: list(curves[name].get_ydata()) for name in tasks} == {
        name: [1.0, *task.similarities] for name, task in tasks.items()
    }
    divergence = profile_report.divergence_figure(profile).axes[0].collections[0].get_array()
    assert 10 ** np.asarray(divergence) == pytest.approx(np.array([task.layer_kl_nats for task in tasks.values()]))
    for axis, rule in zip(profile_report.masks_figure(profile, 0.01).axes, (PAPER_RULE, OUR_RULE), strict=True):
        masks = profile_report.with_mask(profile, rule, 0.01).tasks
        drawn = np.asarray(axis.collections[0].get_array()).astype(bool).tolist()
        assert drawn == [list(masks[name].sensitive) for name in tasks]
    assert list(profile_report.length_table(profile)["mean"]) == [12.0] * len(profile.tasks)


def test_masks_are_measured_beside_no_skipping_and_lose_only_in_what_they_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    checkpoint = tiny_moe(tmp_path / "model", family="mixtral", seed=3)
    config = ExperimentConfig(
        str(checkpoint),
        budget="3 slots",
        tolerance=0.0,
        n_prompts=8,
        warm_prompts=4,
        max_new_tokens=3,
        source="fixture",
    )
    # The paper's rule frees the leading layer, ours all: each adds what costs nothing.
    tasks = {
        name: TaskProfile(name, (True,) * LAYERS, 3.0, depths=(1, LAYERS), similarities=(1.0, 0.1), layer_kl_nats=free)
        for name, free in ((task, (0.0,) * LAYERS) for task in TASK_TYPES)
    }
    profile = Profile(open_checkpoint(checkpoint).source_hash, "data", LAYERS, tasks)
    assert profile_report.with_mask(profile, PAPER_RULE, 0.0).tasks["qa"].sensitive == (False, *[True] * (LAYERS - 1))
    found = profile_report.measure_masks(profile, config, 0.0).set_index("mask")
    assert list(found.index) == ["no skipping", PAPER_RULE, OUR_RULE]
    assert found.loc["no skipping", ["perplexity_ratio", "kl_nats", "reroutes"]].tolist() == [1.0, 0.0, 0.0]
    assert (found["perplexity_ratio_low"] <= found["perplexity_ratio"]).all()
    assert (found["perplexity_ratio"] <= found["perplexity_ratio_high"]).all()
    one, every = found.loc[PAPER_RULE], found.loc[OUR_RULE]
    assert 0 < one["reroutes"] < every["reroutes"], "who frees more layers reroutes more"
    assert every["loads"] < one["loads"] < found.loc["no skipping", "loads"], "what is rerouted is not loaded"
    assert one["kl_nats"] > 0 and every["kl_nats"] > 0

    nothing = replace(
        profile, tasks={n: replace(t, similarities=(0.1, 0.1), layer_kl_nats=(9.0,) * LAYERS) for n, t in tasks.items()}
    )
    same = profile_report.measure_masks(nothing, config, 0.0).drop(columns="mask")
    assert (same == same.iloc[0]).all(axis=None), "masks that free nothing change nothing"
