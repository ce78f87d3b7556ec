"""Comparisons on a tiny model: controls read what they must, pairs are paired, and reports say what tables say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from emoe_core.errors import ExperimentError, OptionError
from workbench.models.reference.tiny import tiny_moe
from workbench.paper import interval as interval_report
from workbench.paper import memory as memory_report
from workbench.paper import tasks as task_report
from workbench.quality.configuration import ORACLE, ExperimentConfig
from workbench.quality.variants import Comparison, paired_difference, run_quantized, run_variants, timed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        checkpoint = tiny_moe(tmp_path_factory.mktemp("compared"), family="mixtral", seed=3)
        yield ExperimentConfig(
            str(checkpoint),
            budget="3 slots",
            interval=1,
            n_prompts=8,
            warm_prompts=4,
            max_new_tokens=3,
            source="fixture",
        )


@pytest.fixture(scope="module")
def found(base: ExperimentConfig) -> Comparison:
    variants = {name: replace(base, strategy=name) for name in ("frequency", "random", ORACLE)}
    variants["all resident"] = replace(base, budget="100%")
    variants["on demand"] = replace(base, strategy="lru", tolerance=0.0)
    variants["agnostic"] = replace(base, labels="none")
    return run_variants(variants)


@pytest.mark.long
def test_controls_lose_exactly_nothing(found: Comparison) -> None:
    rows = found.summary.set_index("label")
    for label in ("all resident", "on demand"):
        assert rows.loc[label, "perplexity_ratio"] == 1.0
        assert rows.loc[label, "kl_nats"] == 0.0
        assert rows.loc[label, "top1_agreement"] == 1.0
    assert (rows.loc[["frequency", "random", ORACLE], "kl_nats"] > 0).all()


def test_the_oracle_covers_what_prompts_will_use(found: Comparison) -> None:
    covered = found.summary.set_index("label")["token_hit_rate"]
    # What residents serve in one layer changes what the next ones see, so hindsight is a bound within noise only.
    assert covered[ORACLE] > covered["random"] + 0.1
    assert covered[ORACLE] > covered[["frequency", "agnostic"]].max() - 0.02


def test_residency_is_told_layer_by_layer_and_fits_the_slots(found: Comparison) -> None:
    table = found.residency
    assert set(table["label"]) == set(found.summary["label"])
    by_layer = table.groupby(["label", "layer"])
    assert np.allclose(by_layer["wanted_share"].sum(), 1)
    # Never more residents than slots; everything is resident from the second prompt on where there is room for all.
    held = by_layer["resident_share"].sum().unstack("label")
    assert (held.drop(columns="all resident") <= 3 + 1e-9).all(axis=None)
    assert (table[table["label"] == "all resident"]["resident_share"] > 0.8).mean() > 0.9
    # The plans follow what is wanted; a random subset does not know it.
    covered = (table["resident_share"] * table["wanted_share"]).groupby(table["label"]).sum()
    assert covered["frequency"] > covered["random"]


def test_replayed_bounds_are_in_order(found: Comparison) -> None:
    rates = found.summary.set_index("label")[[f"replayed_{name}_hit_rate" for name in ("belady", "lru", "random")]]
    lru, rest = rates["replayed_lru_hit_rate"], rates["replayed_random_hit_rate"]
    assert (rates["replayed_belady_hit_rate"] >= np.maximum(lru, rest)).all()
    assert (rates.loc["all resident"].nunique()) == 1 and rates.loc["on demand"].nunique() > 1


def test_the_engine_is_told_what_the_labels_say(found: Comparison) -> None:
    told = found.requests.groupby("label")["told_task"].agg(set)
    assert told["agnostic"] == {"unknown"}
    assert told["frequency"] == set(found.requests["task"])


def test_a_difference_is_taken_prompt_by_prompt(found: Comparison) -> None:
    assert paired_difference(found.requests, "random", "random", "kl_nats") == (0.0, 0.0, 0.0)
    mean, low, high = paired_difference(found.requests, "random", "on demand", "kl_nats")
    assert low <= mean <= high
    few = found.requests[found.requests["request"] < 4]
    assert np.isnan(paired_difference(few, "random", "on demand", "kl_nats")[1:]).all(), "too few for an interval"
    other = found.requests.assign(task=found.requests["task"].where(found.requests["label"] == "random", "qa"))
    with pytest.raises(ExperimentError, match="different prompts"):
        paired_difference(other, "random", "on demand", "kl_nats")
    rows = found.requests[found.requests["label"] == "random"]
    assert mean == pytest.approx(np.average(rows["kl_nats"], weights=rows["output_tokens"]))
    with pytest.raises(ExperimentError, match="no prompt in common"):
        paired_difference(found.requests, "random", "nobody", "kl_nats")


def test_quantised_experts_stand_in_the_same_table(base: ExperimentConfig, found: Comparison) -> None:
    together = found + run_quantized(base, ["q8_0", "q4_0"])
    share = memory_report.expert_memory_share(together.summary).set_axis(together.summary["label"])
    assert share["q8_0"] == 8.5 / 16 and share["all resident"] == 1.0
    kl = together.summary.set_index("label")["kl_nats"]
    assert 0 < kl["q8_0"] < kl["q4_0"]
    drawn = {line.get_label(): line for line in memory_report.accuracy_figure(together.summary).axes[0].lines}
    for name, label in (("q8_0", "8-bit experts"), ("q4_0", "4-bit experts")):
        ((place, height),) = drawn[label].get_xydata()
        assert height == kl[name] and abs(place - share[name]) < 0.1
    places = [line.get_xdata()[0] for line in drawn.values()]
    assert len(set(places)) == len(places), "points of one share stand side by side"
    table = memory_report.beside_paper(together.summary).set_index("what")
    assert (
        f"x{together.summary.set_index('label').loc['q4_0', 'perplexity_ratio']:.3f}"
        in table.loc["Table 3, 4-bit experts", "here"]
    )


def test_broken_bounds_are_named_at_their_budget() -> None:
    rows = [
        (strategy, n, kl + n / 100)
        for strategy, kl in (("oracle", 0.1), ("frequency", 0.2), ("random", 0.3))
        for n in range(8)
    ]
    requests = pd.DataFrame(rows, columns=["label", "request", "kl_nats"]).assign(output_tokens=4, task="qa")
    names = ["oracle", "frequency", "random"]
    summary = pd.DataFrame({"label": names, "strategy": names}).assign(
        tolerance=1.0, budget="50%", mix="uniform", seed=0
    )
    assert memory_report.broken_bounds(summary, requests) == []
    swapped = requests.replace({"label": {"frequency": "oracle", "oracle": "frequency"}})
    assert memory_report.broken_bounds(summary, swapped) == ["frequency is better than oracle at 50%"]
    swapped = requests.replace({"label": {"frequency": "random", "random": "frequency"}})
    assert memory_report.broken_bounds(summary, swapped) == ["frequency is worse than random at 50%"]


def megabytes_a_prompt(summary: pd.DataFrame) -> pd.Series:
    return summary["bytes_loaded"] / summary["prompts"] / 1e6


def test_reports_of_intervals_and_tasks_hold_the_runs_figures(base: ExperimentConfig, found: Comparison) -> None:
    swept = run_variants({f"p={p}": replace(base, interval=p, replan="interval") for p in (1, 2, 4)})
    table = interval_report.beside_paper(swept.summary)
    assert f"p=2: {swept.summary['perplexity_ratio'].iloc[1]:.3f}" in table["here"].iloc[0]
    moved = interval_report.interval_figure(swept.summary).axes[1].lines[0]
    assert list(moved.get_ydata()) == pytest.approx(list(megabytes_a_prompt(swept.summary)))
    overhead = interval_report.overhead_share(swept.summary, swept.requests)
    assert (overhead["overhead_share"] > 0).all() and (overhead["overhead_share"] < 1).all()

    tasks = task_report.task_table(found.requests, "frequency", "agnostic")
    assert set(tasks["task"]) == set(found.requests["task"])
    errors = found.summary[found.summary["label"].isin(["frequency", "random"])].assign(
        label_error=[0.0, 0.5], bytes_loaded=[100.0, 150.0]
    )
    aware, agnostic = task_report.awareness_figure(tasks, "frequency", "agnostic").axes[0].containers
    assert [bar.get_width() for bar in aware] == list(tasks["frequency_kl_nats"])
    assert [bar.get_width() for bar in agnostic] == list(tasks["agnostic_kl_nats"])
    moved = task_report.error_figure(errors).axes[1].lines[0]
    assert list(moved.get_xdata()) == [0.0, 0.5]
    assert list(moved.get_ydata()) == pytest.approx(list(megabytes_a_prompt(errors)))
    assert "x1.50" in task_report.beside_paper(tasks, errors)["here"].iloc[1]


@pytest.mark.long
def test_variants_are_timed_in_turn_and_compared_with_the_first_within_each_round(base: ExperimentConfig) -> None:
    variants = {"stock": {"implementation": "stock"}, "on demand": {"budget": "3 slots", "predictor": None}}
    done: list[tuple[str, int, int]] = []
    times = timed(variants, base, prompts=1, tokens=3, rounds=2, progress=lambda *stage: done.append(stage))
    assert done == [("timed processes", number, 4) for number in (1, 2, 3, 4)]
    rows = times.set_index("label")
    assert list(rows.index) == list(variants) and (rows["rounds"] == 2).all()
    ratios = [f"{name}_ratio{end}" for name in ("serving", "ttft", "tpot") for end in ("", "_low", "_high")]
    assert (rows.loc["stock", ratios] == 1).all(), "the first is compared with itself"
    ours = rows.loc["on demand"]
    for name in ("ttft", "tpot"):
        assert 0 < ours[f"{name}_ratio_low"] <= ours[f"{name}_ratio"] <= ours[f"{name}_ratio_high"]
    assert rows.loc["stock", ["bytes_loaded", "stall_share"]].tolist() == [0, 0]
    assert ours["bytes_loaded"] > 0 and 0 < ours["stall_share"] < 1
    assert rows.loc["stock", "page_cache"] == "not used after loading" != ours["page_cache"]

    speed, memory = memory_report.time_figure(times).axes
    assert [bar.get_width() for bar in speed.containers[-1]] == pytest.approx(list(times["tpot_ratio"]))
    assert [bar.get_width() for bar in memory.containers[0]] == pytest.approx(list(times["serving_ratio"]))
    assert "ratio to stock" in speed.get_xlabel()
    for share, told in ((0.0, False), (0.9, True)):
        axis = memory_report.time_figure(times.assign(others_cpu_share=share)).axes[0]
        assert bool(axis.get_title(loc="left")) == told


def test_what_cannot_be_compared_is_refused(base: ExperimentConfig) -> None:
    with pytest.raises(OptionError):
        run_variants({})
    with pytest.raises(OptionError, match="oracle"):
        replace(base, strategy=ORACLE, answers=1)
