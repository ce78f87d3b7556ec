"""Promises of the serving loop when something breaks: who fails ends alone, and nobody's answer changes by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving_bench import make_costs
from transformers import AutoModelForCausalLM, MixtralConfig, PhimoeConfig, PreTrainedConfig

import emoe_core
from emoe_core.generation import encode
from emoe_core.scheduler import BatchLimits, make_scheduler
from emoe_core.serving.loop import ServingLoop
from emoe_core.serving.sampling import Sampler, Sampling
from workbench.models.reference.tiny import roughen, tiny_moe

PROMPTS = ["A heron waits.", "Two and two make four, they say", "Why?", "Is the sky blue at noon"]
TOKENS = 8
BATCH = BatchLimits(4, 4096)
Spoil = Callable[[torch.Tensor, tuple[int, ...]], None]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[emoe_core.Engine]:
    folder = tmp_path_factory.mktemp("faults")
    model = tiny_moe(folder / "model", "mixtral", seed=3)
    with emoe_core.load(model, pack_dir=folder, budget="3 slots") as engine:
        yield engine


def serve(
    engine: emoe_core.Engine, limits: BatchLimits = BATCH, count: int = 4, **options: Any
) -> tuple[dict[int, tuple[int, ...]], dict[int, Exception], ServingLoop]:
    """Serve drawn answers; return the tokens of each, the failures, and the loop."""
    assert engine.tokenizer is not None
    failures: dict[int, Exception] = {}
    options = {"on_failure": failures.__setitem__} | options
    loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), limits, **options)
    for number, prompt in enumerate(PROMPTS[:count]):
        loop.submit(encode(engine.tokenizer, prompt), "qa", TOKENS, sampling=Sampling(1.0, 1.0, number))
    answers = {answer.number: answer.token_ids for answer in loop.run()}
    return answers, failures, loop


def require_nothing_left(engine: emoe_core.Engine, loop: ServingLoop) -> None:
    assert loop.idle, "a request was forgotten"
    assert not engine.control.running, "a request that ended still runs on the engine"


@contextmanager
def spoilt(engine: emoe_core.Engine, spoil: Spoil) -> Iterator[None]:
    """Let logits [rows, length, vocabulary] be changed, given whose rows they are (numbers from this pass on)."""
    first = engine.control.admitted

    def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        assert engine.passes.step is not None
        output = output.clone()
        spoil(output, tuple(number - first for number in engine.passes.step.numbers))
        return output

    handle = engine.model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_token_that_cannot_be_chosen_once_changes_nobody_s_answer(engine: emoe_core.Engine) -> None:
    """Only the row without a token is taken again: samplers of the others do not draw twice, nor read a token twice."""
    expected, _, _ = serve(engine)
    spoils = iter([False, True])

    def once(logits: torch.Tensor, rows: tuple[int, ...]) -> None:
        if len(rows) == 4 and next(spoils, False):
            logits[2] = torch.nan

    with spoilt(engine, once):
        answers, failures, loop = serve(engine)
    assert next(spoils, None) is None, "nothing was spoilt"
    assert not failures and answers == expected
    require_nothing_left(engine, loop)


@pytest.mark.parametrize("victim", range(4))
def test_a_token_that_can_never_be_chosen_ends_its_request_alone(engine: emoe_core.Engine, victim: int) -> None:
    expected, _, _ = serve(engine)

    def always(logits: torch.Tensor, rows: tuple[int, ...]) -> None:
        if victim in rows and past_prompt(engine):
            logits[rows.index(victim)] = torch.nan

    with spoilt(engine, always):
        answers, failures, loop = serve(engine)
    assert set(failures) == {victim} and "nan" in str(failures[victim])
    assert answers == {number: tokens for number, tokens in expected.items() if number != victim}
    require_nothing_left(engine, loop)


def past_prompt(engine: emoe_core.Engine) -> bool:
    assert engine.passes.step is not None
    return not engine.passes.step.is_prefill


def test_a_first_token_that_cannot_be_chosen_leaves_no_trace_in_the_batch(engine: emoe_core.Engine) -> None:
    """Neither for a request that comes when nobody runs, nor for one that joins others."""
    expected, _, _ = serve(engine)

    def first(logits: torch.Tensor, rows: tuple[int, ...]) -> None:
        if not past_prompt(engine) and rows[0] in (0, 2):
            logits[:] = torch.nan

    with spoilt(engine, first):
        answers, failures, loop = serve(engine)
    assert set(failures) == {0, 2}
    assert answers == {1: expected[1], 3: expected[3]}
    require_nothing_left(engine, loop)


def test_a_listener_that_fails_ends_its_request_alone(engine: emoe_core.Engine) -> None:
    """At its first token, and in the midst of a batch: the tokens of the others have been told by then, or are."""
    expected, _, _ = serve(engine)
    told: dict[int, list[int]] = {number: [] for number in range(4)}

    def listen(number: int, token: int) -> None:
        if (number, len(told[number])) in ((0, 0), (2, 3)):
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        told[number].append(token)

    answers, failures, loop = serve(engine, on_token=listen)
    assert set(failures) == {0, 2}
    assert answers == {1: expected[1], 3: expected[3]}
    assert tuple(told[1]) == expected[1] and tuple(told[3]) == expected[3]
    require_nothing_left(engine, loop)


class Stubborn:
    """A predictor that cannot be asked before it has been asked ``fails`` times."""

    def __init__(self, fails: int) -> None:
        self._left = fails

    def observe(self, task: str, counts: np.ndarray) -> None:
        pass

    def predict(self, task: str) -> np.ndarray | None:
        if self._left:
            self._left -= 1
            raise ValueError("no prediction today")
        return None


def test_requests_that_cannot_be_planned_are_told(engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _, _ = serve(engine, BatchLimits(1, 4096))
    monkeypatch.setattr(engine.control, "predictor", Stubborn(2))
    monkeypatch.setattr(engine.control, "replan", "admission")
    engine.control._frequencies.clear()
    engine.control._predicted = True
    answers, failures, loop = serve(engine, BatchLimits(1, 4096))
    assert {number: str(error) for number, error in failures.items()} == dict.fromkeys((0, 1), "no prediction today")
    assert answers == {2: expected[2], 3: expected[3]}
    require_nothing_left(engine, loop)


def test_without_a_listener_requests_that_cannot_be_planned_go_on_waiting(
    engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = serve(engine)
    monkeypatch.setattr(engine.control, "predictor", Stubborn(1))
    monkeypatch.setattr(engine.control, "replan", "admission")
    engine.control._frequencies.clear()
    engine.control._predicted = True
    assert engine.tokenizer is not None
    loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), BATCH)
    for number, prompt in enumerate(PROMPTS):
        loop.submit(encode(engine.tokenizer, prompt), "qa", TOKENS, sampling=Sampling(1.0, 1.0, number))
    with pytest.raises(ValueError, match="no prediction today"):
        loop.turn()
    assert loop.waiting == 4 and not engine.control.running
    assert {answer.number: answer.token_ids for answer in loop.run()} == expected
    require_nothing_left(engine, loop)


@pytest.mark.parametrize("when", ["prompt", "step"])
def test_without_a_listener_an_error_is_raised_and_nothing_is_left_over(engine: emoe_core.Engine, when: str) -> None:
    assert engine.tokenizer is not None
    loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), BATCH)
    for number, prompt in enumerate(PROMPTS):
        loop.submit(encode(engine.tokenizer, prompt), "qa", TOKENS, sampling=Sampling(1.0, 1.0, number))

    def spoil(logits: torch.Tensor, rows: tuple[int, ...]) -> None:
        if past_prompt(engine) == (when == "step") and 1 in rows:
            logits[:] = torch.nan

    with spoilt(engine, spoil), pytest.raises(RuntimeError, match="nan"):
        loop.run()
    require_nothing_left(engine, loop)


def test_a_draw_that_fails_leaves_the_sampler_as_it_was() -> None:
    sampler, other = Sampler(Sampling(1.0, 0.9, 5)), Sampler(Sampling(1.0, 0.9, 5))
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="nan"):
            sampler.choose(torch.full((64,), torch.nan))
        assert sampler.choose(logits) == other.choose(logits)


BEYOND = 48
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def long_rope() -> PhimoeConfig:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": BEYOND,
    }
    config = PhimoeConfig(max_position_embeddings=4 * BEYOND, rope_parameters=rope, **SIZES)
    config.original_max_position_embeddings = BEYOND
    return config


def dynamic_rope() -> MixtralConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return MixtralConfig(head_dim=8, max_position_embeddings=BEYOND, rope_parameters=rope, **SIZES)


@pytest.mark.parametrize("make_config", [long_rope, dynamic_rope])
def test_a_rotary_embedding_that_goes_by_length_gives_stock_s_tokens(
    make_config: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    """Across the length where it changes, and whatever the lengths of the requests before."""
    config = make_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        roughen(model)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(32, 128, (1, size), generator=generator) for size in (40, 100, 60, 10)]
    with emoe_core.load(tmp_path, pack_dir=tmp_path, budget="100%") as engine:
        assert engine.one_at_a_time is not None and "rotary" in engine.one_at_a_time
        loop = ServingLoop(engine, make_scheduler("fcfs", make_costs()), BATCH)
        for prompt in prompts:
            loop.submit(prompt[0].tolist(), "qa", 16)
        answers = {answer.number: list(answer.token_ids) for answer in loop.run()}
    for number, prompt in enumerate(prompts):
        # A model of its own for each: one keeps the length of the longest sequence so far.
        stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
        stock.generation_config.eos_token_id = None
        told = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
        expected = stock.generate(input_ids=prompt, pad_token_id=0, **told)
        assert answers[number] == expected[0, prompt.shape[1] :].tolist(), number
