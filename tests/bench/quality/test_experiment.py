"""Promises of one run of the bench on a tiny model: what its metrics count and measure, and what they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny_encoder import tiny_encoder

from emoe_core.errors import ExperimentError
from workbench.metrics.catalogue import metric_of
from workbench.models.reference.tiny import tiny_moe
from workbench.paper import figures
from workbench.quality import similarity
from workbench.quality.configuration import ORACLE, ExperimentConfig
from workbench.quality.experiment import Result, run_experiment


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExperimentConfig]:
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        context.setattr(similarity, "encoder", tiny_encoder)
        checkpoint = tiny_moe(tmp_path_factory.mktemp("experiment"), family="mixtral", seed=3)
        yield ExperimentConfig(
            str(checkpoint),
            budget="3 slots",
            tolerance=0.5,
            interval=1,
            n_prompts=8,  # as many as an interval needs
            warm_prompts=2,
            max_new_tokens=4,
            source="fixture",
        )


@pytest.fixture(scope="module")
def silent(config: ExperimentConfig) -> Result:
    return run_experiment(config)


@pytest.fixture(scope="module")
def answered(config: ExperimentConfig) -> Result:
    return run_experiment(replace(config, answers=3))


def _untimed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.endswith("_s")}


def test_free_answers_add_metrics_of_their_own_and_change_no_other(silent: Result, answered: Result) -> None:
    assert len(answered.answers) == 3 and silent.answers.empty
    found = _untimed(answered.metrics)
    assert {name: found.pop(name) for name in ("similarity", "similarity_prompts")}["similarity_prompts"] == 3
    assert found == _untimed(silent.metrics)
    assert _untimed(answered.stats) == _untimed(silent.stats)


def test_a_runs_counters_are_the_sums_of_its_prompts(answered: Result) -> None:
    assert answered.metrics["loads"] > 0 and answered.metrics["reroutes"] > 0
    for name in ("loads", "reroutes", "prefetches", "bytes_loaded"):
        assert answered.metrics[name] == answered.requests[name].sum(), name


@pytest.fixture(scope="module")
def measured(config: ExperimentConfig) -> Result:
    exact = replace(config, tolerance=0.0, strategy="lru", n_prompts=2, warm_prompts=0)
    return run_experiment(exact, measure_memory=True, timing_prompts=1, timing_tokens=3)


def test_every_metric_of_a_run_is_in_the_catalogue(measured: Result, answered: Result) -> None:
    logged = {**measured.metrics, **answered.metrics}
    assert {"fresh_serving_bytes", "stock_tpot_s", "memory_ratio", "replayed_lru_hit_rate", "similarity"} <= set(logged)
    assert [name for name in logged if not metric_of(name).meaning] == []


def test_measured_memory_adds_up_from_its_terms(measured: Result) -> None:
    found, memory, stock = measured.metrics, measured.memory, measured.stock
    assert memory is not None and stock is not None
    assert found["slot_bytes"] == memory.slot_bytes < stock.slot_bytes == found["expert_bytes"]
    assert memory.dense_bytes == stock.dense_bytes == found["dense_bytes"] > 0
    for place, one in (("fresh", memory), ("stock", stock)):
        assert one.peak_bytes == max(one.load_peak_bytes, one.serving_peak_bytes) > one.slot_bytes + one.dense_bytes
        peaks = {name: found[f"{place}_{name}_bytes"] for name in ("peak", "control", "serving_peak", "mapped")}
        serving_control = found[f"{place}_serving_control_bytes"]
        assert found[f"{place}_model_bytes"] == peaks["peak"] - peaks["control"]
        assert found[f"{place}_serving_bytes"] == peaks["serving_peak"] - serving_control - peaks["mapped"]
    for name, what in (("memory_ratio", "serving_bytes"), ("tpot_ratio", "tpot_s"), ("ttft_ratio", "ttft_s")):
        assert found[name] == found[f"fresh_{what}"] / found[f"stock_{what}"]


def test_the_measured_processes_answer_the_same_prompts_and_only_ours_reads_experts(measured: Result) -> None:
    found = measured.metrics
    assert found["fresh_tokens"] == found["stock_tokens"] > 3
    assert (found["stock_bytes_loaded"], found["stock_stall_share"], found["stock_hit_rate"]) == (0, 0, 1)
    assert found["fresh_bytes_loaded"] > 0 and 0 <= found["fresh_hit_rate"] < 1
    assert measured.memory is not None and measured.memory.page_cache


def test_the_figure_of_memory_stacks_the_computed_terms_and_marks_the_measured_peak(measured: Result) -> None:
    rows = {"stock": measured.stock, "emoe": measured.memory}
    terms = pd.DataFrame(
        [(name, one.dense_bytes, one.slot_bytes, one.model_bytes) for name, one in rows.items() if one is not None],
        columns=["name", "dense_bytes", "slot_bytes", "measured_bytes"],
    )
    axis = figures.memory_terms(terms, 4).axes[0]
    dense, slots = (list(bars) for bars in axis.containers)
    assert [bar.get_width() for bar in dense] == pytest.approx(list(terms["dense_bytes"] / 1e6))
    assert [bar.get_x() + bar.get_width() for bar in slots] == pytest.approx(
        list((terms["dense_bytes"] + terms["slot_bytes"]) / 1e6)
    )
    marks = np.asarray(axis.collections[0].get_offsets())
    assert list(marks[:, 0]) == pytest.approx(list(terms["measured_bytes"] / 1e6))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stock", "emoe"]


def test_what_no_fresh_process_can_repeat_is_refused(config: ExperimentConfig) -> None:
    with pytest.raises(ExperimentError, match="measure the budget that it comes to"):
        run_experiment(replace(config, budget=None, max_quality_loss=0.01, tolerance=0.0), measure_memory=True)
    with pytest.raises(ExperimentError, match="cannot be timed"):
        run_experiment(replace(config, strategy=ORACLE), measure_memory=True)
