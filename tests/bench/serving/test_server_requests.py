"""Promises about requests: each field is obeyed, refused by its name, or named as unused; no prompt loses anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_bench import HELLO, PATIENCE_S, Service, post, said, serving
from transformers import AutoTokenizer

import emoe_core
from emoe_core.errors import OptionError
from workbench.models.reference.tiny import CHAT_TEMPLATE, tiny_moe
from workbench.serving.server.fields import UNUSED_HEADER
from workbench.serving.server.limits import ServerLimits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("requests") / "model", "mixtral", seed=3)


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Service]:
    with serving(model, ServerLimits(max_batch=2, max_waiting=4)) as running:
        yield running


def answer(service: Service, **fields: Any) -> str:
    """Return what a chat is answered."""
    reply = post(service, messages=HELLO, **fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def ended(service: Service) -> dict[str, Any]:
    """Return a chat that ends by itself: the client's stream takes an answer cut at its limit for an error."""
    text = answer(service, max_tokens=20)
    return {"model": "tiny", "messages": HELLO, "max_tokens": 20, "stop": text[9:12]}


def test_a_streamed_chat_adds_up_to_the_whole_one_in_the_clients_own_stream(service: Service) -> None:
    asked = ended(service)
    whole = service.client.chat.completions.create(**asked)
    with service.client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.role == "assistant" and message.content == whole.choices[0].message.content == "".join(pieces)
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop" and final.usage == whole.usage


def test_only_the_first_chunk_of_a_chat_says_who_speaks(service: Service) -> None:
    chunks = list(service.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].choices[0].delta.content is None


def test_usage_comes_last_and_once_where_it_is_asked_for(service: Service) -> None:
    asked: dict[str, Any] = {"prompt": ["Why?", "Who?"], "stream": True, "max_tokens": 5}
    plain = list(service.complete(**asked))
    chunks = list(service.complete(**asked, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in [*plain, *chunks[:-1]])
    assert not chunks[-1].choices and chunks[-1].usage == service.complete(["Why?", "Who?"], max_tokens=5).usage


def test_the_asynchronous_client_reads_the_same(service: Service) -> None:
    asked = ended(service)

    async def ask() -> tuple[str, str | None]:
        url = f"{service.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            completion = await client.completions.create(model="tiny", prompt="Why?", max_tokens=8, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in completion])
            async with client.chat.completions.stream(**asked) as stream:
                final = await stream.get_final_completion()
            return text, final.choices[0].message.content

    assert asyncio.run(ask()) == (said(service, "Why?", 8), answer(service, max_tokens=20, stop=asked["stop"]))


def test_every_form_of_a_prompt_gets_the_answers_of_its_texts(service: Service) -> None:
    tokenizer = service.engine.tokenizer
    assert tokenizer is not None
    hi, why = tokenizer.encode("hi"), tokenizer.encode("Why?")
    for prompt, texts in [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (hi, ["hi"]),
        ([hi], ["hi"]),
        (["hi", "Why?", "hi"], ["hi", "Why?", "hi"]),
        ([hi, why], ["hi", "Why?"]),
    ]:
        expected = [said(service, text) for text in texts]
        reply = post(service, prompt=prompt).json()
        assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == list(enumerate(expected))
        assert reply["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
        assert reply["usage"]["completion_tokens"] == 4 * len(texts)
        streamed = [""] * len(texts)
        for chunk in service.complete(prompt, max_tokens=4, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "prompt"),
        ([], "empty"),
        ([[]], "empty"),
        (["hi", ""], "empty"),
        ([1.5], "a list of token ids"),
        ([True], "a list of token ids"),
        (["hi", 3], "a list of token ids"),
        ([[1], [[2]]], "a list of token ids"),
        ([[1], [259]], "token id 259"),
        ([-1], "token id -1"),
        (["hi"] * 7, "7 prompts in one request"),
    ],
)
def test_what_is_no_prompt_is_refused_whole(service: Service, prompt: Any, message: str) -> None:
    reply = post(service, prompt=prompt)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"] == "prompt"
    service.wait_until_free()


def test_a_request_of_many_prompts_that_finds_no_room_leaves_nothing_behind(service: Service) -> None:
    service.wait_until_free()
    running = service.complete(["a", "b", "c"], max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(running))
    assert post(service, prompt=["d"] * 5).status_code == 429
    running.close()
    service.wait_until_free()
    assert post(service, prompt=["d"] * 5).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("logprobs", "prompt_logprobs", "echo")),
        *((name, True) for name in ("logprobs", "echo", "use_beam_search", "include_stop_str_in_output")),
        ("top_logprobs", 3),
        ("n", 2),
        ("suffix", "."),
        ("logit_bias", {"5": -100}),
        ("presence_penalty", 0.5),
        ("bad_words", ["sky"]),
        ("stop_token_ids", [5]),
        ("allowed_token_ids", [5]),
        ("truncate_prompt_tokens", 3),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("guided_choice", ["a"]),
        ("structured_outputs", {"choice": ["a"]}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("chat_template", "{{ 1 }}"),
        ("spaces_between_special_tokens", False),
        ("frobnicate", 1),
        ("max_token", 5),
        ("slo.itl", 5),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_its_name(service: Service, field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    for prompt in ({"prompt": "x"}, {"messages": HELLO}):
        reply = post(service, **prompt, **{outer: {inner: value} if inner else value}, stream=outer == "stream_options")
        assert reply.status_code == 400, field
        error = reply.json()["error"]
        assert error["param"] == field and error["message"].startswith(field)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"tool_calls": [{"id": "1"}]}, "messages.0.tool_calls"),
        ({"reasoning_content": "Hm."}, "messages.0.reasoning_content"),
        ({"prefix": True}, "messages.0.prefix"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0.type"),
        ({"content": [{"type": "text", "text": "x", "weight": 2}]}, "messages.0.content.0.weight"),
        ({"role": "tool"}, "messages.0.role"),
        ({"content": 3}, "messages.0.content"),
    ],
)
def test_a_part_of_a_message_that_is_not_served_is_refused_by_its_place(
    service: Service, message: dict[str, Any], named: str
) -> None:
    reply = post(service, messages=[HELLO[0] | message, *HELLO])
    assert reply.status_code == 400 and reply.json()["error"]["param"] == named


def test_fields_that_change_nothing_pass_and_are_named(service: Service) -> None:
    plain = post(service, messages=HELLO)
    assert UNUSED_HEADER not in plain.headers
    nothing = {"n": 1, "logprobs": False, "top_p": None, "tools": [], "tool_choice": "none", "frequency_penalty": 0.0}
    again = post(service, messages=[HELLO[0] | {"tool_calls": None}], **nothing, guided_json=None)
    unused = {"user": "me", "metadata": {}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"}
    named = post(service, messages=[HELLO[0] | {"name": "bob"}], **unused)
    streamed = post(service, messages=HELLO, user="me", stream=True)
    assert UNUSED_HEADER not in again.headers and streamed.headers[UNUSED_HEADER] == "user"
    assert named.headers[UNUSED_HEADER] == ", ".join([*unused, "messages.name"])
    texts = {reply.json()["choices"][0]["message"]["content"] for reply in (plain, again, named)}
    assert len(texts) == 1


@pytest.mark.parametrize("asked", [{"prompt": "Why?"}, {"messages": HELLO}], ids=["text", "chat"])
def test_what_public_load_generators_send_is_answered_to_the_length_they_ask_for(
    service: Service, asked: dict[str, Any]
) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    guidellm = {"stream": True, "stream_options": usage, "max_tokens": 7, "stop": None, "ignore_eos": True}
    vllm = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 7, "temperature": 0.0,
            "repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True}  # fmt: skip
    for body in (guidellm, vllm):
        reply = post(service, **asked, **body)
        *_, last, done = [line for line in reply.text.splitlines() if line]
        assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == 7


def test_stream_options_without_a_stream_are_refused(service: Service) -> None:
    reply = post(service, stream_options={"include_usage": True})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "stream_options"


def test_special_tokens_are_part_of_an_answer_where_it_is_asked_for(service: Service) -> None:
    # A penalty below 1 makes the model repeat what it was told, special tokens among it.
    asked: dict[str, Any] = {"prompt": "<|im_start|>" * 40, "max_tokens": 12, "repetition_penalty": 0.05}
    shown = post(service, **asked, skip_special_tokens=False).json()["choices"][0]["text"]
    hidden = post(service, **asked).json()["choices"][0]["text"]
    assert "<|im_start|>" in shown and shown.replace("<|im_start|>", "") == hidden


def test_a_request_brings_its_own_penalty_and_least_tokens(service: Service) -> None:
    plain, penalised = said(service, "Why?", 24), said(service, "Why?", 24, extra_body={"repetition_penalty": 1.8})
    assert len(set(plain)) < len(set(penalised))
    (whole,) = service.engine.generate(["Why?"], max_new_tokens=12, chat=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.engine.model.generation_config, "eos_token_id", whole.token_ids[2])
        patch.setattr(service.server.worker._loop, "_stops", frozenset({whole.token_ids[2]}))
        patch.setattr(service.server.worker._loop._rules, "_ends", [whole.token_ids[2]])
        short = service.complete(max_tokens=12)
        long = service.complete(max_tokens=12, extra_body={"min_tokens": 9})
    assert short.usage is not None and short.usage.completion_tokens <= 3
    assert long.usage is not None and long.usage.completion_tokens >= 9


def test_a_token_that_the_model_does_not_have_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tiny_moe(tmp_path / "model", "mixtral", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("+ message['content']", "+ 'T' + message['content']")
    tokenizer.save_pretrained(path)
    with serving(path) as service:
        for fields in (
            {"prompt": "Why <|extra|>?"},
            {"prompt": [65, 259]},
            {"prompt": ["Why?", "<|extra|>"]},
            {"messages": [{"role": "user", "content": "<|extra|>"}]},
        ):
            reply = post(service, **fields)
            assert reply.status_code == 400 and "token id 259 ('<|extra|>')" in reply.json()["error"]["message"]
        assert post(service).status_code == 200


def test_a_generation_config_that_is_not_served_is_named_before_the_server_listens(model: Path) -> None:
    with emoe_core.load(model, pack_dir=model.parent / "packs") as engine:
        engine.model.generation_config.num_beams = 3
        with pytest.raises(OptionError, match="num_beams=3"):
            Service(engine, ServerLimits(), None)
