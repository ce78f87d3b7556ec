"""Promises about chats: the template is told what the request says of it, and no message is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_bench import HELLO, Service, post, said, serving

from workbench.models.reference.tiny import tiny_moe

# Knows three roles as older models do, and what newer ones read beside the messages.
OTHER_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role in ('user', 'assistant') or (message.role == 'system' and loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if reasoning_effort %}{{ 'Effort: ' + reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking | default(true) %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path: Path = tiny_moe(tmp_path_factory.mktemp("conversations") / "model", "mixtral", seed=3)
    with serving(path) as running:
        yield running


@pytest.fixture
def other_template(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine.tokenizer, "chat_template", OTHER_TEMPLATE)


def answer(service: Service, **fields: Any) -> str:
    """Return what a chat is answered."""
    reply = post(service, **({"messages": HELLO} | fields))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.mark.usefixtures("other_template")
def test_a_template_is_told_what_the_request_says_of_it(service: Service) -> None:
    turn = "<|im_start|>user\nIs the sky blue?<|im_end|>"
    begin = "<|im_start|>assistant\n"
    for fields, text in [
        ({}, turn + begin),
        ({"add_generation_prompt": False}, turn),
        ({"reasoning_effort": "low"}, turn + "Effort: low" + begin),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, turn + "Effort: low" + begin),
        ({"enable_thinking": False}, turn + begin + "<think></think>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, turn + begin + "<think></think>"),
    ]:
        assert answer(service, **fields) == said(service, text), fields
    goes_on = post(service, messages=[*HELLO, {"role": "assistant", "content": "It is"}], continue_final_message=True)
    assert goes_on.json()["choices"][0]["message"]["content"] == said(service, turn + begin + "It is")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_what_a_template_does_not_use_is_refused_by_its_name(
    service: Service, fields: dict[str, Any], named: str
) -> None:
    reply = post(service, messages=HELLO, **fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == named


@pytest.mark.usefixtures("other_template")
def test_a_template_that_fails_on_what_it_is_told_is_the_requests_error(service: Service) -> None:
    reply = post(service, messages=HELLO, reasoning_effort=5)
    assert reply.status_code == 400 and "template refuses" in reply.json()["error"]["message"]


def turns(*roles: str) -> list[Any]:
    return [{"role": role, "content": f" The {role} speaks. "} for role in roles]


def test_a_developer_is_heard_as_the_template_knows_best(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(*roles: str) -> str:
        return str(post(service, messages=turns(*roles)).json()["choices"][0]["message"]["content"])

    spelled = "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns("developer", "user")
    )
    assert reply("developer", "user") == said(service, f"{spelled}<|im_start|>assistant\n")
    monkeypatch.setattr(service.engine.tokenizer, "chat_template", OTHER_TEMPLATE)
    spoken = "<|im_start|>system\nThe developer speaks.<|im_end|><|im_start|>user\nThe user speaks.<|im_end|>"
    assert reply("developer", "user") == said(service, f"{spoken}<|im_start|>assistant\n")
    refusing = OTHER_TEMPLATE.replace(
        "{% for", "{% if messages[0].role == 'developer' %}{{ raise_exception('?') }}{% endif %}{% for", 1
    )
    monkeypatch.setattr(service.engine.tokenizer, "chat_template", refusing)
    assert reply("developer", "user") == said(service, f"{spoken}<|im_start|>assistant\n")


@pytest.mark.usefixtures("other_template")
@pytest.mark.parametrize(
    ("roles", "place", "role"),
    [
        (("user", "developer"), 1, "developer"),
        (("system", "system", "user"), 1, "system"),
        (("user", "assistant", "system", "user"), 2, "system"),
        (("system", "developer", "user"), 1, "developer"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused_by_its_place(
    service: Service, roles: tuple[str, ...], place: int, role: str
) -> None:
    error = post(service, messages=turns(*roles)).json()["error"]
    assert error["param"] == f"messages.{place}" and f"leaves out this {role} message" in error["message"]
