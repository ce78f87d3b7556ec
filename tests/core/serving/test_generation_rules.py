"""Promises about a checkpoint's generation_config: offline, served and stock answers are the same, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
)

import emoe_core
from emoe_core.errors import EmoeError, OptionError
from emoe_core.generation import encode
from emoe_core.scheduler import BatchLimits, make_scheduler
from emoe_core.serving.generation_rules import GenerationRules
from emoe_core.serving.loop import ServingLoop
from emoe_core.serving.records import Answer
from emoe_core.serving.sampling import Sampler, Sampling
from workbench.models.reference.tiny import tiny_moe
from workbench.replay.scoring import score

PROMPTS = ["A heron waits at the water", "Why? Why?", "Two and two"]
TOKENS = 24
# Each with the answer it must change: a setting that does nothing here would prove nothing.
SERVED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[210], [174, 174]]},
    {"suppress_tokens": list(range(0, 200, 3))},
    {"begin_suppress_tokens": list(range(0, 259, 2))},
    {"sequence_bias": [[[65], 9.0]]},
    {"forced_eos_token_id": 258},
    {"exponential_decay_length_penalty": [2, 3.0]},
    {"remove_invalid_values": True, "renormalize_logits": True, "repetition_penalty": 0.7},
    {"do_sample": True, "temperature": 0.3, "top_k": 3, "repetition_penalty": 1.7},
]
# The random model's own first token, so that a minimum length has an end to put off.
MINIMA: list[dict[str, Any]] = [{"min_new_tokens": 5}, {"min_length": 50}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("rules") / "model", "mixtral", seed=3)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[emoe_core.Engine]:
    with emoe_core.load(model, pack_dir=model.parent / "packs", budget="100%") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def stock(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")


def served(engine: emoe_core.Engine, batch: int = 1, **options: Any) -> list[Answer]:
    """Return the loop's answers to the prompts, in their order."""
    ends = GenerationRules(engine)._ends
    loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(batch, 4096), stop_tokens=ends)
    for prompt in PROMPTS:
        assert engine.tokenizer is not None
        loop.submit(encode(engine.tokenizer, prompt), "qa", TOKENS, **options)
    return sorted(loop.run(), key=lambda answer: answer.number)


def generated(stock: Any, model: Path, config: GenerationConfig) -> list[tuple[int, ...]]:
    """Return the answers of transformers' own greedy `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode(tokenizer, prompt)])
        output = stock.generate(ids, generation_config=config, do_sample=False, max_new_tokens=TOKENS)
        answers.append(tuple(output[0, ids.shape[1] :].tolist()))
    return answers


def changed(engine: emoe_core.Engine, settings: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig.from_dict(engine.model.generation_config.to_dict() | settings)


@pytest.mark.parametrize("settings", [*SERVED, *MINIMA], ids=lambda settings: "+".join(settings))
def test_served_offline_and_stock_answers_are_the_same_under_each_setting(
    engine: emoe_core.Engine, stock: Any, model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    plain = engine.model.generation_config
    if settings in MINIMA:
        first = generated(stock, model, plain)[0][1]
        plain = changed(engine, {"eos_token_id": [258, first]})
    config = GenerationConfig.from_dict(plain.to_dict() | settings)
    expected = generated(stock, model, config)
    assert expected != generated(stock, model, plain), "the setting changes nothing here"
    monkeypatch.setattr(engine.model, "generation_config", config)
    offline = [answer.token_ids for answer in engine.generate(PROMPTS, max_new_tokens=TOKENS)]
    assert [answer.token_ids for answer in served(engine)] == offline == expected


def test_each_request_of_a_batch_has_processors_of_its_own(
    engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "generation_config", changed(engine, {"no_repeat_ngram_size": 1}))
    for answer, prompt in zip(served(engine, batch=3), PROMPTS, strict=True):
        said = [*encode(engine.tokenizer, prompt), *answer.token_ids]  # type: ignore[arg-type]
        fresh = said[-len(answer.token_ids) :]
        assert len(set(fresh)) == len(fresh) and not set(fresh) & set(said[: -len(fresh)])


def test_a_request_may_change_a_setting_for_itself(engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = served(engine)
    monkeypatch.setattr(engine.model, "generation_config", changed(engine, {"repetition_penalty": 1.7}))
    penalised = served(engine)
    back = served(engine, settings={"repetition_penalty": 1.0})
    assert [answer.token_ids for answer in back] == [answer.token_ids for answer in plain]
    assert [answer.token_ids for answer in penalised] != [answer.token_ids for answer in plain]
    with pytest.raises(OptionError, match="penalty"):
        served(engine, settings={"repetition_penalty": -1.0})


def test_a_drawn_answer_obeys_the_settings_and_draws_as_its_request_says(
    engine: emoe_core.Engine, stock: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"suppress_tokens": list(range(0, 256, 2)), "repetition_penalty": 1.2, "top_k": 2, "min_p": 0.5}
    config = changed(engine, settings)
    monkeypatch.setattr(engine.model, "generation_config", config)
    found = served(engine, sampling=Sampling(temperature=1.4, top_p=0.95, seed=7))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for answer, prompt in zip(found, PROMPTS, strict=True):
        ids = torch.tensor([encode(tokenizer, prompt)])
        torch.manual_seed(7)
        output = stock.generate(
            ids, generation_config=config, do_sample=True, temperature=1.4, top_p=0.95, top_k=0, min_p=None,
            max_new_tokens=TOKENS,
        )  # fmt: skip
        assert answer.token_ids == tuple(output[0, ids.shape[1] :].tolist())
        assert not any(token % 2 == 0 for token in answer.token_ids if token < 256)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_beams=2, num_return_sequences=2"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "dola_layers=high"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"constraints": [1]}, "constraints"),
        ({"force_words_ids": [[7]]}, "force_words_ids"),
        ({"token_healing": True}, "token_healing=True"),
        ({"stop_strings": ["\n"]}, "stop_strings"),
        ({"max_time": 0.5}, "max_time=0.5"),
        ({"watermarking_config": {"bias": 2.5}}, "watermarking_config"),
        ({"cache_implementation": "quantized"}, "cache_implementation=quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_is_not_served_is_refused_by_name_offline_and_at_the_start(
    engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(engine.model, "generation_config", changed(engine, settings))
    for ask in (lambda: engine.generate(["Why?"]), lambda: served(engine)):
        with pytest.raises(OptionError, match=r"generation_config\.json") as refused:
            ask()
        assert named in str(refused.value)


def test_a_setting_that_transformers_refuses_is_named_at_the_start(
    engine: emoe_core.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "generation_config", changed(engine, {"bad_words_ids": [["x"]]}))
    with pytest.raises(OptionError, match="bad_words_ids"):
        served(engine)


def test_the_settings_are_those_of_the_file_beside_the_weights(model: Path, tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 3}))
    with emoe_core.load(path, pack_dir=tmp_path / "packs") as engine, pytest.raises(OptionError, match="num_beams=3"):
        engine.generate(["Why?"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"generation_config.json cannot be read .*: mend it"),
        ("[]", "it is no object"),
        ('{"repetition_penalty": -1}', "`penalty` has to be a strictly positive float"),
        ('{"eos_token_id": "x"}', "eos_token_id .* is 'x': give token ids"),
    ],
)
def test_a_file_that_cannot_be_followed_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    """Stock passes over a broken one, and answers without what it asked for."""
    path = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    (path / "generation_config.json").write_text(text)
    with pytest.raises(EmoeError, match=message), emoe_core.load(path, pack_dir=tmp_path / "packs") as engine:
        engine.generate(["Why?"])


def test_a_choice_that_fails_is_no_choice() -> None:
    """A row whose logits are broken once says what it would have said, when its step is taken again."""
    steps = [torch.randn(50, generator=torch.Generator().manual_seed(place)) for place in range(12)]

    def sampler() -> Sampler:
        return Sampler(Sampling(seed=5), LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)]), [1, 2, 3], 12)

    undisturbed, disturbed, answers = sampler(), sampler(), []
    for logits in steps:
        with pytest.raises(RuntimeError):
            disturbed.choose(torch.full((50,), float("nan")))
        answers.append((undisturbed.choose(logits), disturbed.choose(logits)))
    assert all(one == other for one, other in answers)


def test_a_prompt_with_tokens_that_the_model_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    """Tokens behind the embeddings, as checkpoints with added tokens have, do no harm unless they are used."""
    path = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(path)
    with emoe_core.load(path, pack_dir=tmp_path / "packs", budget="100%") as engine:
        alone = [engine.generate([prompt], max_new_tokens=6)[0].token_ids for prompt in ("Why?", "A heron waits")]
        both = engine.generate(["Why?", "A heron waits"], max_new_tokens=6, batch_size=2)
        assert [len(answer.token_ids) for answer in both] == [len(tokens) for tokens in alone]
        loop = ServingLoop(engine, make_scheduler("fcfs", None), BatchLimits(1, 4096))
        for ask in (
            lambda: engine.generate(["Why <|pad|>?"]),
            lambda: score(engine, [([65], [259])]),
            lambda: loop.submit([65, 259], "qa"),
        ):
            with pytest.raises(OptionError, match=r"token id 259 \('<\|pad\|>'\).*0 to 258"):
                ask()
        with pytest.raises(OptionError, match="token id -1 "):
            loop.submit([-1], "qa")
        assert loop.idle
