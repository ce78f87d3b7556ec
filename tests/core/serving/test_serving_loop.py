"""Promises of continuous batching on the real engine: the tokens of `generate`, and the turns of the simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serving_bench import make_costs

import emoe_core
from emoe_core.errors import OptionError
from emoe_core.generation import encode
from emoe_core.scheduler import BatchLimits, Request, RequestTooLargeError
from emoe_core.scheduler.costs import CostsError, TaskLoad
from emoe_core.serving.loop import ServingLoop, limits_within
from emoe_core.serving.records import Answer
from workbench.models.reference.tiny import tiny_moe
from workbench.serving.orders import make_scheduler
from workbench.serving.simulation.arrivals import Arrival
from workbench.serving.simulation.experiment import ServingConfig, simulate_serving

PROMPTS = ["A heron waits.", "Two and two make four, they say", "Why?", "Is the sky blue at noon", "The end", "Once"]
TASKS = ["qa", "code", "qa", "summarization", "code", "qa"]
TOKENS = [9, 3, 12, 1, 7, 5]
WIDE = BatchLimits(4, 4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("loop") / "model", "mixtral", seed=3)


def load(model: Path, **options: object) -> emoe_core.Engine:
    return emoe_core.load(model, pack_dir=model.parent / "packs", **options)


def prompt_ids(engine: emoe_core.Engine) -> list[list[int]]:
    assert engine.tokenizer is not None
    return [encode(engine.tokenizer, prompt) for prompt in PROMPTS]


def serve(engine: emoe_core.Engine, limits: BatchLimits, scheduler: str = "fcfs") -> tuple[ServingLoop, list[Answer]]:
    loop = ServingLoop(engine, make_scheduler(scheduler, make_costs()), limits)
    for ids, task, tokens in zip(prompt_ids(engine), TASKS, TOKENS, strict=True):
        loop.submit(ids, task, tokens)
    return loop, loop.run()


@pytest.mark.parametrize("budget", ["100%", "3 slots"])
def test_one_at_a_time_gives_the_tokens_of_generate(model: Path, budget: str) -> None:
    with load(model, budget=budget) as engine:
        _, answers = serve(engine, BatchLimits(1, 4096))
        found = {answer.number: answer.token_ids for answer in answers}
        for number, prompt in enumerate(PROMPTS):
            (expected,) = engine.generate([prompt], [TASKS[number]], max_new_tokens=TOKENS[number])
            # The loop was given no stop token and goes on behind one.
            assert found[number][: len(expected.token_ids)] == expected.token_ids
        engine.stats().counters.check()


def test_a_batch_that_changes_gives_the_same_tokens_where_the_choice_is_clear(model: Path) -> None:
    with load(model, budget="100%") as engine:
        alone = {answer.number: answer.token_ids for answer in serve(engine, BatchLimits(1, 4096))[1]}
        for answer in serve(engine, WIDE)[1]:
            for place, (got, expected) in enumerate(zip(answer.token_ids, alone[answer.number], strict=True)):
                if got == expected:
                    continue
                ids = [*prompt_ids(engine)[answer.number], *alone[answer.number][:place]]
                with torch.no_grad():
                    best = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2).values
                assert float(best[0] - best[1]) < 1e-3, "tokens differ though one was clearly best"
                break


@pytest.mark.parametrize("scheduler", ["fcfs", "shortest", "affine"])
def test_the_simulation_takes_the_same_turns(model: Path, scheduler: str) -> None:
    """All arrive at once, and nobody's promise depends on the time, so that order and counts must be equal."""
    limits, interval = BatchLimits(3, 4096), 4
    with load(model, budget="4 slots", tolerance=1.0, interval=interval) as engine:
        loop, answers = serve(engine, limits, scheduler)
        predictions, inputs = engine.stats().counters.predictions, [len(ids) for ids in prompt_ids(engine)]
        assert engine.stats().requests_served == len(PROMPTS)
    even = ((0.125,) * 8,)
    costs = make_costs(
        slots=4, tasks={task: TaskLoad((1,), (1,), 64.0, even) for task in ("qa", "code", "summarization")}
    )
    costs = replace(costs, slots_per_layer=(4,))
    config = ServingConfig(
        scheduler=scheduler, lengths="oracle", load=None, rate_per_s=1.0, max_batch=3, kv_tokens=4096, interval=interval
    )
    coming = [Arrival(n, TASKS[n], 1e-9 * n, inputs[n], TOKENS[n]) for n in range(len(PROMPTS))]
    # The rate is told to nobody: these arrivals are taken as they are.
    result = simulate_serving(config, costs, coming)
    table = result.requests
    first = [answer.number for answer in sorted(answers, key=lambda one: one.first_token_s)]
    if scheduler == "fcfs":
        assert table.sort_values("first_token_s")["number"].tolist() == first
        assert result.metrics["steps"] == loop.steps
    assert sorted(table["output_tokens"]) == sorted(len(answer.token_ids) for answer in answers)
    assert result.metrics["predictions"] == predictions == 2


def test_times_are_of_the_clock_that_was_given(model: Path) -> None:
    ticks = iter(range(1000))
    with load(model, budget="100%") as engine:
        loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), WIDE, clock=lambda: float(next(ticks)))
        loop.submit(prompt_ids(engine)[0], "qa", 3)
        (answer,) = loop.run()
    assert (answer.arrival_s, answer.admitted_s, answer.first_token_s) == (0.0, 1.0, 2.0)
    assert answer.finished_s > answer.first_token_s and len(answer.token_ids) == 3


def test_a_stop_token_ends_an_answer(model: Path) -> None:
    with load(model, budget="100%") as engine:
        (whole,) = serve_one(engine, ())
        (cut,) = serve_one(engine, (whole.token_ids[4],))
    place = whole.token_ids.index(whole.token_ids[4])
    assert cut.token_ids == whole.token_ids[: place + 1]


def serve_one(engine: emoe_core.Engine, stops: tuple[int, ...]) -> list[Answer]:
    loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), WIDE, stop_tokens=stops)
    loop.submit(prompt_ids(engine)[0], "qa", 8)
    return loop.run()


def test_each_row_keeps_its_own_task_in_a_mixed_batch(model: Path) -> None:
    with load(model, budget="3 slots", tolerance=1.0, record=True) as engine:
        _, answers = serve(engine, WIDE)
        trace = engine.trace()
    assert [trace.tasks[number] for number in sorted(trace.tasks)] == TASKS
    tokens = {number: int((trace.request == number).sum()) for number in trace.tasks}
    for answer in answers:
        # Every prompt token and every generated one but the last went through the layers once.
        assert tokens[answer.number] == answer.prompt_tokens + len(answer.token_ids) - 1


def test_loading_is_foretold_from_the_plan(model: Path) -> None:
    # Predicted before the first request and the eighth, so that frequencies are known and not renewed at the last.
    with load(model, budget="4 slots", tolerance=1.0, interval=7) as engine:
        serve(engine, WIDE)
        serve(engine, WIDE)
        costs = replace(make_costs(expert_load_s=1.0), model_hash=engine.index.source_hash)
        loop = ServingLoop(engine, make_scheduler("emoe", costs), WIDE, costs)
        before = engine.stats().counters.prefetches
        foretold = {task: loop._loading_s(task) for task in ("qa", "code")}
        task = max(foretold, key=foretold.__getitem__)
        engine.passes.admit([Request(task, 1)])
        assert engine.stats().counters.prefetches - before == foretold[task] > 0


def test_an_engine_is_free_again_when_the_loop_is_idle_or_failed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(model, budget="100%") as engine:
        loop, _ = serve(engine, WIDE)
        assert loop.idle and loop.turn() == []
        assert len(engine.generate(["Hello"], max_new_tokens=2)) == 1
        loop.submit(prompt_ids(engine)[0], "qa", 4)
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loop.turn()
        assert not engine.control.running and loop.idle
        assert len(engine.generate(["Hello"], max_new_tokens=2)) == 1


def test_what_cannot_be_served_is_refused(model: Path, tmp_path: Path) -> None:
    with load(model, budget="100%") as engine:
        scheduler = make_scheduler("fcfs", make_costs())
        with pytest.raises(CostsError, match="measured on model"):
            ServingLoop(engine, scheduler, WIDE, make_costs())
        with pytest.raises(RequestTooLargeError):
            ServingLoop(engine, scheduler, BatchLimits(2, 10)).submit([1] * 9, "qa", 2)
        token_bytes = engine.memory(1, 1).kv_bytes
        assert limits_within(engine, 2, 100 * token_bytes) == BatchLimits(2, 100)
        with pytest.raises(OptionError, match="hold no two tokens"):
            limits_within(engine, 2, token_bytes)
    with load(tiny_moe(tmp_path / "sliding", "gpt_oss"), budget="100%") as engine:
        assert len(serve(engine, BatchLimits(1, 4096))[1]) == len(PROMPTS)
        # What cannot share a batch runs one at a time, whatever the limits.
        assert engine.one_at_a_time is not None and "DynamicSlidingWindowLayer" in engine.one_at_a_time
        together = {answer.number: answer.token_ids for answer in serve(engine, WIDE)[1]}
        assert together == {answer.number: answer.token_ids for answer in serve(engine, BatchLimits(1, 4096))[1]}


def test_a_request_s_tolerance_is_its_own_in_a_mixed_batch(model: Path) -> None:
    with load(model, budget="2 slots", predictor=None, record=True) as engine:
        loop = ServingLoop(engine, make_scheduler("fcfs", None), WIDE)
        for number, ids in enumerate(prompt_ids(engine)[:4]):
            loop.submit(ids, "qa", 6, tolerance=float(number % 2))
        loop.run()
        assert engine.stats().counters.reroutes > 0
        trace = engine.trace()
        changed = {int(request) for request in trace.request[(trace.served != trace.chosen).any(axis=(1, 2))]}
        assert changed == {1, 3}


def test_a_cancelled_request_leaves_its_place_wherever_it_is(model: Path) -> None:
    with load(model, budget="100%") as engine:
        alone = {answer.number: answer.token_ids for answer in serve(engine, BatchLimits(1, 4096))[1]}
        loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(1, 4096))
        for ids in prompt_ids(engine)[:3]:
            loop.submit(ids, "qa", 9)
        loop.turn()
        assert loop.cancel(0) and loop.cancel(2) and not loop.cancel(0)
        (answer,) = loop.run()
        assert answer.number == 1 and answer.token_ids[: len(alone[1])] == alone[1]
        assert loop.idle and not engine.control.running


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_who_fails_fails_alone(model: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Every pass that holds the victim fails in its last layer, after earlier ones have grown the cache."""
    with load(model, budget="100%", predictor=None) as engine:
        alone = {answer.number: answer.token_ids for answer in serve(engine, BatchLimits(1, 4096))[1]}
        failed: dict[int, Exception] = {}
        loop = ServingLoop(
            engine, make_scheduler("fcfs", None), WIDE, on_failure=lambda number, error: failed.update({number: error})
        )
        victim = engine.control.admitted + 1
        lease = engine.loader.lease

        def broken(layer: int, experts: list[int]) -> object:
            step = engine.passes.step
            assert step is not None
            if victim in step.numbers and layer == 2 and step.is_prefill == (where == "prompt"):
                raise OSError("the disk is gone")
            return lease(layer, experts)

        monkeypatch.setattr(engine.loader, "lease", broken)
        for ids, task, tokens in list(zip(prompt_ids(engine), TASKS, TOKENS, strict=True))[:3]:
            loop.submit(ids, task, tokens)
        found = {answer.number: answer.token_ids for answer in loop.run()}
        assert list(failed) == [1] and isinstance(failed[1], OSError)
        assert set(found) == {0, 2} and all(len(found[n]) == TOKENS[n] for n in found)
        assert all(found[number][:2] == alone[number][:2] for number in found)
        assert loop.idle and not engine.control.running
