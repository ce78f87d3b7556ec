"""Promises of the control loop, driven over a real model: when it predicts, plans and swaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe_core
from emoe_core.errors import OptionError
from workbench.models.reference.tiny import EXPERTS, LAYERS, TOP_K, tiny_moe
from workbench.predictors.bounds import RandomPredictor
from workbench.replay.scoring import score


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("control"), family="qwen3_moe", seed=8)


def sequence(seed: int) -> tuple[list[int], list[int]]:
    row = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return row[:6], row[6:]


def serve(engine: emoe_core.Engine, count: int, task: str = "qa", first: int = 0) -> None:
    for seed in range(first, first + count):
        score(engine, [sequence(seed)], [task])


def load(model: Path, tmp_path: Path, **options) -> emoe_core.Engine:
    return emoe_core.load(model, **({"budget": "3 slots", "pack_dir": tmp_path} | options))


@pytest.mark.parametrize("replan", ["admission", "interval"])
def test_predictions_come_before_every_pth_admitted_request(model: Path, tmp_path: Path, replan: str) -> None:
    with load(model, tmp_path, interval=4, replan=replan) as engine:
        seen = []
        for seed in range(10):
            serve(engine, 1, first=seed)
            seen.append(engine.stats().counters.predictions)
    assert seen == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("interval", [0, -1, 2.5, True, "often"])
def test_what_is_no_interval_is_refused(model: Path, tmp_path: Path, interval: Any) -> None:
    with pytest.raises(OptionError, match="interval is"):
        load(model, tmp_path, interval=interval)


def test_a_start_without_history_is_flagged_cold_until_the_first_plan(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, interval=3) as engine:
        serve(engine, 3)
        assert engine.stats().cold_start
        assert engine.stats().counters.swaps == 0
        serve(engine, 1)
        assert not engine.stats().cold_start
        assert engine.stats().counters.swaps == 1
    with load(model, tmp_path, predictor=None) as engine:
        assert not engine.stats().cold_start, "without a predictor there is nothing to wait for"


def test_experts_are_swapped_only_when_the_set_changes(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, interval=1) as engine:
        for _ in range(6):
            score(engine, [sequence(1)], ["qa"])
        counters = engine.stats().counters
    assert counters.predictions == 6
    assert counters.swaps == 1


def test_an_interval_plan_is_kept_for_the_next_p_prompts(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, interval=3, replan="interval") as engine:
        serve(engine, 4)
        plan = engine.control.plan
        assert plan is not None
        serve(engine, 2, task="code", first=20)
        assert engine.control.plan is plan
        serve(engine, 1, task="code", first=30)
        assert engine.control.plan is not plan


def test_an_admission_plan_follows_the_running_requests(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, interval=2, replan="admission") as engine:
        serve(engine, 4)
        plan = engine.control.plan
        serve(engine, 1, task="code", first=20)
        assert engine.control.plan is not plan


def test_after_a_swap_the_plan_is_resident(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, predictor=RandomPredictor, interval=1) as engine:
        requests = engine.admit(["qa"], [5])
        engine.loader.settle()
        plan = engine.control.plan
        assert plan is not None
        assert [set(experts) for experts in plan.experts] == [
            engine.loader.table.resident(layer) for layer in range(LAYERS)
        ]
        engine.finish(requests)
        counters = engine.stats().counters
        assert counters.prefetches == 3 * LAYERS and counters.loads == 0


def test_the_predictor_learns_what_the_router_wanted_not_what_it_got(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, tolerance=1.0, budget="1 slot", record=True, interval=100) as engine:
        serve(engine, 1)
        learned = engine.control.predictor.predict("qa")
        trace = engine.trace()
    assert (trace.chosen != trace.served).any()
    np.testing.assert_allclose(learned, trace.shares()[0])
    assert trace.counts(0).sum() == 12 * LAYERS * TOP_K


def test_a_warm_start_from_a_trace_plans_from_the_first_request(model: Path, tmp_path: Path) -> None:
    with load(model, tmp_path, budget="100%", record=True) as engine:
        serve(engine, 4)
        trace = engine.trace()
        learned = engine.control.predictor.predict("qa")
    with load(model, tmp_path) as engine:
        assert engine.stats().cold_start
        assert engine.warm_start(trace) == 4
        np.testing.assert_allclose(engine.control.predictor.predict("qa"), learned)
        engine.finish(engine.admit(["qa"], [6]))
        assert not engine.stats().cold_start
        best = np.argsort(-learned, axis=1, kind="stable")[:, :3]
        assert [set(experts) for experts in engine.control.plan.experts] == [set(row.tolist()) for row in best]
    with load(model, tmp_path, predictor=None) as engine:
        assert engine.warm_start(trace) == 0


def test_direct_calls_are_anonymous_requests_of_unknown_task(model: Path, tmp_path: Path) -> None:
    inputs = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with load(model, tmp_path, record=True) as engine, torch.no_grad():
        output = engine.model(input_ids=inputs)
        engine.model(input_ids=inputs[:, :1], past_key_values=output.past_key_values)
        trace = engine.trace()
        assert engine.control.admitted == 2
        engine.model(input_ids=inputs)
        assert engine.control.admitted == 4
        assert engine.stats().requests_served == 2
    assert set(trace.tasks.values()) == {"unknown"}
    assert trace.position[trace.request == 1].tolist() == [0, 1, 2, 3]
    assert trace.prefill[trace.request == 1].tolist() == [True, True, True, False]
    assert trace.experts == EXPERTS
